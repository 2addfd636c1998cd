"""Timelines: few steps in full, totals of all epochs, bounded however long a run is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import TimelineError
from rankwise.ledger.phases import PHASES, Ledger
from rankwise.ledger.timeline import EXCHANGE, RECENT, SAMPLED, RankTimeline, Timeline, read_timeline

from . import effort
from .test_ledger import FakeClock


def play(steps: list[int], path: Path) -> tuple[RankTimeline, Ledger]:
    """Epochs of so many steps, each of which computes 70 ns, exchanges for 30, and is evaluated for 50."""
    clock = FakeClock(1_000)
    ledger = Ledger(clock, cpu_clock=lambda: 0)
    timeline = Timeline(ledger)
    for epoch, count in enumerate(steps, start=1):
        for _ in range(count):
            ledger.enter("forward")
            clock.now_ns += 70
            ledger.enter("transfer")
            clock.now_ns += 30
            ledger.enter("other")
            row = np.zeros(1, EXCHANGE)
            row["entered_ns"], row["left_ns"] = clock.now_ns - 30, clock.now_ns
            timeline.add_exchanges(row)
            timeline.step(epoch, 8)
        ledger.enter("evaluation")
        clock.now_ns += 50
        timeline.epoch(epoch)
    timeline.save(path, rank=3, role="worker", host="here", to_common=lambda times: times - 1_000)
    return read_timeline(path), ledger


@effort.examples(15, 100)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=5))
def test_totals_of_all_epochs_and_a_bounded_number_of_steps(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    """However long the run, every epoch's totals are there and add up, and at most RECENT + SAMPLED steps,
    each with all its spans, of which the last RECENT are all there."""
    found, ledger = play(steps, tmp_path_factory.mktemp("run") / "t.npz")
    assert (found.rank, found.role, found.host) == (3, "worker", "here")
    assert found.epochs["epoch"].tolist() == list(range(1, len(steps) + 1))
    assert found.epochs["samples"].tolist() == [8 * count for count in steps]
    totals = ledger.close()
    for phase in PHASES:
        assert found.epochs[phase].sum() == totals.phases_ns[phase]
    lengths = found.epochs["end_ns"] - found.epochs["start_ns"]
    assert lengths.tolist() == [sum(row[phase] for phase in PHASES) for row in found.epochs]

    everything = [(e, s) for e, count in enumerate(steps, 1) for s in [*range(1, count + 1), 0]]
    kept = [(int(row["epoch"]), int(row["step"])) for row in found.steps]
    assert len(kept) <= RECENT + SAMPLED
    assert kept[-RECENT:] == everything[-RECENT:]
    assert [name for name in everything if name in set(kept)] == kept
    if len(everything) <= RECENT + SAMPLED:
        assert kept == everything
    for row in found.steps:
        inside = (found.spans["start_ns"] >= row["start_ns"]) & (found.spans["end_ns"] <= row["end_ns"])
        spans = found.spans[inside]
        assert (spans["end_ns"] - spans["start_ns"]).sum() == row["end_ns"] - row["start_ns"]
    trained = sum(step > 0 for _, step in kept)
    assert len(found.exchanges) == trained
    assert set(found.exchanges["left_ns"]) <= set(found.steps["end_ns"])


def test_sampled_steps_are_evenly_spread(tmp_path: Path) -> None:
    """Of a long run the sampled steps are equally far apart, and the file says how far."""
    found, _ = play([6_000], tmp_path / "t.npz")
    sampled = found.steps["step"][:-RECENT]
    assert len(sampled) > SAMPLED // 2
    assert len(set(np.diff(sampled))) == 1
    assert found.kept == f"the last {RECENT} steps, and every {np.diff(sampled)[0]}th step before"
    assert (tmp_path / "t.npz").stat().st_size < 100_000


@pytest.mark.parametrize("damage", ["missing", "cut", "text", "other", "empty"])
def test_what_cannot_be_read_is_told_in_one_line(tmp_path: Path, damage: str) -> None:
    """A timeline that is missing, cut short or something else is named in one line."""
    path = tmp_path / "rank-0000.npz"
    play([5], path)
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "other":
        np.savez(path, about=np.array("{}"), epochs=0, steps=0, spans=0, exchanges=0)
    else:
        path.write_bytes(b"")
    with pytest.raises(TimelineError) as error:
        read_timeline(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
