"""Traces, read here as Perfetto reads them: of runs on threads, and of timelines made by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.config import TrainConfig
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import EPOCH, EXCHANGE, SPAN, STEP, RankTimeline, read_timeline
from rankwise.ledger.waits import Pattern
from rankwise.report.trace import Event, events, write_trace
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Clock, Record

from . import records, tiny
from .test_cli import call

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]

TEAMS = [
    {"ranks": 1},
    {"ranks": 3, "topology": "master", "sync_every": 8},
    {"ranks": 3, "topology": "allreduce", "sync_every": 8},
]
TRAIN_SAMPLES = tiny.TRAIN


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@dataclass
class Slice:
    """A slice as a viewer shows it; times in ns."""

    track: str
    name: str
    start_ns: int
    end_ns: int
    args: dict[str, Any]
    parent: Slice | None
    inside: list[Slice] = field(default_factory=list)


class Viewer:
    """Reads a trace by the rules of Perfetto's importer (src/trace_processor: trace_sorter.h,
    json_trace_parser.cc, slice_tracker.cc, flow_tracker.cc), and fails where that counts an error."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.slices: list[Slice] = []
        self.arrows: dict[int, tuple[Slice, Slice]] = {}
        self.counters: dict[str, list[tuple[int, float]]] = {}
        self.hosts: dict[int, str] = {}
        self.tracks: dict[tuple[int, int], str] = {}
        self._open: dict[tuple[int, int], list[Slice]] = {}
        self._begun: dict[tuple[int, str, str], Slice] = {}
        # In order of time; complete events first, the longer ones first; else as in the file.
        for event in sorted(content["traceEvents"], key=self._order):
            self._take(event)

    @staticmethod
    def _order(event: dict[str, Any]) -> tuple[int, bool, int]:
        return _ns(event.get("ts", -1e9)), event["ph"] != "X", -_ns(event.get("dur", 0))

    def _take(self, event: dict[str, Any]) -> None:
        place = event["pid"], event["tid"]
        stack = self._open.setdefault(place, [])
        match event["ph"]:
            case "M" if event["name"] == "process_name":
                self.hosts[event["pid"]] = event["args"]["name"]
            case "M" if event["name"] == "thread_name":
                self.tracks[place] = event["args"]["name"]
            case "X":
                start_ns, end_ns = _ns(event["ts"]), _ns(event["ts"]) + _ns(event["dur"])
                while stack and stack[-1].end_ns <= start_ns:
                    stack.pop()
                assert not stack or end_ns <= stack[-1].end_ns, f"{event} overlaps {stack[-1].name}"
                parent = stack[-1] if stack else None
                self.slices.append(
                    Slice(self.tracks[place], event["name"], start_ns, end_ns, event["args"], parent)
                )
                if parent:
                    parent.inside.append(self.slices[-1])
                stack.append(self.slices[-1])
            case "C":
                for key, value in event["args"].items():
                    name = f"{event['name']} {key}"
                    self.counters.setdefault(name, []).append((_ns(event["ts"]), value))
            case "s" | "f":
                key = event["id"], event["cat"], event["name"]
                holder = stack[-1]
                assert holder.start_ns < _ns(event["ts"]) < holder.end_ns, "not inside its slice"
                if event["ph"] == "s":
                    assert key not in self._begun
                    self._begun[key] = holder
                else:
                    assert event["bp"] == "e"
                    assert event["id"] not in self.arrows
                    self.arrows[event["id"]] = self._begun.pop(key), holder

    def check(self) -> None:
        """What must hold in any trace."""
        assert not self._begun, "arrows that begin and do not end"
        for source, target in self.arrows.values():
            assert source.track != target.track
            assert source.start_ns <= target.start_ns, "Perfetto would turn the arrow round"

    def named(self, name: str) -> list[Slice]:
        """All slices of a name."""
        return [item for item in self.slices if item.name == name]


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def view(path: Path) -> Viewer:
    """What a viewer makes of the file; checked."""
    viewer = Viewer(json.loads(path.read_bytes()))
    viewer.check()
    return viewer


def phase_of(part: Slice) -> Slice:
    """The phase or exchange around a part of it."""
    assert part.parent
    return part.parent


