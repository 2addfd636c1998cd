"""Checkpoints written beside the training: whole or not there, whoever is late, lost or out of disk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from rankwise.comm import World
from rankwise.comm.threads import run_in_threads
from rankwise.errors import ResumeError, StorageError
from rankwise.models.replica import Replica
from rankwise.runs import checkpoint, checkpoint_writer
from rankwise.runs.checkpoint_writer import CheckpointWriter
from rankwise.system.files import write_atomically

from .strategies.loops import make


def save(world: World, its: CheckpointWriter, epoch: int) -> None:
    its.save(
        epoch, Replica(*make()), world, worker=world.rank, writers=world.size, memory={}, notes={"e": epoch}
    )


def newest(folder: Path) -> int:
    return checkpoint.newest(folder, on_damage=pytest.fail).epoch


def test_checkpoints_are_whole_and_the_newest_are_kept(tmp_path: Path) -> None:
    """After `finish` the last checkpoint is there with all parts, in a folder that need not have been there;
    old ones and drafts are gone."""
    folder = tmp_path / "run" / "checkpoints"

    def program(world: World) -> None:
        its = CheckpointWriter(folder, keep=2)
        for epoch in range(4):
            save(world, its, epoch)
        its.finish(world)

    run_in_threads(3, program)
    assert sorted(path.name for path in folder.iterdir()) == ["epoch-0002", "epoch-0003"]
    found = checkpoint.newest(folder, on_damage=pytest.fail)
    assert (found.epoch, found.workers, found.notes) == (3, 3, {"e": 3})


def test_training_does_not_wait_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a rank still writes its part, `save` has returned everywhere, and the checkpoint before is the
    newest; then the new one is."""
    free = threading.Event()
    saved = threading.Barrier(2, timeout=20)

    def slow(path: Path, content: bytes) -> None:
        if path.name == "worker-0001.safetensors" and "0001." in path.parent.name:
            assert free.wait(20)
        write_atomically(path, content)

    monkeypatch.setattr(checkpoint_writer, "write_atomically", slow)
    seen = []

    def program(world: World) -> None:
        its = CheckpointWriter(tmp_path, keep=2)
        save(world, its, 0)
        its.finish(world)
        save(world, its, 1)
        saved.wait()
        if world.rank == 0:
            seen.append(newest(tmp_path))
            free.set()
        its.finish(world)

    run_in_threads(2, program)
    assert seen == [0]
    assert newest(tmp_path) == 1


@pytest.mark.parametrize(
    "name", ["model.safetensors", "worker-0001.safetensors", "sums-0000.json", "manifest.json"]
)
def test_an_error_of_the_disk_costs_nothing_of_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever cannot be written, by whichever rank: the run is told at the end or at the next checkpoint,
    and the one before can be read."""

    def full(path: Path, content: bytes) -> None:
        if path.name == name and "0001." in path.parent.name:
            raise StorageError(f"cannot write {path}: No space left on device")
        write_atomically(path, content)

    monkeypatch.setattr(checkpoint_writer, "write_atomically", full)

    def program(world: World) -> None:
        its = CheckpointWriter(tmp_path, keep=2)
        for epoch in range(3):
            save(world, its, epoch)
        its.finish(world)

    with pytest.raises(StorageError, match="No space left"):
        run_in_threads(2, program)
    assert newest(tmp_path) == 0


def test_a_draft_that_was_given_up_goes_though_a_part_comes_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose disk is slow still writes its part when all have given the checkpoint up: nothing of it is
    left when the next one is there, nor at the end if there is none."""
    writes, goes_on = threading.Event(), threading.Event()

    def slow(path: Path, content: bytes) -> None:
        if path.name == "worker-0001.safetensors" and "0001." in path.parent.name:
            writes.set()
            assert goes_on.wait(20)
        write_atomically(path, content)

    monkeypatch.setattr(checkpoint_writer, "write_atomically", slow)
    left: list[list[str]] = []

    def program(world: World, then_saves: bool) -> None:
        its = CheckpointWriter(tmp_path, keep=2)
        save(world, its, 0)
        save(world, its, 1)
        assert writes.wait(20)
        its.give_up()
        if world.rank == 0:
            # Rank 0 has come as far as it can without the other one.
            threading.Timer(0.2, goes_on.set).start()
        if then_saves:
            save(world, its, 2)
        its.finish(world)

    for then_saves in (True, False):
        writes.clear()
        goes_on.clear()
        run_in_threads(2, lambda world, saves=then_saves: program(world, saves))  # type: ignore[misc]
        left.append(sorted(path.name for path in tmp_path.iterdir()))
    assert left == [["epoch-0000", "epoch-0002"], ["epoch-0000", "epoch-0002"]]


def test_what_was_lost_with_a_rank_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of which a part never comes is no checkpoint, and does not hold up the next one."""

    def lost(path: Path, content: bytes) -> None:
        if not (path.name == "sums-0001.json" and "0001." in path.parent.name):
            write_atomically(path, content)

    monkeypatch.setattr(checkpoint_writer, "write_atomically", lost)

    def program(world: World) -> Any:
        its = CheckpointWriter(tmp_path, keep=2)
        save(world, its, 0)
        save(world, its, 1)
        its.give_up()
        gave_up = its.gave_up
        save(world, its, 2)
        its.finish(world)
        return gave_up, its.gave_up

    assert run_in_threads(2, program) == [(True, False)] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch-0000", "epoch-0002"]
    with pytest.raises(ResumeError):
        checkpoint.verify(tmp_path / "epoch-0001")
