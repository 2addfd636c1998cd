"""What a person sees of a run, read from its folder."""

from __future__ import annotations

import io
import json
import math
import os
import time
from pathlib import Path

import pytest
from rich.console import Console

from rankwise.ledger.phases import PHASES
from rankwise.report.live import Display
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile, read_progress
from rankwise.survival.beats import Beat, Beats, clock_number, slow_ranks
from rankwise.system import machine
from rankwise.system.activity import RUNNING


def row(epoch: int) -> str:
    return json.dumps(
        {
            "epoch": epoch,
            "train_loss": 1.5,
            "val_loss": 1.25,
            "val_accuracy": 0.5,
            "train_samples": 100,
            "train_s": 2.0,
            "wall_s": 2.5,
        }
    )


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def display(folder: RunFolder, epochs_done: int = 0) -> tuple[Display, io.StringIO]:
    screen = io.StringIO()
    console = Console(file=screen, width=120)
    shown = Display(folder, console, epochs=9, samples_per_epoch=100, live=False, epochs_done=epochs_done)
    return shown, screen


def test_one_line_an_epoch(folder: RunFolder) -> None:
    """Each epoch is one line, shown once, and not before it is written whole."""
    shown, screen = display(folder)
    shown._poll()
    folder.metrics.write_text(row(1) + "\n" + row(2)[:30])
    shown._poll()
    assert screen.getvalue().count("epoch") == 1
    folder.metrics.write_text(row(1) + "\n" + row(2) + "\n")
    shown._poll()
    shown._poll()
    lines = screen.getvalue().splitlines()
    assert [line[:9] for line in lines] == ["epoch 1/9", "epoch 2/9"]
    assert "train loss 1.5000  val loss 1.2500  accuracy 50.00%  2.5 s  50 samples/s" in lines[0]


def test_a_resumed_run_shows_what_is_trained_again(folder: RunFolder) -> None:
    """A run that goes on from an earlier checkpoint shows the epochs that it trains anew, and only those."""
    folder.metrics.write_text("".join(row(epoch) + "\n" for epoch in (1, 2, 3)))
    shown, screen = display(folder, epochs_done=3)
    shown._poll()
    assert screen.getvalue() == ""
    folder.metrics.write_text(row(1) + "\n")
    shown._poll()
    folder.metrics.write_text(row(1) + "\n" + row(2) + "\n")
    shown._poll()
    assert [line[:9] for line in screen.getvalue().splitlines()] == ["epoch 2/9"]


def test_progress_adds_up_over_ranks(tmp_path: Path) -> None:
    """The standing is that of the newest epoch, over all ranks that are in it."""
    path = tmp_path / ".progress"
    assert read_progress(path) is None
    ranks = [ProgressFile(path, rank, 3) for rank in range(3)]
    assert read_progress(path) is None
    for rank in ranks:
        rank.start(1)
        rank.add(10, 20.0)
    standing = read_progress(path)
    assert standing is not None
    assert (standing.epoch, standing.samples, standing.loss) == (1, 30, 2.0)
    ranks[1].start(2)
    standing = read_progress(path)
    assert standing is not None
    assert (standing.epoch, standing.samples, standing.loss) == (2, 0, None)


def beat(
    phase: str, seconds: float, *, told_ago_s: float = 0.0, elsewhere: bool = False, ago: int = 0
) -> Beat:
    """That of a rank in this process, or in the one that had its number before: it was in a phase for so long
    when it told of it, on this host or on another."""
    told_ns = time.monotonic_ns() - round(told_ago_s * 1e9)
    started = machine.start_ticks(os.getpid()) or 0
    clock = clock_number() + elsewhere
    return Beat(os.getpid(), started - ago, clock, 0, told_ns, told_ns - round(seconds * 1e9), phase, RUNNING)


def test_slow_ranks_are_shown(folder: RunFolder) -> None:
    """A rank that takes long over something is shown in a line as soon as it does, again when it has taken
    twice as long, and for the next thing; one that has ended is not."""
    shown, screen = display(folder)
    assert slow_ranks(folder.beats, 60) == []
    beats = Beats(folder.beats, 3)
    for seconds in (75.1, 75.2, 149, 151.1, 70):  # the last one of another batch
        beats.tell(2, beat("evaluation", seconds))
        shown._poll(slow_ranks(folder.beats, 60))
    beats.tell(2, beat("forward", 80.1))
    shown._poll(slow_ranks(folder.beats, 60))
    assert screen.getvalue().splitlines() == [
        "rank 2 slow: 75 s in evaluation",
        "rank 2 slow: 151 s in evaluation",
        "rank 2 slow: 80 s in forward",
    ]
    beats.forget(2)
    assert slow_ranks(folder.beats, 60) == []


def test_what_ranks_of_an_earlier_start_were_at_is_over(folder: RunFolder) -> None:
    """A run that is started again shows none of the ranks that it had before."""
    Beats(folder.beats, 3).tell(1, beat("forward", 75.1))
    assert len(slow_ranks(folder.beats, 60)) == 1
    folder.begin()
    assert slow_ranks(folder.beats, 60) == []


def test_slow_ranks_are_shown_above_the_bar(folder: RunFolder) -> None:
    """On a terminal, too, each slow rank is a line."""
    screen = io.StringIO()
    console = Console(file=screen, width=120, force_terminal=True)
    Beats(folder.beats, 1).tell(0, beat("evaluation", 75.1))
    with Display(folder, console, epochs=9, samples_per_epoch=100, live=True) as shown:
        shown._poll(slow_ranks(folder.beats, 60))
    assert "rank 0 slow: 75 s in evaluation" in screen.getvalue()


@pytest.mark.parametrize("phase", PHASES)
def test_who_waits_for_others_is_not_slow(folder: RunFolder, phase: str) -> None:
    """Slow is who takes longer than is allowed for, and does not wait for others."""
    Beats(folder.beats, 3).tell(1, beat(phase, 61))
    assert bool(slow_ranks(folder.beats, 60)) is (phase not in ("transfer", "wait", "recovery"))
    assert slow_ranks(folder.beats, 62) == slow_ranks(folder.beats, math.inf) == []


def test_a_rank_that_no_longer_tells(folder: RunFolder) -> None:
    """Time goes on for a rank of this host that has not told of itself for long, as long as it lives. Those
    of other hosts, whose clocks are their own, count by what they told last."""
    beats = Beats(folder.beats, 3)
    beats.tell(0, beat("forward", 10, told_ago_s=60))
    beats.tell(1, beat("forward", 70, told_ago_s=60, ago=1))
    beats.tell(2, beat("forward", 65, told_ago_s=60, elsewhere=True))
    assert list(map(str, slow_ranks(folder.beats, 60))) == [
        "rank 0 slow: 70 s in forward",
        "rank 2 slow: 65 s in forward",
    ]
