"""Checkpoints that are whole or not there, and are verified before they are believed.

A checkpoint is a folder ``epoch-NNNN`` with the model, the average of its weights if there is one, the
optimiser state of each worker that has one of its own, and a manifest with the SHA-256 of every file.
`checkpoint_writer` writes it under another name, syncs it, and renames it. At the end of an epoch all
randomness is a function of seed, epoch and worker, so the epoch is all the generator state there is.

One from inside an epoch is ``epoch-NNNN-part-NNNN``, the first number being the epochs that are over and the
second higher for each later one. It holds besides, for each rank, its place: what that rank has of its own.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
from numpy.typing import NDArray
from torch import Tensor

from rankwise.errors import ResumeError, one_line
from rankwise.models.expanded import load
from rankwise.models.replica import Replica
from rankwise.models.rest import unpacked
from rankwise.runs.checkpoint_names import AVERAGE, AVERAGE_REST, MANIFEST, MODEL, REST, numbers_of

Memory = Mapping[str, NDArray[np.floating]]
"""Arrays of one rank's strategy, by name."""


@dataclass(frozen=True)
class Place:
    """What a rank has of its own inside an epoch: `arrays` by name, `notes` that are JSON, and the `rest`
    that is neither."""

    arrays: Mapping[str, Tensor]
    notes: Mapping[str, Any]
    rest: Mapping[str, Any]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `epoch` is over, `notes` is what the run wrote beside the tensors."""

    path: Path
    epoch: int
    notes: dict[str, Any]
    workers: int

    @property
    def inside(self) -> dict[str, Any] | None:
        """What the run wrote of the epoch under way; None if the checkpoint is from the end of one."""
        return self.notes.get("inside")

    def where(self, epochs: int | None = None) -> str:
        """From where a run, of so many epochs, goes on with it, in words."""
        of_all = f" of {epochs}" if epochs is not None else ""
        if self.inside is None:
            return f"after epoch {self.epoch}{of_all}"
        return f"in epoch {self.epoch + 1}{of_all}, after {self.inside['trained']} of its samples"

    def place_of(self, rank: int) -> Place:
        """What a rank had of its own inside an epoch. Raises ResumeError if it cannot be read."""
        path = self.path / place_file(rank)
        try:
            with safetensors.safe_open(path, "pt") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                notes = json.loads(file.metadata()["notes"])
            rest = self.path / place_rest_file(rank)
            return Place(arrays, notes, unpacked(rest.read_bytes()) if rest.exists() else {})
        except (OSError, ValueError, KeyError, TypeError, pickle.UnpicklingError) as error:
            raise ResumeError(f"checkpoint {path} cannot be read: {one_line(error)[:300]}") from None
        except safetensors.SafetensorError as error:
            raise ResumeError(f"checkpoint {path} cannot be read: {one_line(error)[:300]}") from None

    def restore(self, replica: Replica, worker: int | None) -> None:
        """Load the model, and for a worker the optimiser state that was its own.

        With more workers than were saved they share the saved states in turn. Raises ResumeError if
        the tensors do not fit.
        """
        try:
            load(replica.model, self._values(MODEL, REST))
            if replica.average is not None:
                if (self.path / AVERAGE).exists():
                    load(replica.average.model, self._values(AVERAGE, AVERAGE_REST))
                else:  # the run had none so far
                    replica.average.begin()
            if worker is not None and self.workers:
                saved = safetensors.torch.load_file(self.path / worker_file(worker % self.workers))
                replica.load_optimizer_state(saved)
        except (
            OSError,
            RuntimeError,
            ValueError,
            safetensors.SafetensorError,
            pickle.UnpicklingError,
        ) as error:
            raise ResumeError(
                f"checkpoint {self.path} does not fit this run: {one_line(error)[:300]}"
            ) from None

    def _values(self, tensors: str, rest: str) -> dict[str, Any]:
        values: dict[str, Any] = dict(safetensors.torch.load_file(self.path / tensors))
        path = self.path / rest
        return values | (unpacked(path.read_bytes()) if path.exists() else {})

    def memory_of(self, rank: int) -> Memory:
        """What the strategy of a rank had to remember; nothing for a rank that was not there. Raises
        ResumeError if it cannot be read."""
        path = self.path / memory_file(rank)
        try:
            return safetensors.numpy.load_file(path) if path.exists() else {}
        except (OSError, safetensors.SafetensorError) as error:
            raise ResumeError(f"checkpoint {path} cannot be read: {one_line(error)[:300]}") from None


def newest(folder: Path, on_damage: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint whose files are all there and unchanged.

    `on_damage` gets one line about each damaged one. Raises ResumeError if none is good.
    """
    for path in finished(folder):
        try:
            return verify(path)
        except ResumeError as error:
            on_damage(str(error))
    raise ResumeError(f"{folder} holds no checkpoint that can be used: start the run anew")


def verify(path: Path) -> Checkpoint:
    """The checkpoint at `path`. Raises ResumeError that names the file that is missing or damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files: dict[str, str] = manifest["files"]
        for name, digest in files.items():
            if Path(name).name != name:
                raise ResumeError(f"checkpoint {path} is damaged: its manifest names {name!r}")
            if hashlib.sha256((path / name).read_bytes()).hexdigest() != digest:
                raise ResumeError(f"checkpoint {path} is damaged: {name} is not what was written")
        return Checkpoint(path, int(manifest["epoch"]), dict(manifest["notes"]), int(manifest["workers"]))
    except OSError as error:
        raise ResumeError(f"checkpoint {path} is damaged: {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise ResumeError(f"checkpoint {path} is damaged: {MANIFEST}: {one_line(error)}") from None


def finished(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = {path: numbers_of(path.name) for path in folder.glob("epoch-*") if path.is_dir()}
    return sorted((path for path, its in found.items() if its), key=lambda path: found[path], reverse=True)


def memory_file(rank: int) -> str:
    """Holds what the strategy of a rank has to remember."""
    return f"memory-{rank:04d}.safetensors"


def place_file(rank: int) -> str:
    """Holds what a rank has of its own inside an epoch."""
    return f"place-{rank:04d}.safetensors"


def place_rest_file(rank: int) -> str:
    """Holds what of it is no tensor, if there is any."""
    return f"place-{rank:04d}-rest.pt"


def worker_file(worker: int) -> str:
    """Holds the optimiser state of a worker."""
    return f"worker-{worker:04d}.safetensors"
