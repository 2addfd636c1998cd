"""What each rank's main thread is at: a small file in the run folder, shared as memory.

A row is written by the watchdog of its rank and read by those of the others on its host, and by displays. On
a shared file system the rows of other hosts arrive late; only displays depend on them.
"""

from __future__ import annotations

import math
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import StorageError
from rankwise.ledger.phases import PHASES
from rankwise.survival.hangs import WAITING
from rankwise.system import machine
from rankwise.system.activity import Activity, Doing

_COLUMNS = ("pid", "started", "clock", "watcher", "told_ns", "since_ns", "phase", "doing", "cpu_ns")
_ROW = np.dtype([(name, "i8") for name in _COLUMNS])
_DOING = get_args(Doing)


@dataclass(frozen=True)
class Beat:
    """What a rank's main thread is at: `told_ns` is when it was written, `since_ns` when the `phase` began.

    `pid` and `started` (`machine.start_ticks`) name its process, `watcher` the thread in it that tells, and
    `clock` the clock that was read.
    """

    pid: int
    started: int
    clock: int
    watcher: int
    told_ns: int
    since_ns: int
    phase: str
    activity: Activity

    @property
    def is_live(self) -> bool:
        """Whether the process is still there; it must be one of this host."""
        return machine.start_ticks(self.pid) == self.started


class Beats:
    """The rows of all ranks. Raises StorageError if the file cannot be written."""

    def __init__(self, path: Path, ranks: int) -> None:
        try:
            with path.open("ab") as file:
                file.truncate(ranks * _ROW.itemsize)
            self._rows: NDArray[np.void] = np.memmap(path, _ROW, "r+", shape=(ranks,)).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot write {path}: {error}") from error

    def tell(self, rank: int, beat: Beat) -> None:
        """Replace a rank's row."""
        self._rows[rank] = (
            *(beat.pid, beat.started, beat.clock, beat.watcher, beat.told_ns, beat.since_ns),
            *(PHASES.index(beat.phase), _DOING.index(beat.activity.doing), beat.activity.cpu_ns),
        )

    def forget(self, rank: int) -> None:
        """This rank has ended."""
        self._rows[rank]["pid"] = 0

    def all(self) -> dict[int, Beat]:
        """The beats of ranks that have not ended, by rank."""
        return _beats(self._rows.copy())

    def of_clock(self, clock: int) -> dict[int, Beat]:
        """The same of those that read this clock, as those of one host do."""
        rows = self._rows.copy()
        return _beats(rows, rows["clock"] == clock)


def _beats(rows: NDArray[np.void], among: NDArray[np.bool_] | bool = True) -> dict[int, Beat]:
    return {int(rank): _beat(rows[rank]) for rank in np.flatnonzero((rows["pid"] != 0) & among)}


def _beat(row: np.void) -> Beat:
    pid, started, clock, watcher, told_ns, since_ns, phase, doing, cpu_ns = row.tolist()
    activity = Activity(_DOING[doing], cpu_ns)
    return Beat(pid, started, clock, watcher, told_ns, since_ns, PHASES[phase], activity)


def clock_number() -> int:
    """A number for the clock that this process reads, the same in all processes that read it."""
    return zlib.crc32(machine.clock_name().encode())


@dataclass(frozen=True)
class Slow:
    """A rank that has been in a phase for long."""

    rank: int
    phase: str
    seconds: float

    def __str__(self) -> str:
        return f"rank {self.rank} slow: {self.seconds:.0f} s in {self.phase}"


def slow_ranks(path: Path, after_s: float) -> list[Slow]:
    """The ranks that have been in one phase, and do not wait for others, for more than `after_s` seconds."""
    if not math.isfinite(after_s):
        return []
    try:
        beats = _beats(np.fromfile(path, _ROW))
    except (OSError, ValueError):
        return []
    here, now_ns = clock_number(), time.monotonic_ns()
    found = []
    for rank, beat in beats.items():
        is_here = beat.clock == here
        seconds = ((now_ns if is_here else beat.told_ns) - beat.since_ns) / 1e9
        if beat.phase not in WAITING and seconds > after_s and (not is_here or beat.is_live):
            found.append(Slow(rank, beat.phase, seconds))
    return found


def live_processes(path: Path) -> list[int]:
    """The processes of ranks on this machine that are still there."""
    try:
        beats = _beats(np.fromfile(path, _ROW))
    except (OSError, ValueError):
        return []
    here = clock_number()
    return sorted(beat.pid for beat in beats.values() if beat.clock == here and beat.is_live)
