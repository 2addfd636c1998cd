"""Runs as others see them: lists, and ending one from another terminal."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rankwise.errors import UsageError
from rankwise.launch.running import list_runs, look, stop
from rankwise.runs.folder import RunFolder

from . import tiny
from .conftest import Command, stopped


def claimed(folder: RunFolder, pid: int, host: str | None = None) -> None:
    folder.claimed.write_text(f"process {pid} on {host or socket.gethostname()}")


def running(train: Callable[..., object], config: Callable[..., object], tmp_path: Path) -> RunFolder:
    """A run in its third epoch, as far as its folder says."""
    train(config(epochs=3, checkpoint_keep=3), folder="whole")
    folder = stopped(RunFolder(tmp_path / "whole"), epoch=2)
    folder.write(folder.read().model_copy(update={"outcome": "running"}))
    return folder


def test_a_list_tells_how_each_run_is(
    train_in_threads: Callable[..., object], config: Callable[..., object], tmp_path: Path
) -> None:
    """Completed, running here or elsewhere, died without a word, damaged: each by what is there to see."""
    folder = running(train_in_threads, config, tmp_path)
    (tmp_path / "no run").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "record.json").write_text("{")

    def states() -> dict[str, str]:
        return {line.path.name: line.state for line in list_runs(tmp_path)}

    assert states() == {"parts": "died", "whole": "completed", "odd": "damaged"}
    claimed(folder, 4, "another-host")
    assert states()["parts"] == "elsewhere"
    claimed(folder, os.getpid())
    assert states()["parts"] == "died"  # a process of this number, which does not hold the folder
    handle = folder.claim()
    assert handle is not None
    assert states()["parts"] == "running"
    found = look(folder.path)
    os.close(handle)
    row = found.to_json()
    assert (row["epoch"], row["epochs"], row["pid"]) == (2, 3, os.getpid())
    assert row["accuracy"] == folder.read().epochs[-1].val_accuracy
    assert socket.gethostname() in found.where
    assert [line.path for line in list_runs(folder.path)] == [folder.path]


def test_what_cannot_be_stopped_is_one_line(
    train_in_threads: Callable[..., object], config: Callable[..., object], tmp_path: Path
) -> None:
    """A run that is over, that died, that is on another machine, and a folder without a run."""
    folder = running(train_in_threads, config, tmp_path)
    for path, said in (
        (tmp_path / "whole", r"whole is over \(completed, 3 epochs\): nothing to stop"),
        (folder.path, "does not run: its processes are gone"),
        (tmp_path, "holds no run"),
        (tmp_path / "nowhere", "holds no run"),
    ):
        with pytest.raises(UsageError, match=said):
            stop(path, print)
    claimed(folder, 7, "another-host")
    with pytest.raises(UsageError, match=r"runs on another-host, and this is .*ssh another-host kill -INT 7"):
        stop(folder.path, print)
    with pytest.raises(UsageError, match="there is no run in"):
        list_runs(folder.checkpoints)


@pytest.mark.mpi
@pytest.mark.alone
def test_a_run_is_looked_at_and_stopped_from_another_terminal(command: Command, tmp_path: Path) -> None:
    """While it trains `runs` and `report` show it; `stop` ends it as Ctrl-C does: saved, with code 130."""
    words = ("train", *tiny.WORDS, "--epochs", "100000", "--ranks", "2", "--topology", "allreduce")
    training = command.start(command.python, "-m", "rankwise", *words, "--out", "run")
    metrics = RunFolder(tmp_path / "run").metrics
    give_up = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_bytes()) and time.monotonic() < give_up:
        time.sleep(0.1)
    listed = command.rankwise("runs", ".", "--format", "json")
    assert [(row["run"], row["state"]) for row in listed.json] == [("run", "running")]
    assert command.rankwise("report", "run", "--output", "page.html").code == 0
    done = command.rankwise("stop", "run", "--format", "json")
    assert (done.code, done.json["state"]) == (0, "interrupted")
    _, said = training.communicate(timeout=60)
    assert training.returncode == 130
    assert "go on with: rankwise train --resume" in said
    again = command.rankwise("stop", "run")
    assert (again.code, len(again.told)) == (2, 1)
    assert json.loads((tmp_path / "run/record.json").read_bytes())["outcome"] == "interrupted"
