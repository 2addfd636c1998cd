"""Checkpoints that are whole or not there, and are verified before they are believed.

A checkpoint is a folder ``epoch-NNNN`` with the model, the optimiser state of each worker that has
one of its own, and a manifest with the SHA-256 of every file. It is written under another name,
synced, and renamed. All randomness is a function of seed, epoch and worker, so the epoch is all the
generator state there is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankwise.errors import ResumeError, StorageError, one_line
from rankwise.models.replica import Replica
from rankwise.storage import write_atomically
from rankwise.world import World

Memory = Mapping[str, NDArray[np.floating]]
"""Arrays of one rank's strategy, by name."""

MANIFEST = "manifest.json"
MODEL = "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `epoch` is done, `notes` are what the run wrote beside the tensors."""

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
            replica.model.load_state_dict(safetensors.torch.load_file(self.path / MODEL))
            if worker is not None and self.workers:
                saved = safetensors.torch.load_file(self.path / _worker_file(worker % self.workers))
                replica.load_optimizer_state(saved)
        except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
            raise ResumeError(
                f"checkpoint {self.path} does not fit this run: {one_line(error)[:300]}"
            ) from None

    def memory_of(self, rank: int) -> Memory:
        """What the strategy of a rank had to remember; nothing for a rank that was not there."""
        path = self.path / _memory_file(rank)
        try:
            return safetensors.numpy.load_file(path) if path.exists() else {}
        except (OSError, safetensors.SafetensorError) as error:
            raise ResumeError(f"checkpoint {path} cannot be read: {one_line(error)[:300]}") from None


def save(
    folder: Path,
    epoch: int,
    replica: Replica,
    world: World,
    *,
    worker: int | None,
    writers: int,
    memory: Memory,
    keep: int,
    notes: dict[str, Any],
) -> None:
    """Write the checkpoint of `epoch` into `folder`; all ranks call it together.

    Rank 0 writes the model, the workers below `writers` their optimiser state (`worker` is this
    rank's number among them, None if it has none), and each rank its strategy's `memory`, if any. The
    newest `keep` checkpoints stay. The folder is one that all ranks see. Raises StorageError; the
    checkpoints before it stay.
    """
    final = folder / f"epoch-{epoch:04d}"
    draft = folder / f".{final.name}.draft"
    writes_state = worker is not None and worker < writers
    if world.rank == 0:
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
        except OSError as error:
            raise StorageError(f"cannot write checkpoint {draft}: {error.strerror}") from error
    world.barrier()  # the folder is there
    sums = {}
    if world.rank == 0:
        sums[MODEL] = _write_tensors(draft / MODEL, replica.model.state_dict())
    if writes_state:
        assert worker is not None
        name = _worker_file(worker)
        sums[name] = _write_tensors(draft / name, replica.optimizer_state())
    if memory:
        name = _memory_file(world.rank)
        sums[name] = _write_tensors(draft / name, {key: torch.from_numpy(a) for key, a in memory.items()})
    sums = {name: digest for part in world.allgather_object(sums) for name, digest in part.items()}
    if world.rank == 0:
        manifest = {"epoch": epoch, "workers": writers, "files": sums, "notes": notes}
        write_atomically(draft / MANIFEST, json.dumps(manifest, indent=1).encode())
        try:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(draft, final)
            for old in _folders(folder)[keep:]:
                shutil.rmtree(old)
        except OSError as error:
            raise StorageError(f"cannot write checkpoint {final}: {error.strerror}") from error


def newest(folder: Path, on_damage: Callable[[str], None]) -> Checkpoint:
    """The newest checkpoint whose files are all there and unchanged.

    Each damaged one is named to `on_damage` in one line. Raises ResumeError if none is good.
    """
    for path in _folders(folder):
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


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, the newest first."""
    found = [path for path in folder.glob("epoch-*") if path.name[6:].isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name[6:]), reverse=True)


def _memory_file(rank: int) -> str:
    return f"memory-{rank:04d}.safetensors"


def _worker_file(worker: int) -> str:
    return f"worker-{worker:04d}.safetensors"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors, and return the file's SHA-256. Copies: the format takes no strides and no sharing."""
    content = safetensors.torch.save({k: v.detach().clone().contiguous() for k, v in tensors.items()})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()
