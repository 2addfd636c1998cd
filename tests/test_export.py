"""Exports, each opened by the reader for which it is made."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import resource
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import otf2
import pytest

from rankwise.config import TrainConfig
from rankwise.export import FORMATS, export
from rankwise.export.formats import Format
from rankwise.export.otf2_archive import nested, walk, write_otf2
from rankwise.export.run_content import RunContent, read_run
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline, read_timeline
from rankwise.ledger.waits import Pattern
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Efficiency, Evaluated, Record, Target
from rankwise.training.accounting import efficiency

from . import records
from .readers import ask, find_or_install
from .test_cli import call
from .test_trace import timeline

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]

pytestmark = [
    pytest.mark.timeout(700),  # the first test may have to install the readers
    pytest.mark.xdist_group("readers"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def readers() -> Path:
    """The folder of readers."""
    found = find_or_install()
    if not found:
        pytest.skip("Extra-P, talp-pages and mlperf-logging are not here, and pip cannot install them")
    return found


def timed(count: int, *, wall_s: float = 2.0) -> list[Evaluated]:
    """Epochs that say when they ended: launched 3 s before the first one, each with 0.25 s of evaluation."""
    return [
        Evaluated(**dict(row) | {"evaluation_s": 0.25, "since_launch_s": 3 + number * wall_s})
        for number, row in enumerate(records.epochs(count, wall_s=wall_s), start=1)
    ]


LAUNCHED_AT = "2026-11-22T16:18:00.500+00:00"


def made(name: str, ranks: int | Sequence[Any] = 3, *, steps: int = 4, **more: Any) -> RunFolder:
    """A run folder by hand, with timelines of some steps."""
    more = {"launched_at": LAUNCHED_AT, "epochs": timed(3)} | more
    if isinstance(ranks, int):
        work = records.WORK_S | {"checkpoint": 1.0}  # the timelines have some
        ranks = [records.rank(number, phases_s=work) for number in range(ranks)]
    return records.run_folder(Path(name), records.record(ranks, **more), steps=steps)


def written(format: str, *names: str) -> Path:
    """What the command line writes of some runs."""
    output = Path(f"out.{format}")
    assert call("export", *names, "--format", format, "--output", str(output)) == 0
    return output


# TALP


TALP_PAGES = """
import json, sys
from pathlib import Path
from talp_pages.analysis.scaling_analysis import ScalingAnalysis, ScalingAnalysisArguments
from talp_pages.io.dataframe_handling import load_talp_json_df
from talp_pages.io.run_folders import get_run_folders
if Path(sys.argv[1]).is_file():
    print(json.dumps(load_talp_json_df(Path(sys.argv[1])).to_dict("records"), default=str))
else:
    (folder,) = get_run_folders(Path(sys.argv[1]))
    (found,) = ScalingAnalysis(ScalingAnalysisArguments(folder)).get_results(["Global"])
    columns = ["totalNumMpiRanks", "parallelEfficiency", "speedup"]
    print(json.dumps([frame.iloc[0][columns].astype(float).to_list() for frame in found.dataframe_list]))
