"""Where a rank's time goes: one cursor over an integer-nanosecond clock.

Entering a phase closes the one before it, so the phases of a rank add up to its wall time exactly:
there is no second stopwatch whose total could differ.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

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

TRAINING = ("data", "forward", "backward", "optimizer")
"""Phases of a worker that train."""

USEFUL = (*TRAINING, "evaluation")
"""Phases that would be there without parallelism too: the useful time of the POP efficiencies."""

EXCHANGING = ("transfer", "wait")
"""Phases inside exchanges with other ranks; in all others a rank computes."""

MOST_SPANS = 256
"""Spans that a ledger remembers until somebody takes them."""

Clock = Callable[[], int]


@dataclass(frozen=True)
class Totals:
    """A ledger's sums, in ns. `phases_ns` adds up to `wall_ns` exactly.

    `off_cpu_ns` holds the part of each phase outside exchanges in which the ledger's thread was not on
    a CPU: waiting for a core or a disk, or stopped.
    """

    wall_ns: int
    phases_ns: dict[str, int]
    off_cpu_ns: dict[str, int]


class Ledger:
    """The phases of one rank, in ns.

    `clock` counts integer ns and never goes back; `start_ns` is the start of the process on that
    clock, so that what came before this object is charged to ``startup``. `cpu_clock` counts the CPU
    time of the thread that uses the ledger. `cost_ns` is what one change of phase takes (`measure_cost`):
    so much for each goes from the phase in which it happened to ``instrument``.
    """

    def __init__(
        self,
        clock: Clock = time.monotonic_ns,
        start_ns: int | None = None,
        *,
        cpu_clock: Clock = time.thread_time_ns,
        cost_ns: int = 0,
    ) -> None:
        self.clock = clock
        self.cpu_clock = cpu_clock
        self._cost_ns = cost_ns
        self.start_ns = clock() if start_ns is None else start_ns
        self._mark_ns = self.start_ns
        # A thread's CPU time counts from the thread's start, as `start_ns` does if it is given.
        self._cpu_mark_ns = cpu_clock() if start_ns is None else 0
        self._phase = "startup"
        self._totals_ns = dict.fromkeys(PHASES, 0)
        self._cpu_ns = dict.fromkeys(PHASES, 0)
        self._visits = dict.fromkeys(PHASES, 0)
        self._stopped_ns = 0
        self._spans: deque[tuple[str, int, int]] = deque(maxlen=MOST_SPANS)

    def enter(self, phase: str) -> str:
        """Close the running phase, start `phase`, and return the name of the one that was closed."""
        # The CPU clock first: it is a system call, at which a rank that has used up its turn loses its
        # core, and that belongs to the phase that used it up.
        cpu = self.cpu_clock()
        now = self.clock()
        before = self._phase
        self._totals_ns[before] += now - self._mark_ns
        self._cpu_ns[before] += cpu - self._cpu_mark_ns
        self._visits[before] += 1
        self._spans.append((before, self._mark_ns, now))
        self._mark_ns = now
        self._cpu_mark_ns = cpu
        self._phase = phase
        return before

    @property
    def running(self) -> str:
        """The running phase."""
        return self._phase

    @property
    def mark_ns(self) -> int:
        """When the running phase began, on this ledger's clock."""
        return self._mark_ns

    @property
    def cpu_mark_ns(self) -> int:
        """What the CPU clock showed just before."""
        return self._cpu_mark_ns

    @property
    def busy_ns(self) -> int:
        """Time outside exchanges, since the end of start-up until the running phase began.

        What was moved out of exchanges later does not change it: it was no computing.
        """
        totals = self._totals_ns
        exchanging_ns = totals["transfer"] + totals["wait"] + self._stopped_ns
        return self._mark_ns - self.start_ns - totals["startup"] - exchanging_ns

    def move(self, source: str, target: str, duration_ns: int) -> None:
        """Charge time that went to phase `source` to `target` after all; the sum stays."""
        self._totals_ns[source] -= duration_ns
        self._totals_ns[target] += duration_ns
        if source in EXCHANGING and target not in EXCHANGING:
            self._stopped_ns += duration_ns

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Spend the block in phase `name`, then go back to the phase before."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def take_spans(self) -> deque[tuple[str, int, int]]:
        """Phase, start and end of what was closed since the last call (the last MOST_SPANS of it)."""
        spans, self._spans = self._spans, deque(maxlen=MOST_SPANS)
        return spans

    def close(self) -> Totals:
        """The sums until now. The ledger stays open: a later call tells what came to it since."""
        self.enter(self._phase)
        phases_ns = dict(self._totals_ns)
        computing = (phase for phase in PHASES if phase not in EXCHANGING)
        off_cpu_ns = {phase: max(0, phases_ns[phase] - self._cpu_ns[phase]) for phase in computing}
        for phase, visits in self._visits.items():
            cost_ns = min(visits * self._cost_ns, phases_ns[phase])
            phases_ns[phase] -= cost_ns
            phases_ns["instrument"] += cost_ns
        return Totals(self._mark_ns - self.start_ns, phases_ns, off_cpu_ns)


def measure_cost() -> int:
    """What one change of phase costs on this machine, in ns: the least of several trials."""
    trials = []
    for _ in range(5):
        ledger = Ledger()
        started_ns = time.monotonic_ns()
        for _ in range(200):
            ledger.enter("forward")
        trials.append((time.monotonic_ns() - started_ns) // 200)
    return min(trials)
