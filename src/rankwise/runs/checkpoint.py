"""Checkpoints that are whole or not there, and are verified before they are believed.

A checkpoint is a folder ``epoch-NNNN`` with the model, the average of its weights if there is one, the
optimiser state of each worker that has one of its own, and a manifest with the SHA-256 of every file.
`checkpoint_writer` writes it under another name, syncs it, and renames it. All randomness is a function of
seed, epoch and worker, so the epoch is all the generator state there is.
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

from rankwise.errors import ResumeError, one_line
from rankwise.models.expanded import load
from rankwise.models.replica import Replica
from rankwise.models.rest import unpacked

Memory = Mapping[str, NDArray[np.floating]]
"""Arrays of one rank's strategy, by name."""

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
AVERAGE = "average.safetensors"
REST, AVERAGE_REST = "model-rest.pt", "average-rest.pt"
"""What these two lack, if anything: extra state that is no tensor, and buffers that are not persistent."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `epoch` is over, `notes` is what the run wrote beside the tensors."""

    path: Path
    epoch: int
    notes: dict[str, Any]
    workers: int

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
    found = [path for path in folder.glob("epoch-*") if path.name[6:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[6:]), reverse=True)


def memory_file(rank: int) -> str:
    """Holds what the strategy of a rank has to remember."""
    return f"memory-{rank:04d}.safetensors"


def worker_file(worker: int) -> str:
    """Holds the optimiser state of a worker."""
    return f"worker-{worker:04d}.safetensors"