"""


def test_efficiencies_in_talp_pages(readers: Path) -> None:
    """TALP's pages read the efficiencies of the ledger: parallel, load balance, and communication, which is
    serialization times transfer; load balance is that in the nodes times that between them. Their product is
    useful time over elapsed time, by the times in the same file."""
    work = dict(records.WORK_S)
    rows = [
        records.rank(0, host="a", ideal_ns=15 * 10**9),
        records.rank(1, host="a", phases_s=work | {"forward": 6.0}, ideal_ns=15 * 10**9),
        records.rank(
            2, host="b", phases_s=work | {"evaluation": 1.0}, wait_on_s={1: 6.0}, ideal_ns=15 * 10**9
        ),
        records.rank(3, host="b", role="spare", phases_s={"startup": 1.0, "other": 30.0}),
    ]
    ours = efficiency(rows)
    made("run", rows, efficiency=ours)
    (found,) = ask(readers, TALP_PAGES, written("talp", "run"))
    assert found["parallelEfficiency"] == pytest.approx(ours.parallel, rel=1e-12)
    assert found["mpiParallelEfficiency"] == pytest.approx(ours.parallel, rel=1e-12)
    assert found["mpiLoadBalance"] == pytest.approx(ours.load_balance, rel=1e-12)
    assert ours.serialization is not None
    assert ours.transfer is not None
    communication = ours.serialization * ours.transfer
    assert found["mpiCommunicationEfficiency"] == pytest.approx(communication, rel=1e-12)
    in_and_out = found["mpiLoadBalanceIn"] * found["mpiLoadBalanceOut"]
    assert in_and_out == pytest.approx(ours.load_balance, rel=1e-12)
    assert found["mpiLoadBalanceOut"] == pytest.approx((10 + 12 + 11) / 3 / 11, rel=1e-12)
    by_time = found["usefulTime"] / (found["elapsedTime"] * 1e9 * found["totalNumMpiRanks"])
    assert by_time == pytest.approx(ours.parallel, rel=1e-12)
    assert (found["executionMode"], found["totalNumCpus"], found["numNodes"]) == ("MPI", 3, 2)


def test_scaling_in_talp_pages(readers: Path) -> None:
    """Several runs are a folder, which TALP's pages take for one study over numbers of ranks."""
    for ranks, seconds in ((1, 8.0), (2, 4.0), (4, 3.0)):
        rows = [
            records.rank(number, phases_s={"startup": 1, "forward": seconds}, ideal_ns=round(seconds * 1e9))
            for number in range(ranks)
        ]
        made(f"run {ranks}", rows, efficiency=Efficiency(parallel=1 / ranks, load_balance=1.0))
    found = ask(readers, TALP_PAGES, written("talp", "run 4", "run 1", "run 2"))
    assert found == [[1, 1.0, 1.0], [2, 0.5, 2.0], [4, 0.25, pytest.approx(8 / 3)]]


# Extra-P


EXTRAP = """
import json, sys
from extrap.fileio.file_reader.json_file_reader import JsonFileReader
from extrap.modelers.model_generator import ModelGenerator
found = JsonFileReader().read_experiment(sys.argv[1])
models = ModelGenerator(found)
models.model_all()
at = [float(word) for word in sys.argv[2:]]
print(json.dumps({
    path.name: {
        "points": {
            int(one.coordinate[0]): [one.mean, one.repetitions] for one in found.measurements[path, metric]
        },
        "predicted": [float(model.hypothesis.function.evaluate(value)) for value in at],
    }
    for (path, metric), model in models.models.items()
}))
"""


def test_extrap_finds_the_model(readers: Path) -> None:
    """Extra-P finds by itself what was put in, an epoch of 1 + 2 log2(ranks) s, and predicts another number
    of ranks from it. It takes all epochs of all runs on one number of ranks for repetitions."""
    for ranks in (1, 2, 4, 8, 16):
        several = {"strategy": "single", "topology": None} if ranks == 1 else {}
        epochs = timed(3, wall_s=1 + 2 * math.log2(ranks))
        made(f"run-{ranks}", ranks, epochs=epochs, config=several)
    made("again", 4, epochs=timed(2, wall_s=5.0))
    runs = [f"run-{ranks}" for ranks in (16, 1, 2, 4, 8)]
    found = ask(readers, EXTRAP, written("extrap", *runs, "again"), "64")
    assert found["epoch"]["points"] == {
        str(ranks): [pytest.approx(1 + 2 * math.log2(ranks)), 5 if ranks == 4 else 3]
        for ranks in (1, 2, 4, 8, 16)
    }
    assert found["epoch"]["predicted"] == [pytest.approx(13.0, rel=0.01)]


def test_phases_in_extrap(readers: Path) -> None:
    """Each phase that occurs in one of the runs is there for all, with the mean over a run's ranks: Extra-P
    takes no file in which one is missing somewhere."""
    for ranks in (1, 2, 3, 4, 5):
        made(f"run-{ranks}", ranks, steps=6, config={} if ranks > 1 else {"topology": None})
    found = ask(readers, EXTRAP, written("extrap", *[f"run-{n}" for n in (1, 2, 3, 4, 5)]))
    phases = {name.removeprefix("epoch->") for name in found if name != "epoch"}
    assert phases == {"data", "forward", "transfer", "checkpoint"}
    assert all(len(one["points"]) == 5 for one in found.values())
    assert found["epoch->data"]["points"]["3"][0] == pytest.approx(6e-3)
    forward = [sum(records.compute_ms(rank, step) for step in range(1, 7)) for rank in range(3)]
    assert found["epoch->forward"]["points"]["3"][0] == pytest.approx(sum(forward) / 3 / 1e3)