@pytest.mark.parametrize("team", TEAMS, ids=str)
def test_a_run_as_perfetto_sees_it(config: Make, train_in_threads: Train, team: dict[str, Any]) -> None:
    """Any run gives a trace without an importer's error: a track a rank under its host, on which epochs
    hold steps, and steps hold phases and exchanges that fill them without a gap; an exchange, which may be
    all waiting, is no phase beside itself."""
    record, folder, _ = train_in_threads(config(**team))
    write_trace(folder.path, Path("trace.json"))
    viewer = view(Path("trace.json"))
    tracks = [f"rank {row.rank} {row.role}" for row in record.ranks]
    assert list(viewer.tracks.values()) == tracks
    assert list(viewer.hosts.values()) == [f"host {record.environment.hosts[0].name}"]
    assert len({*viewer.hosts, *(tid for _, tid in viewer.tracks)}) == len(tracks) + 1
    for rank, track in enumerate(tracks):
        mine = [item for item in viewer.slices if item.track == track]
        outer = [item for item in mine if item.parent is None]
        epochs = [item for item in outer if item.name.startswith("epoch")]
        assert [item.name for item in epochs] == ["epoch 1", "epoch 2"]
        steps = [item for item in mine if item.parent in epochs]
        assert len(steps) == len(read_timeline(folder.timeline_of(rank)).steps)
        for item in (*epochs, *steps):
            spent_ns = sum(child.end_ns - child.start_ns for child in item.inside)
            assert spent_ns == item.end_ns - item.start_ns, item.name
        phases = [item for item in mine if item.parent in steps]
        assert all(item.name in PHASES or " to " in item.name for item in phases)
        for item in (part for phase in phases for part in phase.inside if part.name != "wait"):
            assert (item.start_ns, item.end_ns) != (phase_of(item).start_ns, phase_of(item).end_ns)
        total_s = sum(value for key, value in epochs[1].args.items() if key.endswith("_s"))
        assert total_s == pytest.approx((epochs[1].end_ns - epochs[1].start_ns) / 1e9)


@pytest.mark.parametrize("team", TEAMS[1:], ids=str)
def test_waiting_and_arrows_of_a_run(config: Make, train_in_threads: Train, team: dict[str, Any]) -> None:
    """Waiting slices add up to the waiting in the timelines, and all arrows of a run lie between exchanges;
    with a master each round has an arrow from each worker and one back to it."""
    _, folder, _ = train_in_threads(config(**team))
    write_trace(folder.path, Path("trace.json"))
    viewer = view(Path("trace.json"))
    timelines = [read_timeline(folder.timeline_of(rank)) for rank in range(3)]
    waited_ns = sum(int(t.exchanges["wait_ns"].sum()) for t in timelines)
    assert sum(item.end_ns - item.start_ns for item in viewer.named("wait")) == waited_ns
    for item in viewer.named("wait"):
        assert phase_of(item).name in ("all to all", "all to rank 0", "rank 0 to all")
        assert sum(part.end_ns - part.start_ns for part in phase_of(item).inside) == (
            phase_of(item).end_ns - phase_of(item).start_ns
        )
        assert item.args["waited_for"] != " ".join(item.track.split()[:2])
    titles = Counter(
        (source.parent if source.parent and source.name == "wait" else source).name
        for source, _ in viewer.arrows.values()
    )
    if team["topology"] == "master":
        rounds = int((timelines[0].exchanges["pattern"] == Pattern.ALL_TO_ONE).sum())
        assert titles["all to rank 0"] == titles["rank 0 to all"] == 2 * rounds
    assert titles["all to all"] > 0
    assert set(titles) <= {"all to rank 0", "rank 0 to all", "all to all"}


def test_throughput(config: Make, train_in_threads: Train) -> None:
    """The counter of all ranks has each epoch's samples over its time, those of ranks add up to all samples
    that were trained, and all end at 0."""
    _, folder, _ = train_in_threads(config(ranks=3, topology="allreduce"))
    write_trace(folder.path, Path("trace.json"))
    viewer = view(Path("trace.json"))
    total = viewer.counters.pop("all ranks samples/s")
    epochs = [item for item in viewer.named("epoch 1") + viewer.named("epoch 2") if "rank 0" in item.track]
    values = dict(total)
    rates = dict(viewer.counters["rank 0 samples/s"])
    for step in (item for item in viewer.slices if item.name.startswith("step") and "rank 0" in item.track):
        trained = rates[step.start_ns] * (step.end_ns - step.start_ns) / 1e9
        assert trained == pytest.approx(step.args["samples"], rel=1e-3)
    for epoch in epochs:
        assert values[epoch.start_ns] * (epoch.end_ns - epoch.start_ns) / 1e9 == pytest.approx(
            TRAIN_SAMPLES, rel=1e-3
        )
    trained = 0.0
    assert set(viewer.counters) == {f"rank {rank} samples/s" for rank in range(3)}
    for steps in viewer.counters.values():
        for (time_ns, value), (until_ns, _) in pairwise(steps):
            trained += value * (until_ns - time_ns) / 1e9
    # Steps that were not kept have their epoch's mean, and all of these steps were kept.
    assert trained == pytest.approx(2 * TRAIN_SAMPLES, rel=1e-3)
    assert [points[-1][1] for points in [total, *viewer.counters.values()]] == [0.0] * 4


