"""What checkpoints, and what is in them, are called; without torch, for whoever only looks."""

from __future__ import annotations

import re
from collections.abc import Iterable

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
AVERAGE = "average.safetensors"
REST, AVERAGE_REST = "model-rest.pt", "average-rest.pt"
"""What these two lack, if anything: extra state that is no tensor, and buffers that are not persistent."""


def name_of(epoch: int, part: int = 0) -> str:
    """The name of a checkpoint after `epoch` epochs, and of the part with this number of the next one."""
    return f"epoch-{epoch:04d}" + (f"-part-{part:04d}" if part else "")


def numbers_of(name: str) -> tuple[int, ...]:
    """What `name_of` made the name of; nothing if it is another."""
    found = re.fullmatch(r"epoch-(\d+)(?:-part-(\d+))?", name)
    return (int(found[1]), int(found[2] or 0)) if found else ()


def best_epoch(accuracies: Iterable[tuple[int, float | None]]) -> int | None:
    """The first of the epochs with the highest validation accuracy; None if none was evaluated."""
    evaluated = [(epoch, accuracy) for epoch, accuracy in accuracies if accuracy is not None]
    return max(evaluated, key=lambda row: row[1])[0] if evaluated else None