# mlperf-logging


MLPERF = """
import json, logging, sys
from mlperf_logging.compliance_checker import mlp_compliance, mlp_parser
lines, errors = mlp_parser.parse_file(sys.argv[1], ruleset=sys.argv[2])
checker = mlp_compliance.make_checker("training", sys.argv[2], False, True)
checker.check_loglines(lines, f"training_{sys.argv[2]}/common.yaml")
print(json.dumps({
    "lines": [[line.timestamp, line.key, line.value["value"], line.value["metadata"]] for line in lines],
    "errors": errors,
    "complaints": [*checker.warnings.values(), *checker.overwritable.values(), *checker.not_overwritable],
}))
"""


def test_lines_of_mlperf(readers: Path) -> None:
    """MLPerf's parser takes each line, and its checker of two rounds of rules has nothing to say but that two
    things are missing which only its own benchmarks have; times and results are the record's."""
    made("run", target=Target(accuracy=0.7, reached=True, epoch=3))
    path = written("mlperf", "run")
    for rules in ("6.1.0", "5.1.0"):
        found = ask(readers, MLPERF, path, rules)
        assert found["errors"] == []
        said = sorted(line.partition("occurrence of ")[2] for line in found["complaints"])
        assert said == ["'eval_samples' but found 0", "'submission_benchmark' but found 0"]
    times = defaultdict(list)
    for ms, key, value, metadata in found["lines"]:
        times[key].append((round(ms - found["lines"][0][0]), value, metadata.get("epoch_num")))
    assert [ms for ms, _, _ in times["eval_stop"]] == [5000, 7000, 9000]
    assert [ms for ms, _, _ in times["eval_start"]] == [4750, 6750, 8750]
    assert [(ms, epoch) for ms, _, epoch in times["epoch_start"]] == [(3250, 1), (5250, 2), (7250, 3)]
    accuracies = [(value, epoch) for _, value, epoch in times["eval_accuracy"]]
    assert accuracies == [(row.val_accuracy, row.epoch) for row in timed(3)]
    assert times["init_stop"][0][0] == times["run_start"][0][0] == 3250
    assert [line[0] for line in found["lines"]] == sorted(line[0] for line in found["lines"])
    assert found["lines"][-1][3]["status"] == "success"


@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({}, "success"),
        ({"outcome": "interrupted"}, "aborted"),
        ({"target": Target(accuracy=0.99, reached=False)}, "aborted"),
    ],
    ids=["completed", "interrupted", "target missed"],
)
def test_how_a_run_ended_in_mlperf(more: dict[str, Any], status: str) -> None:
    """A run that was interrupted, or missed its target, is no success in MLPerf's lines."""
    made("run", **more)
    last = written("mlperf", "run").read_text().splitlines()[-1]
    line = json.loads(last.removeprefix(":::MLLOG "))
    assert (line["key"], line["metadata"]["status"]) == ("run_stop", status)


# csv


def rows_of(path: Path) -> list[dict[str, str]]:
    """A table as a reader of CSV has it."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def ns_of(seconds: str) -> int:
    """Seconds of the table in ns, none of which is rounded away."""
    whole, _, decimals = seconds.partition(".")
    assert len(decimals) == 9
    return int(whole + decimals)


def test_table_adds_up(config: Make, train_in_threads: Train) -> None:
    """The seconds of each rank add up to its wall time to the nanosecond, and those of an epoch are the
    timeline's; what belongs to no epoch stands under 0."""
    record, folder, _ = train_in_threads(config(ranks=3))
    table = rows_of(written("csv", str(folder.path)))
    walls: Counter[str] = Counter()
    epochs: Counter[tuple[int, int, str]] = Counter()
    for row in table:
        walls[row["rank"]] += ns_of(row["seconds"])
        epochs[int(row["rank"]), int(row["epoch"]), row["phase"]] += ns_of(row["seconds"])
    assert walls == {str(row.rank): row.wall_ns for row in record.ranks}
    assert {epoch for _, epoch, _ in epochs} == {0, 1, 2}
    for rank in range(3):
        for epoch in read_timeline(folder.timeline_of(rank)).epochs:
            ours = {phase: epochs[rank, int(epoch["epoch"]), phase] for phase in PHASES}
            assert ours == {phase: int(epoch[phase]) for phase in PHASES}
        assert epochs[rank, 0, "startup"] > 0