def timeline(
    rank: int,
    exchanges: Iterable[tuple[Any, ...]] = (),
    *,
    host: str = "node-1",
    spans: Iterable[tuple[str, int, int]] = (),
    epochs: Iterable[tuple[int, int, int, int]] = (),
    steps: Iterable[tuple[int, int, int, int, int]] = (),
) -> RankTimeline:
    """A timeline by hand: exchanges as (pattern, number, peer, posted, entered, left, waited, late), the
    others as in the tables, epochs without phases."""
    rows = [(*row, 100) for row in exchanges]
    return RankTimeline(
        rank=rank,
        role="worker",
        host=host,
        kept="the last 64 steps",
        epochs=np.array([(*row, *[0] * len(PHASES)) for row in epochs], EPOCH),
        steps=np.array(list(steps), STEP),
        spans=np.array([(PHASES.index(name), start, end) for name, start, end in spans], SPAN),
        exchanges=np.array(rows, EXCHANGE),
    )


def test_throughput_between_steps_that_were_kept() -> None:
    """Where no step was kept the counter shows the mean of the epoch, not the last step's rate."""
    second = 10**9
    steps = [(1, 3, 2 * second, 3 * second, 30), (1, 4, 3 * second, 5 * second, 20)]
    mine = timeline(0, epochs=[(1, 0, 10 * second, 160)], steps=steps)
    found = [e for e in events(records.record(1), [mine]) if e.kind == "C" and e.name == "rank 0"]
    rates = sorted((event.start_ns // second, event.args["samples/s"]) for event in found)
    assert rates == [(0, 16.0), (2, 30.0), (3, 10.0), (5, 16.0), (10, 0.0)]


def arrows(timelines: list[RankTimeline], error_bound_ns: int = 0) -> list[tuple[int, int, int, int]]:
    """The arrows of a trace as (source rank, its time, target rank, its time), in ns, by source."""
    clock = Clock(error_bound_ns=error_bound_ns, violations=0)
    ends: dict[tuple[int, str], Event] = {
        (event.arrow, event.kind): event
        for event in events(records.record(len(timelines), clock=clock), timelines)
        if event.kind in "sf"
    }
    pairs = [(ends[number, "s"], ends[number, "f"]) for number, kind in ends if kind == "s"]
    return sorted((s.rank, s.start_ns - 1, f.rank, f.start_ns - 1) for s, f in pairs)


def test_arrows_from_the_late_rank() -> None:
    """Among all ranks arrows go from the late one, at its coming, to each that waited, where its waiting
    ends."""
    all_to_all = Pattern.ALL_TO_ALL
    assert arrows(
        [
            timeline(0, [(all_to_all, 7, -1, 100, 100, 900, 400, 2)]),
            timeline(1, [(all_to_all, 7, -1, 300, 300, 900, 200, 2)]),
            timeline(2, [(all_to_all, 7, -1, 500, 500, 900, 0, 2)]),
        ]
    ) == [(2, 500, 0, 500), (2, 500, 1, 500)]


def test_arrows_through_a_master() -> None:
    """A gathering has an arrow from each sender to the root, a broadcast from the root to each receiver,
    whoever waited."""
    gather, cast = Pattern.ALL_TO_ONE, Pattern.ONE_TO_ALL
    assert arrows(
        [
            timeline(0, [(gather, 1, 0, 100, 100, 900, 400, 2), (cast, 2, 0, 950, 950, 990, 0, 0)]),
            timeline(1, [(gather, 1, 0, 50, 50, 200, 50, 0), (cast, 2, 0, 960, 960, 990, 0, 1)]),
            timeline(2, [(gather, 1, 0, 500, 500, 700, 0, 2), (cast, 2, 0, 800, 800, 990, 150, 0)]),
        ]
    ) == [(0, 950, 1, 960), (0, 950, 2, 950), (1, 50, 0, 500), (2, 500, 0, 500)]


def test_messages_are_matched_by_their_number() -> None:
    """A message has an arrow from its send to its own receive, by source, destination and number."""
    send, receive = Pattern.SEND, Pattern.RECEIVE
    assert arrows(
        [
            timeline(0, [(send, 0, 1, 10, 10, 20, 0, 0), (send, 1, 1, 30, 30, 40, 0, 0)]),
            timeline(1, [(receive, 0, 0, 50, 50, 60, 0, 1), (receive, 1, 0, 60, 60, 70, 0, 1)]),
            timeline(2, [(send, 0, 1, 10, 10, 20, 0, 2), (receive, 0, 1, 10, 10, 20, 0, 2)]),
        ]
    ) == [(0, 10, 1, 50), (0, 30, 1, 60)]


def test_a_send_in_the_background_goes_out_where_it_was_started() -> None:
    """The arrow of a send in the background begins where it was posted, if that is in a step that was
    kept; else there is none, because there is no slice to hold on to."""
    sent = [(Pattern.SEND, 0, 1, 100, 500, 600, 0, 0)]
    received = timeline(1, [(Pattern.RECEIVE, 0, 0, 200, 200, 300, 0, 1)])
    assert arrows([timeline(0, sent, spans=[("transfer", 100, 110)]), received]) == [(0, 100, 1, 200)]
    assert arrows([timeline(0, sent), received]) == []


def test_clocks_of_two_hosts() -> None:
    """Where clocks disagree within their error bound an arrow still points forward, from the late rank's
    coming; beyond that there is none."""
    rows = [
        timeline(0, [(Pattern.ALL_TO_ALL, 7, -1, 100, 100, 900, 398, 1)], host="a"),
        timeline(1, [(Pattern.ALL_TO_ALL, 7, -1, 500, 500, 900, 0, 1)], host="b"),
    ]
    assert arrows(rows, error_bound_ns=1) == [(1, 500, 0, 500)]
    assert arrows(rows) == []


def test_times_are_in_microseconds(config: Make, train_in_threads: Train) -> None:
    """A trace has the format's microseconds, to the nanosecond."""
    _, folder, _ = train_in_threads(config())
    write_trace(folder.path, Path("trace.json"))
    rows = json.loads(Path("trace.json").read_bytes())["traceEvents"]
    times = [(row["ts"], row["dur"]) for row in rows if row["name"] == "epoch 1"]
    (epoch,) = read_timeline(folder.timeline_of(0)).epochs[:1]
    start_ns, end_ns = int(epoch["start_ns"]), int(epoch["end_ns"])
    assert times == [(start_ns / 1000, (end_ns - start_ns) / 1000)]


@pytest.fixture
def run(config: Make, train_in_threads: Train) -> RunFolder:
    """A run of three ranks."""
    _, folder, _ = train_in_threads(config(ranks=3, epochs=1))
    return folder


def test_what_is_missing_is_named(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A rank without a timeline, or with one that is cut short, is left out and named in one line; the
    others are in the trace."""
    run.timeline_of(1).unlink()
    damaged = run.timeline_of(2)
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert call("trace", str(run.path)) == 0
    out, err = capsys.readouterr()
    assert "1 rank," in out
    lines = err.splitlines()
    assert len(lines) == 2
    assert "no timeline of rank 1" in lines[0]
    assert "rank-0002.npz is damaged" in lines[1]
    assert list(view(Path("trace.json")).tracks.values()) == ["rank 0 master"]


def test_nothing_to_trace(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Without any timeline that can be read there is one line, code 2, and no file."""
    for rank in range(3):
        run.timeline_of(rank).write_bytes(b"no archive")
    for word in ("damaged", "no timeline"):
        assert call("trace", str(run.path)) == 2
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == 1
        assert word in err
        assert out == ""
        assert not Path("trace.json").exists()
        for rank in range(3):
            run.timeline_of(rank).unlink(missing_ok=True)


def test_no_run_and_no_place_to_write(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder without a run, and an output that cannot be written, are one line each, and code 2."""
    assert call("trace", "nowhere") == 2
    assert "no record.json" in capsys.readouterr().err
    assert call("trace", str(run.path), "--output", "nowhere/trace.json") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "nowhere/trace.json" in err
    assert "--output" in err
    assert not Path("nowhere").exists()
