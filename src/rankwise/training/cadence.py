"""When the next checkpoint inside an epoch is due."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from rankwise.comm import World
from rankwise.runs.cadence import Every


class Cadence:
    """Says when a checkpoint is due, alike on all ranks, which all ask after the same commits.

    Steps are counted by numbers that all have alike. The clock is that of rank 0, which all hear of only now
    and then: it says after how many more commits to look again, half as many as it expects until then.
    """

    def __init__(self, every: Every, world: World, clock: Callable[[], float] = time.monotonic) -> None:
        self._every = every
        self._world = world
        self._clock = clock
        self._at: tuple[int, int] | None = (0, 0)  # epoch and step of the last commit
        self._restart()

    def begin_anew(self) -> None:
        """Ranks were lost, or have come in: all count from the next commit on."""
        self._at = None
        self._restart()

    def _restart(self) -> None:
        self._steps = self._commits = 0
        self._look_in = 1
        self._since_s = self._clock()

    def is_due(self, epoch: int, step: int) -> bool:
        """Whether it is, after the commit with which `step` steps of an epoch are over; all ranks together.
        If it is, the next one counts from here."""
        before, self._at = self._at, (epoch, step)
        if before is not None:
            self._steps += step - before[1] if epoch == before[0] else step
        due = self._steps >= self._every.count if self._every.unit == "steps" else self._time_is_over()
        if due:
            self._restart()
        return due

    def _time_is_over(self) -> bool:
        self._commits += 1
        self._look_in -= 1
        if self._look_in:
            return False
        elapsed_s = self._clock() - self._since_s
        left_s = self._every.count - elapsed_s
        # In single numbers, as they go to all: 0 says that it is due.
        look_in = 0 if left_s <= 0 else max(1, int(left_s / max(elapsed_s, 1e-9) * self._commits / 2))
        heard = np.array([look_in], np.int64)
        if self._world.size > 1:
            self._world.broadcast(heard)
        self._look_in = int(heard[0])
        return not self._look_in