def test_table_without_timelines(capsys: pytest.CaptureFixture[str]) -> None:
    """A rank without a timeline has its phases all the same, with an empty epoch, and a line says so; runs
    are told apart by their paths."""
    made("a", 1, steps=0)
    made("b", 2)
    table = rows_of(written("csv", "a", "b"))
    assert {row["epoch"] for row in table if row["run"] == "a"} == {""}
    assert {row["epoch"] for row in table if row["run"] == "b"} == {"0", "1"}
    assert sum(ns_of(row["seconds"]) for row in table if row["run"] == "a") == 15_250_000_000
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if "empty epoch" in line and "rank 0" in line]


# OTF2


def read_otf2(path: Path) -> SimpleNamespace:
    """An archive as its own reader gives it: definitions, and events in the order of all ranks."""
    with otf2.reader.open(str(path / "traces.otf2")) as trace:
        events = list(trace.events)
        clock = trace.definitions.clock_properties
        locations = list(trace.definitions.locations)
        return SimpleNamespace(
            events=[(location.name, event) for location, event in events],
            clock=(clock.timer_resolution, clock.global_offset, clock.realtime_timestamp),
            locations=[(one.name, one.group.system_tree_parent.name) for one in locations],
            regions={one.name: one.region_role for one in trace.definitions.regions},
            communicators={
                one.name: [member.name for member in one.group.members] for one in trace.definitions.comms
            },
        )


def slices(found: SimpleNamespace) -> list[tuple[str, str, int, int, dict[str, int]]]:
    """Regions as a viewer shows them: location, name, begin, end, numbers. Fails where they do not nest."""
    around: dict[str, list[Any]] = defaultdict(list)
    ready = []
    for location, event in found.events:
        if isinstance(event, otf2.events.Enter):
            around[location].append(event)
        elif isinstance(event, otf2.events.Leave):
            begun = around[location].pop()
            assert begun.region.name == event.region.name
            numbers = {key.name: value for key, value in (begun.attributes or {}).items()}
            ready.append((location, event.region.name, begun.time, event.time, numbers))
    assert not any(around.values())
    return ready


def of_kind(found: SimpleNamespace, kind: type) -> list[tuple[str, Any]]:
    """Events of one kind."""
    return [(location, event) for location, event in found.events if isinstance(event, kind)]


def content(*timelines: RankTimeline, hosts: Sequence[str] = (), **more: Any) -> RunContent:
    """A run of timelines by hand."""
    rows = [
        records.rank(line.rank, host=hosts[place] if hosts else "node-1")
        for place, line in enumerate(timelines)
    ]
    return RunContent("run", records.record(rows, **more), timelines, ())


def archive(*timelines: RankTimeline, **more: Any) -> SimpleNamespace:
    """An archive of timelines by hand, as it is read again."""
    write_otf2([content(*timelines, **more)], Path("archive"))
    return read_otf2(Path("archive"))


