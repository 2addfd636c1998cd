"""Real ranks that are slow go on, and real ranks that hang are ended, with what a run says of either."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rankwise.runs.folder import RunFolder

from . import tiny
from .conftest import Command
from .test_mpi import closes

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]

MODEL = """
import os, signal, subprocess, threading, time
import torch
from tests import tiny

RANK = int(os.environ["OMPI_COMM_WORLD_RANK"])

def compute(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass

class Odd(torch.nn.Module):
    passes = -2  # those of the trial before training, with two images and with one

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            Odd.passes += 1
            exec(DOING.get((RANK, Odd.passes), ""), globals())
        return x

def net(*shape):
    exec(DOING.pop((RANK, 0), ""), globals())
    return torch.nn.Sequential(Odd(), tiny.net(*shape))
"""


def words(tmp_path: Path, doing: dict[tuple[int, int], str]) -> list[str]:
    """The command line of a small run in which ranks do something else in one of their forward passes, by
    number from 1, or when they build the network (0)."""
    (tmp_path / "odd.py").write_text(f"{MODEL}\nDOING = {doing}\n")
    small = ("odd:net" if word == tiny.MODEL else word for word in tiny.WORDS)
    return ["train", *small, "--strategy", "allreduce", "--out", "run"]


def test_slow_ranks_live(command: Command, tmp_path: Path) -> None:
    """A rank that computes for longer than --hang-timeout and one that waits for a child as long live, while
    a third one waits for them; both are shown as slow, and the run's end knows of no loss."""
    child = "subprocess.run(['sleep', '3'], check=True)"
    options = ["--ranks", "3", "--epochs", "1", "--hang-timeout", "1"]
    done = command.rankwise(*words(tmp_path, {(1, 2): "compute(3)", (2, 2): child}), *options)
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    assert (run.outcome, run.faults, len(run.ranks)) == ("completed", [], 3)
    assert run.samples.trained == run.samples.expected
    assert closes(run)
    for rank in (1, 2):
        assert re.search(rf"^rank {rank} slow: \d+ s in forward$", done.err, re.MULTILINE)
    assert "lost rank" not in done.out + done.err


def test_ranks_that_hang_are_ended(command: Command, tmp_path: Path) -> None:
    """A rank asleep in a lock is ended after --hang-timeout, and one in a loop without an end after
    --step-timeout; the others go on, and the last line names both."""
    doing = {(1, 2): "threading.Event().wait()", (2, 12): "while True: time.sleep(0.01)"}
    options = ["--ranks", "3", "--epochs", "2", "--hang-timeout", "2", "--step-timeout", "5"]
    done = command.rankwise(*words(tmp_path, doing), *options)
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    assert [(fault.rank, fault.kind, fault.epoch) for fault in run.faults] == [(1, "hang", 1), (2, "hang", 2)]
    assert run.samples.trained == run.samples.expected
    assert closes(run)
    assert re.search(
        r"lost rank 1 \(no sign of life for \d+ s, asleep in a lock in forward; waiting for it: rank",
        done.err,
    )
    assert re.search(
        r"lost rank 2 \(no end of forward after \d+ s, with --step-timeout 5; waiting for it: rank", done.err
    )
    assert done.out.splitlines()[-1] == (
        "lost rank 1 (hang) in epoch 1, and went on; rank 2 (hang) in epoch 2, and went on"
    )


@pytest.mark.parametrize(
    ("building", "found"),
    [
        ("threading.Event().wait()", "asleep in a lock in startup; waiting for it: rank 0, 2"),
        pytest.param("os.kill(os.getpid(), signal.SIGSTOP)", "stopped in startup", marks=pytest.mark.full),
    ],
    ids=["locked", "stopped"],
)
@pytest.mark.parametrize(
    "on_failure", ["continue", pytest.param("stop", marks=pytest.mark.full)], ids=lambda word: word
)
def test_a_rank_that_hangs_before_training_is_ended(
    command: Command, tmp_path: Path, building: str, found: str, on_failure: str
) -> None:
    """A rank that hangs while it builds its network is ended after --hang-timeout too; the run, which has
    nothing yet to go on from, ends with what it was at."""
    options = ["--ranks", "3", "--epochs", "1", "--hang-timeout", "2", "--on-failure", on_failure]
    done = command.rankwise(*words(tmp_path, {(1, 0): building}), *options, timeout=90)
    assert done.code == 1, done
    assert re.search(rf"rank 1: no sign of life for \d+ s, {found}", done.err), done
    assert "Traceback" not in done.err


def test_ranks_that_are_slow_to_start_live(command: Command, tmp_path: Path) -> None:
    """Ranks that take longer than --hang-timeout to build their networks, by computing and by waiting for a
    child, are waited for."""
    child = "subprocess.run(['sleep', '3'], check=True)"
    options = ["--ranks", "3", "--epochs", "1", "--hang-timeout", "1"]
    done = command.rankwise(*words(tmp_path, {(1, 0): "compute(3)", (2, 0): child}), *options)
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    assert (run.outcome, run.faults, len(run.ranks)) == ("completed", [], 3)
    assert run.samples.trained == run.samples.expected
