"""Where a rank's time goes: one cursor over an integer-nanosecond clock.

Entering a phase closes the one before it, so the phases of a rank add up to its wall time exactly:
there is no second stopwatch whose total could differ. What comes to light later, as that a part of an
exchange was waiting, is kept beside what the cursor counted, in the period in which it happened, and added
up when totals are asked for. So no period has a negative time, however late its waiting is found.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
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

RECORDED = (*PHASES, "compute")
"""What a record holds: beside the phases of a training that of a program's own work, which no other names."""

TRAINING = ("data", "forward", "backward", "optimizer")
"""Phases of a worker that train."""

USEFUL = (*TRAINING, "evaluation")
"""Phases that would be there without parallelism too: the useful time of the POP efficiencies."""

EXCHANGING = ("transfer", "wait")
"""Phases inside exchanges with other ranks; in all others a rank computes."""

MOST_SPANS = 256
"""Spans that a ledger keeps until `take_spans`."""

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


@dataclass(frozen=True)
class _Reading:
    """What the cursor had counted when a period began: time and visits of each of PHASES."""

    spent_ns: tuple[int, ...]
    visits: tuple[int, ...]


class Visit:
    """A `with` block in a phase of a ledger. No generator, which takes longer in a step than the phase's two
    changes."""

    __slots__ = ("_before", "_ledger", "_name")

    def __init__(self, ledger: Ledger, name: str) -> None:
        self._ledger = ledger
        self._name = name

    def __enter__(self) -> None:
        self._before = self._ledger.enter(self._name)

    def __exit__(self, *_: object) -> None:
        self._ledger.enter(self._before)