@pytest.mark.parametrize(
    "team",
    [
        {"topology": "master", "sync_every": 8},
        {"strategy": "allreduce"},
        {"strategy": "gossip"},
        {"strategy": "easgd"},
    ],
    ids=lambda team: team.get("strategy", "averaging"),
)
def test_a_run_in_otf2(team: dict[str, Any], config: Make, train_in_threads: Train) -> None:
    """Each rank is a location on its host. Its epochs, steps, phases and exchanges have the times of its
    timeline to the nanosecond, the clock ticks in ns from the run's start, and the reader gives the events
    of all ranks in one order of time, a message's sending before its receiving."""
    record, folder, _ = train_in_threads(config(ranks=3, epochs=1, **team))
    found = read_otf2(written("otf2", str(folder.path)))
    lines = [read_timeline(folder.timeline_of(rank)) for rank in range(3)]
    names = {line.rank: f"rank {line.rank} {line.role}" for line in lines}
    assert found.locations == [(names[row.rank], row.host) for row in record.ranks]
    drawn = [one[:4] for one in slices(found)]
    ours: Counter[tuple[Any, ...]] = Counter()
    for line in lines:
        times = lambda row: (int(row["start_ns"]), int(row["end_ns"]))  # noqa: E731
        ours.update((names[line.rank], "epoch", *times(row)) for row in line.epochs)
        kinds = ("end of epoch", "step")
        ours.update((names[line.rank], kinds[int(row["step"] > 0)], *times(row)) for row in line.steps)
        entered = {int(row["entered_ns"]) for row in line.exchanges}
        ours.update(
            (names[line.rank], PHASES[row["phase"]], *times(row))
            for row in line.spans
            if row["start_ns"] < row["end_ns"] and row["start_ns"] not in entered
        )
        for row in line.exchanges:
            came, late, left = (int(row["entered_ns"]), int(row["wait_ns"]), int(row["left_ns"]))
            name = ("all to all", "all to one", "one to all", "send", "receive")[row["pattern"]]
            ours[names[line.rank], name, came, left] += 1
            ours.update([(names[line.rank], "wait", came, came + late)] if late else [])
            ours.update([(names[line.rank], "transfer", came + late, left)] if came + late < left else [])
    assert Counter(drawn) == ours
    times_ns = [event.time for _, event in found.events]
    assert times_ns == sorted(times_ns)
    first_ns = min(int(line.epochs["start_ns"].min()) for line in lines)
    assert found.clock[:2] == (10**9, first_ns)
    started_ns = 10**9 * round(read_started(record))
    assert found.clock[2] == pytest.approx(started_ns + first_ns, abs=1000)

    messages(found, lines)


def messages(found: SimpleNamespace, lines: list[RankTimeline]) -> None:
    """Each message of the timelines is there with both ends, the sending first."""
    sent: Counter[tuple[str, int]] = Counter()
    kinds = otf2.events
    for location, event in found.events:
        rank = int(location.split()[1])
        if isinstance(event, (kinds.MpiSend, kinds.MpiIsend)):
            sent[rank, event.receiver] += 1
        elif isinstance(event, (kinds.MpiRecv, kinds.MpiIrecv)):
            sent[event.sender, rank] -= 1
        assert min(sent.values(), default=0) >= 0
    assert not any(sent.values())
    begun = of_kind(found, kinds.MpiSend) + of_kind(found, kinds.MpiIsend)
    assert len(begun) == sum(int((line.exchanges["pattern"] == Pattern.SEND).sum()) for line in lines)
    for start, end in (
        (kinds.MpiIsend, kinds.MpiIsendComplete),
        (kinds.MpiIrecvRequest, kinds.MpiIrecv),
        (kinds.MpiCollectiveBegin, kinds.MpiCollectiveEnd),
        (kinds.NonBlockingCollectiveRequest, kinds.NonBlockingCollectiveComplete),
    ):
        assert len(of_kind(found, start)) == len(of_kind(found, end))
    together = of_kind(found, kinds.MpiCollectiveEnd)
    together += of_kind(found, kinds.NonBlockingCollectiveComplete)
    parts = sum(int((line.exchanges["pattern"] <= Pattern.ONE_TO_ALL).sum()) for line in lines)
    assert len(together) == parts
    assert begun or together


def read_started(record: Record) -> float:
    """When a run started, in seconds since 1970, by another way than the exporter's."""
    import calendar
    import time

    return calendar.timegm(time.strptime(record.started_at[:19], "%Y-%m-%dT%H:%M:%S"))


