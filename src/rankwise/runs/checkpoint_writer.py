"""Writes checkpoints beside the training, which makes a copy and leaves it to a thread to wait for the disk.

Each rank writes its part, and then a note with the sums of its files. When the notes of all ranks are there,
rank 0 writes the manifest and renames the folder: until then there is no checkpoint, whichever rank is lost.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from rankwise.comm import World
from rankwise.errors import ModelError, StorageError
from rankwise.models.replica import Replica
from rankwise.models.rest import packed, rest_of
from rankwise.runs.checkpoint import (
    Memory,
    Place,
    finished,
    memory_file,
    place_file,
    place_rest_file,
    worker_file,
)
from rankwise.runs.checkpoint_names import (
    AVERAGE,
    AVERAGE_REST,
    MANIFEST,
    MODEL,
    REST,
    best_epoch,
    name_of,
    numbers_of,
)
from rankwise.system.files import write_atomically

LOOK_S = 0.02
"""How often rank 0 looks for the notes of the others."""


class CheckpointWriter:
    """Writes the checkpoints of one run into `folder`, which all ranks see, and keeps the newest `keep`; with
    `keeps_best` also the one with the highest validation accuracy, by its notes, the first of them.

    `gave_up` says that the last one may have been lost. When the next checkpoint begins, and in `finish`, an
    error of the disk is raised as StorageError; the checkpoints before stay. `may_write` is called before
    files of other ranks are touched, and what it raises is raised there too.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        may_write: Callable[[], None] = lambda: None,
        *,
        keeps_best: bool = False,
    ) -> None:
        self._folder = folder
        self._may_write = may_write
        self._keep = keep
        self._keeps_best = keeps_best
        self._under_way: _Part | None = None
        self._given_up: list[_Part] = []
        self.gave_up = False

    def save(
        self,
        epoch: int,
        replica: Replica,
        world: World,
        *,
        worker: int | None,
        writers: int,
        memory: Memory,
        notes: dict[str, Any],
        place: Place | None = None,
    ) -> None:
        """Begin the checkpoint of `epoch`, as all is now; all ranks together. Raises StorageError.

        With a `place` it is one from inside the epoch that comes after. Rank 0 writes the model, the workers
        below `writers` their optimiser state (`worker` is this rank's number among them, None if it has
        none), and each rank its strategy's `memory`, if any, and its place.
        """
        self._wait_for_part()
        draft = self._new_draft(epoch, inside=place is not None) if world.rank == 0 else None
        draft = Path(world.allgather_object(draft)[0])
        self._complete()  # of the one before all parts are there now
        if world.rank == 0:
            self._sweep(draft)
        files: dict[str, bytes] = {}
        if world.rank == 0:
            files |= _files_of(replica.model, MODEL, REST)
            if replica.average is not None:
                files |= _files_of(replica.average.model, AVERAGE, AVERAGE_REST)
        if worker is not None and worker < writers:
            files[worker_file(worker)] = _packed(replica.optimizer_state())
        if memory:
            files[memory_file(world.rank)] = _packed({k: torch.from_numpy(a) for k, a in memory.items()})
        if place is not None:
            metadata = {"notes": json.dumps(place.notes)}
            files[place_file(world.rank)] = _packed(place.arrays, metadata)
            if place.rest:
                files[place_rest_file(world.rank)] = _rest(place.rest)
        self.gave_up = False
        manifest = {"epoch": epoch, "workers": writers, "notes": notes} if world.rank == 0 else None
        epochs = notes.get("epochs", []) if self._keeps_best else []
        best = best_epoch((row["epoch"], row.get("val_accuracy")) for row in epochs)
        self._under_way = _Part(
            draft, world.rank, world.size, files, manifest, self._keep, self._may_write, best
        )

    def finish(self, world: World) -> None:
        """Wait until the last checkpoint is on disk; all ranks together. Raises StorageError."""
        self._wait_for_part()
        world.barrier()
        self._complete()
        if world.rank == 0:
            self._sweep()

    def give_up(self) -> None:
        """Ranks were lost: what is under way may never be whole."""
        if self._under_way is not None:
            self._under_way.given_up.set()
            self._given_up.append(self._under_way)
            self._under_way = None
            self.gave_up = True

    def _new_draft(self, epoch: int, *, inside: bool) -> Path:
        self._may_write()
        under_way = self._under_way.draft if self._under_way else None
        part = 1 + max(self._parts_of(epoch, under_way), default=0) if inside else 0
        draft = self._folder / f".{name_of(epoch, part)}.{os.urandom(4).hex()}"
        try:
            draft.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot write checkpoint {draft}: {error.strerror}") from error
        return draft

    def _parts_of(self, epoch: int, under_way: Path | None) -> list[int]:
        """The numbers of the checkpoints inside the epoch after this one that are there, or will be soon."""
        names = [path.name for path in self._folder.glob("epoch-*")]
        names += [_final(under_way).name] if under_way else []
        return [
            number for its, *parts in filter(None, map(numbers_of, names)) if its == epoch for number in parts
        ]

    def _sweep(self, kept: Path | None = None) -> None:
        """Remove all drafts but one; nobody writes into the others any more."""
        self._may_write()
        for path in self._folder.glob(".epoch-*"):
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)

    def _wait_for_part(self) -> None:
        while self._given_up:  # or its draft might be renamed, or written into, while it is removed
            self._given_up.pop().thread.join()
        if self._under_way is not None:
            self._under_way.written.wait()
            if self._under_way.error is not None:
                raise self._under_way.error

    def _complete(self) -> None:
        part, self._under_way = self._under_way, None
        if part is not None:
            part.thread.join()
            if part.error is not None:
                raise part.error


