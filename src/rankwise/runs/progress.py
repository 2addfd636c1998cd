"""How far each rank is, for displays: a small file in the run folder, shared as memory.

Writing is three stores into a memory map, so it costs a step nothing and needs no messages. On a
shared file system the rows of other hosts arrive late; only displays depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rankwise.errors import StorageError

_COLUMNS = 3  # epoch, samples trained in it, sum of their losses


class NoProgress:
    """Shown nowhere."""

    def start(self, epoch: int) -> None:
        """Nothing of `epoch` is trained yet."""

    def add(self, samples: int, loss_sum: float) -> None:
        """`samples` more are trained, whose losses add up to `loss_sum`."""


class ProgressFile(NoProgress):
    """One rank's row. Raises StorageError if the file cannot be written."""

    def __init__(self, path: Path, rank: int, ranks: int) -> None:
        try:
            with path.open("ab") as file:
                file.truncate(ranks * _COLUMNS * 8)
            rows = np.memmap(path, np.float64, "r+", shape=(ranks, _COLUMNS))
            self._row = rows.view(np.ndarray)[rank]  # stores into a plain array take half the time
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    def start(self, epoch: int) -> None:
        self._row[:] = (epoch, 0, 0)

    def add(self, samples: int, loss_sum: float) -> None:
        self._row[1] += samples
        self._row[2] += loss_sum


@dataclass(frozen=True)
class LiveProgress:
    """All ranks together: the running epoch, its samples so far, and their mean loss (None at first)."""

    epoch: int
    samples: int
    loss: float | None


def read_progress(path: Path) -> LiveProgress | None:
    """How far the run is, or None before it has started."""
    try:
        rows = np.fromfile(path, np.float64).reshape(-1, _COLUMNS)
    except (OSError, ValueError):
        return None
    if not len(rows) or not rows[:, 0].max():
        return None
    epoch = rows[:, 0].max()
    current = rows[rows[:, 0] == epoch]
    samples = int(current[:, 1].sum())
    return LiveProgress(int(epoch), samples, float(current[:, 2].sum() / samples) if samples else None)