def test_messages_in_otf2() -> None:
    """A message is a send and a receive that name each other's place, with its bytes; in the background
    it is posted where it was started and completed where it was waited for. A message of which one end is
    not in the timelines is a region alone."""
    send, receive = Pattern.SEND, Pattern.RECEIVE
    found = archive(
        timeline(
            2,
            [(send, 0, 4, 10, 10, 20, 0, 2), (send, 1, 4, 25, 30, 40, 0, 2), (send, 0, 9, 50, 50, 60, 0, 2)],
        ),
        timeline(4, [(receive, 0, 2, 5, 5, 22, 5, 2), (receive, 1, 2, 24, 35, 50, 0, 4)]),
        hosts=("a", "b"),
    )
    assert found.locations == [("rank 2 worker", "a"), ("rank 4 worker", "b")]
    assert [(at, e.time, e.receiver, e.msg_length) for at, e in of_kind(found, otf2.events.MpiSend)] == [
        ("rank 2 worker", 10, 1, 100)
    ]
    assert [(at, e.time, e.sender, e.msg_length) for at, e in of_kind(found, otf2.events.MpiRecv)] == [
        ("rank 4 worker", 22, 0, 100)
    ]
    begun, done = of_kind(found, otf2.events.MpiIsend), of_kind(found, otf2.events.MpiIsendComplete)
    asked, came = of_kind(found, otf2.events.MpiIrecvRequest), of_kind(found, otf2.events.MpiIrecv)
    assert [event.time for _, event in (*begun, *done, *asked, *came)] == [25, 40, 24, 50]
    assert len({event.request_id for _, event in (*begun, *done)}) == 1
    assert len({event.request_id for _, event in (*asked, *came)}) == 1
    numbers = [event.request_id for _, event in (*begun, *asked)]
    assert len(set(numbers)) == len(numbers)  # a rank may send to itself
    drawn = [one[1:4] for one in slices(found)]
    assert drawn.count(("send", 50, 60)) == 1
    assert ("wait", 5, 10) in drawn
    assert ("transfer", 10, 22) in drawn


def test_collectives_in_otf2() -> None:
    """A collective has the ranks of its parts as communicator, its root by the place in it, and what each
    rank sent and received. What it waited for stands at its beginning."""
    every, gather, cast = Pattern.ALL_TO_ALL, Pattern.ALL_TO_ONE, Pattern.ONE_TO_ALL
    found = archive(
        timeline(0, [(every, 1, -1, 10, 10, 30, 10, 2), (gather, 2, 2, 40, 40, 50, 0, 0)]),
        timeline(1, [(every, 1, -1, 15, 15, 30, 5, 2), (cast, 3, 2, 55, 60, 90, 10, 2)]),
        timeline(
            2,
            [
                (every, 1, -1, 20, 20, 30, 0, 2),
                (gather, 2, 2, 35, 35, 55, 5, 0),
                (cast, 3, 2, 70, 70, 90, 0, 2),
                (every, 4, -1, 95, 95, 99, 0, 2),
            ],
        ),
    )
    assert found.communicators == {
        "all ranks": ["rank 0 worker", "rank 1 worker", "rank 2 worker"],
        "ranks 0, 2": ["rank 0 worker", "rank 2 worker"],
        "ranks 1, 2": ["rank 1 worker", "rank 2 worker"],
    }
    ends = [
        (at[5], event.time, event.communicator.name, event.root, event.size_sent, event.size_received)
        for at, event in of_kind(found, otf2.events.MpiCollectiveEnd)
    ]
    nowhere = otf2.enums.Undefined.UINT32.value
    assert sorted(ends) == [
        ("0", 30, "all ranks", nowhere, 100, 100),
        ("0", 50, "ranks 0, 2", 1, 100, 0),
        ("1", 30, "all ranks", nowhere, 100, 100),
        ("2", 30, "all ranks", nowhere, 100, 100),
        ("2", 55, "ranks 0, 2", 1, 0, 100),
        ("2", 90, "ranks 1, 2", 1, 100, 0),
    ]
    ((_, posted),) = of_kind(found, otf2.events.NonBlockingCollectiveRequest)
    ((_, done),) = of_kind(found, otf2.events.NonBlockingCollectiveComplete)
    assert (posted.time, done.time, done.root, done.size_received) == (55, 90, 1, 100)
    drawn = {one[:4]: one[4] for one in slices(found)}
    assert drawn["rank 0 worker", "wait", 10, 20] == {"waited for rank": 2}
    assert ("rank 2 worker", "all to all", 95, 99) in drawn
    assert found.regions["all to all"] == otf2.enums.RegionRole.COLL_ALL2ALL


