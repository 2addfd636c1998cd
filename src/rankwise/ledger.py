"""Where a rank's time goes: one cursor over an integer-nanosecond clock.

Entering a phase closes the one before it, so the phases of a rank add up to its wall time exactly:
there is no second stopwatch whose total could differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PHASES = (
    "startup",
    "data",
    "forward",
    "backward",
    "optimizer",
    "pack",
    "transfer",
    "wait",
    "evaluation",
    "checkpoint",
    "recovery",
    "other",
    "instrument",
)

USEFUL = ("data", "forward", "backward", "optimizer")
"""Phases of a worker that train; the numerator of its parallel efficiency."""


class Ledger:
    """The phases of one rank, in ns.

    `clock` counts integer ns and never goes back; `start_ns` is the start of the process on that
    clock, so that what came before this object is charged to ``startup``.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns, start_ns: int | None = None) -> None:
        self._clock = clock
        self._start_ns = clock() if start_ns is None else start_ns
        self._mark_ns = self._start_ns
        self._phase = "startup"
        self._totals_ns = dict.fromkeys(PHASES, 0)

    def enter(self, phase: str) -> str:
        """Close the running phase, start `phase`, and return the name of the one that was closed."""
        now = self._clock()
        before = self._phase
        self._totals_ns[before] += now - self._mark_ns
        self._mark_ns = now
        self._phase = phase
        return before

    @property
    def mark_ns(self) -> int:
        """When the running phase began, on this ledger's clock."""
        return self._mark_ns

    def move(self, source: str, target: str, duration_ns: int) -> None:
        """Charge time that went to phase `source` to `target` after all; the sum stays."""
        self._totals_ns[source] -= duration_ns
        self._totals_ns[target] += duration_ns

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Spend the block in phase `name`, then go back to the phase before."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def close(self) -> tuple[int, dict[str, int]]:
        """Wall time since the start and the time of each phase, both in ns; they add up exactly.

        The ledger stays open: a later call tells what came to it since.
        """
        self.enter(self._phase)
        return self._mark_ns - self._start_ns, dict(self._totals_ns)