class _Part:
    """What one rank writes of a checkpoint, in a thread; with a `manifest`, on rank 0, the end of it too."""

    def __init__(
        self,
        draft: Path,
        rank: int,
        ranks: int,
        files: dict[str, bytes],
        manifest: dict[str, Any] | None,
        keep: int,
        may_write: Callable[[], None],
        best: int | None,
    ) -> None:
        self.draft = draft
        self.written = threading.Event()
        self.given_up = threading.Event()
        self.error: StorageError | None = None
        self._rank, self._ranks = rank, ranks
        self._files = files
        self._manifest = manifest
        self._keep = keep
        self._may_write = may_write
        self._best = best
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            sums = {}
            for name, content in self._files.items():
                write_atomically(self.draft / name, content)
                sums[name] = hashlib.sha256(content).hexdigest()
            write_atomically(_note(self.draft, self._rank), json.dumps(sums).encode())
            self.written.set()
            if self._manifest is not None and self._all_wrote():
                self._close(self._manifest)
        except StorageError as error:
            self.error = error
        except OSError as error:
            self.error = StorageError(f"cannot write checkpoint {self.draft}: {error.strerror}")
        finally:
            self.written.set()

    def _all_wrote(self) -> bool:
        """Wait for the notes of all ranks; returns False if they were given up."""
        for rank in range(self._ranks):
            while not _note(self.draft, rank).exists():
                if self.given_up.wait(LOOK_S):
                    return False
        return True

    def _close(self, manifest: dict[str, Any]) -> None:
        notes = [_note(self.draft, rank) for rank in range(self._ranks)]
        sums = {name: digest for note in notes for name, digest in json.loads(note.read_bytes()).items()}
        for note in notes:
            note.unlink()
        content = json.dumps({**manifest, "files": sums}, indent=1).encode()
        write_atomically(self.draft / MANIFEST, content)
        self._may_write()
        final = _final(self.draft)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(self.draft, final)
        for old in finished(final.parent)[self._keep :]:
            if self._best is None or old.name != name_of(self._best):
                shutil.rmtree(old, ignore_errors=True)


def _final(draft: Path) -> Path:
    """What a checkpoint is called when it is whole."""
    return draft.with_name(draft.name[1:].split(".")[0])


def _note(draft: Path, rank: int) -> Path:
    return draft / f"sums-{rank:04d}.json"


def _files_of(model: nn.Module, tensors: str, rest: str) -> dict[str, bytes]:
    """A model as files' contents, by their names. Raises StorageError."""
    files = {tensors: _packed({k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)})}
    if its := rest_of(model):
        files[rest] = _rest(its)
    return files


def _rest(values: Mapping[str, Any]) -> bytes:
    """What is no tensor as a file's content. Raises StorageError."""
    try:
        return packed(values)
    except ModelError as error:
        raise StorageError(f"cannot write a checkpoint: {error}") from None


def _packed(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """Tensors as a file's content. Copies: the format takes no strides and no sharing."""
    return safetensors.torch.save({k: v.detach().clone().contiguous() for k, v in tensors.items()}, metadata)