def test_numbers_that_begin_again() -> None:
    """After a rank was lost exchanges are numbered from 0 again: those with one number are told apart."""
    every = Pattern.ALL_TO_ALL
    rows = [(every, 0, -1, 10, 10, 20, 0, 0), (every, 0, -1, 110, 110, 120, 0, 0)]
    run = content(*(timeline(rank, rows) for rank in range(2)))
    assert [[part.left_ns for part in one.parts] for one in run.collectives] == [[20, 20], [120, 120]]


def test_what_does_not_nest_is_left_out() -> None:
    """A region that ends behind the one in which it begins is left out, and a line says so; what touches at
    a border is not."""
    line = timeline(
        0,
        [(Pattern.ALL_TO_ALL, 1, -1, 15, 15, 25, 0, 0)],
        epochs=[(1, 0, 20, 5)],
        steps=[(1, 1, 0, 10, 5), (1, 0, 10, 20, 0)],
        spans=[("data", 0, 10), ("forward", 10, 15), ("other", 20, 20)],
    )
    run = content(line)
    kept = nested(run.regions)
    assert [(one.name, one.start_ns, one.end_ns) for one in kept] == [
        ("epoch", 0, 20),
        ("step", 0, 10),
        ("data", 0, 10),
        ("end of epoch", 10, 20),
        ("forward", 10, 15),
    ]
    times = [region.start_ns if enters else region.end_ns for enters, region in walk(kept)]
    assert times == sorted(times)
    assert write_otf2([run], Path("archive")) == ["2 regions of rank 0 do not nest: they are left out"]
    assert len(slices(read_otf2(Path("archive")))) == 5


def test_a_message_of_which_an_end_is_left_out() -> None:
    """The other end of an exchange that does not nest is a region alone, as if that were not there."""
    cut = [(Pattern.RECEIVE, 0, 0, 15, 15, 25, 0, 0), (Pattern.ALL_TO_ALL, 1, -1, 16, 16, 26, 0, 0)]
    whole = [(Pattern.SEND, 0, 1, 15, 15, 16, 0, 0), (Pattern.ALL_TO_ALL, 1, -1, 16, 16, 26, 0, 0)]
    found = archive(timeline(0, whole), timeline(1, cut, epochs=[(1, 0, 20, 5)]))
    assert {one[:2] for one in slices(found)} >= {("rank 0 worker", "send"), ("rank 0 worker", "all to all")}
    assert not of_kind(found, otf2.events.MpiSend) + of_kind(found, otf2.events.MpiCollectiveEnd)


def test_timelines_that_are_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """A rank without a timeline is a location without events, and is named; formats that show no timeline
    say nothing of it."""
    folder = made("run")
    folder.timeline_of(1).unlink()
    folder.timeline_of(2).write_bytes(folder.timeline_of(2).read_bytes()[:500])
    found = read_otf2(written("otf2", "run"))
    assert [name for name, _ in found.locations] == [f"rank {rank} worker" for rank in range(3)]
    assert {at for at, _ in found.events} == {"rank 0 worker"}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "damaged" in lines[0]
    assert "no timeline of rank 1" in lines[1]
    written("talp", "run")
    assert capsys.readouterr().err == ""


# Bad input


@pytest.fixture
def runs() -> Iterator[None]:
    """Runs that lack something."""
    made("good")
    made("without-timelines", steps=0)
    made("two", 2)
    made("other-model", 2, config={"model": "mlp"})
    made("untrained", 2, epochs=[], efficiency=Efficiency())
    made("old", epochs=records.epochs(2))
    yield
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]


