"""A run that goes on with other ranks while it trains."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from .conftest import Command
from .processes import wait_for
from .test_mpi import closes

SMALL = ("--dataset", "digits", "--model", "mlp", "--lr", "0.01", "--strategy", "allreduce")


class Running:
    """A run that trains until it is told to stop."""

    def __init__(self, command: Command, tmp_path: Path, *words: str) -> None:
        self.command = command
        self.folder = RunFolder(tmp_path / "run")
        self.process = command.start(
            *(command.python, "-m", "rankwise", "train", *SMALL, "--epochs", "100000", "--out", "run", *words)
        )
        wait_for(lambda: bool(self.folder.read_metrics()))

    def resize(self, *words: str) -> Any:
        """Ask for other ranks, and wait for them."""
        return self.command.rankwise("resize", "run", *words)

    def stop(self) -> Record:
        """Let it save, and end; all is as it should be then."""
        epoch = len(self.folder.read().epochs)
        wait_for(lambda: len(self.folder.read().epochs) > epoch + 1)
        self.process.send_signal(signal.SIGINT)
        _, told = self.process.communicate(timeout=60)
        assert self.process.returncode == 130, told
        record = self.folder.read()
        assert record.outcome == "interrupted", told
        assert record.samples.trained == record.samples.expected > 0
        assert (record.samples.lost, record.samples.duplicated) == (0, 0)
        assert [row.epoch for row in record.epochs] == list(range(1, len(record.epochs) + 1))
        assert closes(record)
        for generation in record.earlier:
            assert all(sum(row.phases_ns.values()) == row.wall_ns for row in generation.ranks)
        return record


@pytest.mark.mpi
@pytest.mark.timeout(200)
def test_a_run_goes_on_with_more_and_with_fewer_ranks(command: Command, tmp_path: Path) -> None:
    """Resized in the middle of epochs it trains each sample once, in one record: each generation has its
    ranks' rows, and the pause between them is `recovery`, no start-up."""
    run = Running(command, tmp_path, "--ranks", "2")
    for ranks in (3, 1):
        done = run.resize("--ranks", str(ranks))
        assert done.code == 0, done
        assert done.out.startswith(f"run: {ranks} rank")
        assert run.folder.read().config["ranks"] == ranks
    record = run.stop()
    assert (len(record.ranks), record.generation, record.config["ranks"]) == (1, 2, 1)
    assert [len(generation.ranks) for generation in record.earlier] == [2, 3]
    for pause_s, ranks in (
        (record.earlier[1].pause_s, record.earlier[1].ranks),
        (record.pause_s, record.ranks),
    ):
        assert pause_s is not None
        assert 0 < pause_s < 30
        assert all(row.phases_ns["startup"] == 0 < row.phases_ns["recovery"] for row in ranks)