class Ledger:
    """The phases of one rank, in ns.

    `clock` counts integer ns and never goes back; `start_ns` is the start of the process on that
    clock, so that what came before this object is charged to ``startup``. `cpu_clock` counts the CPU
    time of the thread that uses the ledger. `cost_ns` is what one change of phase takes (`measure_cost`):
    each one moves that much from the phase in which it happened to ``instrument``. `cpu_s_before` is the CPU
    time of the process, in s, that came before `start_ns`.

    `mark_ns` and `cpu_mark_ns` are what the clocks showed when the running phase began.

    A ledger is cut into periods (`begin_period`), which are numbered from 0; each of them adds up too.
    """

    def __init__(
        self,
        clock: Clock = time.monotonic_ns,
        start_ns: int | None = None,
        *,
        cpu_clock: Clock = time.thread_time_ns,
        cost_ns: int = 0,
        cpu_s_before: float = 0.0,
    ) -> None:
        self.clock = clock
        self.cpu_clock = cpu_clock
        self._cost_ns = cost_ns
        self.cpu_s_before = cpu_s_before
        self.start_ns = clock() if start_ns is None else start_ns
        self.mark_ns = self.start_ns
        # A thread's CPU time counts from the thread's start, as `start_ns` does if it is given.
        self.cpu_mark_ns = cpu_clock() if start_ns is None else 0
        self._phase = "startup"
        self._spent_ns = dict.fromkeys(PHASES, 0)
        self._cpu_ns = dict.fromkeys(PHASES, 0)
        self._visits = dict.fromkeys(PHASES, 0)
        # What `move` has moved, beside what the cursor counted: in all, and in each period.
        self._moved_ns: Counter[str] = Counter()
        self._moved_in: list[Counter[str]] = [Counter()]
        self._readings = [self._reading()]
        self._ends_ns: list[int] = []
        self._spans: deque[tuple[str, int, int]] = deque(maxlen=MOST_SPANS)

    def enter(self, phase: str) -> str:
        """Close the running phase, start `phase`, and return the name of the one that was closed."""
        # The CPU clock first: it is a system call, at which a rank that has used up its turn loses its
        # core, and that belongs to the phase that used it up.
        cpu = self.cpu_clock()
        now = self.clock()
        before = self._phase
        self._spent_ns[before] += now - self.mark_ns
        self._cpu_ns[before] += cpu - self.cpu_mark_ns
        self._visits[before] += 1
        self._spans.append((before, self.mark_ns, now))
        self.mark_ns = now
        self.cpu_mark_ns = cpu
        self._phase = phase
        return before

    @property
    def running(self) -> str:
        """The running phase."""
        return self._phase

    @property
    def spent_ns(self) -> Mapping[str, int]:
        """What the cursor has counted in each phase until the running one began."""
        return self._spent_ns

    @property
    def busy_ns(self) -> int:
        """Time outside exchanges, since the end of start-up until the running phase began.

        What `move` takes out of exchanges does not change it: it was no computing.
        """
        spent = self._spent_ns
        return self.mark_ns - self.start_ns - spent["startup"] - spent["transfer"] - spent["wait"]

    def move(self, source: str, target: str, duration_ns: int, period: int = -1) -> None:
        """Charge time of a period, by default the running one, to phase `target` instead of `source`; the sum
        stays. `source` must have that much in it."""
        for moved_ns in (self._moved_ns, self._moved_in[period]):
            moved_ns[source] -= duration_ns
            moved_ns[target] += duration_ns

    def begin_period(self) -> int:
        """End the running period now, and begin the next; returns the number of the one that ends."""
        self.enter(self._phase)
        self._ends_ns.append(self.mark_ns)
        self._readings.append(self._reading())
        self._moved_in.append(Counter())
        return len(self._ends_ns) - 1

    @property
    def ends_ns(self) -> Sequence[int]:
        """When each period that is over ended, on this ledger's clock."""
        return self._ends_ns

    def phases_of(self, period: int) -> dict[str, int]:
        """The time in each phase, in ns, of a period that is over, as far as is known now."""
        before, after = self._readings[period : period + 2]
        spent_ns = (end - start for start, end in zip(before.spent_ns, after.spent_ns, strict=True))
        visits = (end - start for start, end in zip(before.visits, after.visits, strict=True))
        return self._without_cost(_added_up(spent_ns, self._moved_in[period]), visits)

    def phase(self, name: str) -> Visit:
        """Spend a `with` block in phase `name`, then go back to the phase before."""
        return Visit(self, name)

    def take_spans(self) -> deque[tuple[str, int, int]]:
        """Phase, start and end of what was closed since the last call (the last MOST_SPANS of it)."""
        spans, self._spans = self._spans, deque(maxlen=MOST_SPANS)
        return spans

    def close(self) -> Totals:
        """The sums until now. The ledger stays open: a later call returns what has come to it since, too."""
        self.enter(self._phase)
        phases_ns = _added_up(self._spent_ns.values(), self._moved_ns)
        computing = (phase for phase in PHASES if phase not in EXCHANGING)
        off_cpu_ns = {phase: max(0, phases_ns[phase] - self._cpu_ns[phase]) for phase in computing}
        phases_ns = self._without_cost(phases_ns, self._visits.values())
        return Totals(self.mark_ns - self.start_ns, phases_ns, off_cpu_ns)

    def _reading(self) -> _Reading:
        return _Reading(tuple(self._spent_ns.values()), tuple(self._visits.values()))

    def _without_cost(self, phases_ns: dict[str, int], visits: Iterable[int]) -> dict[str, int]:
        """Phases in which the ledger's own cost stands where it belongs; none gets negative."""
        costs_ns = [
            min(count * self._cost_ns, ns) for count, ns in zip(visits, phases_ns.values(), strict=True)
        ]
        rest_ns = {
            phase: ns - cost_ns for (phase, ns), cost_ns in zip(phases_ns.items(), costs_ns, strict=True)
        }
        rest_ns["instrument"] += sum(costs_ns)
        return rest_ns


def _added_up(spent_ns: Iterable[int], moved_ns: Counter[str]) -> dict[str, int]:
    """What the cursor counted and what was moved later, by phase."""
    return {phase: ns + moved_ns[phase] for phase, ns in zip(PHASES, spent_ns, strict=True)}


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