BAD_INPUT = [
    (["good", "--format", "otf3", "--output", "new"], ["otf3", "otf2", "talp"]),
    (["good", "--format", "csv"], ["--output"]),
    (["good", "--output", "new"], ["--format"]),
    (["--format", "csv", "--output", "new"], ["RUNS"]),
    (["nowhere", "--format", "csv", "--output", "new"], ["nowhere", "record.json"]),
    (["good", "--format", "csv", "--output", "two"], ["two", "already", "--output"]),
    (["good", "--format", "csv", "--output", "no/new"], ["no/new", "--output"]),
    (["good", "two", "--format", "otf2", "--output", "new"], ["otf2", "one run", "2"]),
    (["good", "two", "--format", "mlperf", "--output", "new"], ["mlperf", "one run", "2"]),
    (["good", "./good", "--format", "csv", "--output", "new"], ["good", "more than once"]),
    (["good", "--format", "extrap", "--output", "new"], ["extrap", "numbers of ranks", "3", "two or more"]),
    (["good", "old", "--format", "extrap", "--output", "new"], ["extrap", "numbers of ranks", "3"]),
    (["good", "other-model", "--format", "extrap", "--output", "new"], ["model", "mlp", "other-model"]),
    (["good", "untrained", "--format", "extrap", "--output", "new"], ["untrained", "epoch"]),
    (["without-timelines", "--format", "otf2", "--output", "new"], ["without-timelines", "timeline"]),
    (["untrained", "--format", "talp", "--output", "new"], ["untrained", "efficiencies"]),
    (["untrained", "--format", "mlperf", "--output", "new"], ["untrained", "epoch"]),
    (["old", "--format", "mlperf", "--output", "new"], ["old", "when"]),
]


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("words", "expected"), BAD_INPUT, ids=lambda value: " ".join(value)[-60:])
def test_bad_input(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be exported is one line that says what to do, and code 2; nothing is written."""
    before = sorted(Path.cwd().rglob("*"))
    assert call("export", *words) == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    assert err.startswith("rankwise: ")
    assert all(word in err for word in expected), err
    assert out == ""
    assert sorted(Path.cwd().rglob("*")) == before


def test_a_package_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without its package one line says what to install, before anything is written; other formats need
    none."""
    made("run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert call("export", "run", "--format", "otf2", "--output", "new") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "pip install 'rankwise[export]'" in err
    assert not Path("new").exists()
    assert call("export", "run", "--format", "csv", "--output", "new") == 0


@pytest.mark.parametrize(
    ("format", "more"),
    [
        ("mlperf", {"launched_at": "yesterday"}),
        ("talp", {"efficiency": Efficiency(parallel=0.5, load_balance=0.0)}),
        ("otf2", {"started_at": "2026-13-45"}),
    ],
    ids=["no time", "division by 0", "no date"],
)
def test_values_that_cannot_be_right(
    format: str, more: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """A value in a record that no run could have is one line that names the run, and nothing is written."""
    made("run", **more)
    before = sorted(Path.cwd().rglob("*"))
    assert call("export", "run", "--format", format, "--output", "new") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert err.startswith("rankwise: run: a value in the record cannot be right")
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
def test_a_full_disk_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_folder: bool
) -> None:
    """If the disk is full in the middle, one line says so, and nothing is left of what was written."""
    made("run")
    before = sorted(Path.cwd().rglob("*"))

    def full(runs: Sequence[RunContent], path: Path) -> list[str]:
        if is_folder:
            path.mkdir()
            path /= "part"
        path.write_text("half of it")
        raise OSError(28, os.strerror(28))

    monkeypatch.setitem(FORMATS, "csv", Format(full, several=True, reader="none"))
    assert call("export", "run", "--format", "csv", "--output", "new") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert "No space left" in err
    assert sorted(Path.cwd().rglob("*")) == before


def test_an_archive_that_is_cut_short(capfd: pytest.CaptureFixture[str]) -> None:
    """OTF2's library closes an archive without an error though the disk was full, so what it wrote is read
    again: an archive that lacks events is one line of ours, and code 2, and nothing is left of it."""
    made("run", steps=60)
    before = sorted(Path.cwd().rglob("*"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))  # for each file
    try:
        code = call("export", "run", "--format", "otf2", "--output", "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("[OTF2] ")]
    assert len(lines) == 1
    assert "is the disk full?" in lines[0]
    assert sorted(Path.cwd().rglob("*")) == before


def test_what_is_given_to_python() -> None:
    """From Python a list of folders is written as from the command line, and what it says comes back."""
    made("run")
    told = export([Path("run")], "csv", Path("table.csv"))
    assert told.about.startswith("table.csv: 1 run")
    assert told.remarks == []
    assert read_run(Path("run")).name == "run"
