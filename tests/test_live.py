"""What a person sees of a run, read from its folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from rankwise.report.live import Display
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile, read_progress


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
