"""Faults on demand: what `--fault` asks for, and the moments at which it strikes.

They strike where real ones do: a kill is a SIGKILL of the process itself, in the middle of what it was
doing. Before a fault strikes its rank leaves a mark in the run folder, which tells the others, and a run
that goes on later, what it was and when.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np

from rankwise.errors import ConfigError, StorageError, unknown_name
from rankwise.ledger.phases import Ledger
from rankwise.survival.harm import Harm
from rankwise.system.files import write_atomically

Kind = Literal["sleep", "slow", "crash", "kill", "hang", "nan", "drop-host", "cut"]
Moment = Literal["compute", "exchange", "evaluation", "checkpoint", "recovery"]

OF_HOSTS = ("drop-host", "cut")
"""Kinds that strike all ranks of a host."""

DEADLY = ("crash", "kill", "hang", *OF_HOSTS)
"""Kinds after which a rank does not come back by itself."""

_KEYS = {"rank": int, "epoch": int, "step": int, "phase": str, "p": float, "seconds": float, "factor": float}
_ONLY = {"seconds": "sleep", "factor": "slow"}


class InjectedCrash(Exception):  # it stands for any exception of a user's code
    """The exception of `--fault crash`."""


@dataclass(frozen=True)
class PlannedFault:
    """One `--fault`.

    With a probability `p` every rank (or `rank` alone) draws in each epoch (or in `epoch` alone) whether it
    strikes, and in which step; without, it strikes once. In the phases `checkpoint`, `evaluation` and
    `recovery`, `step` counts the points at which a rank can be struck there.
    """

    kind: Kind
    rank: int | None = None
    epoch: int | None = None
    step: int | None = None
    phase: Moment = "compute"
    p: float | None = None
    seconds: float = 1.0
    factor: float = 2.0

    def step_for(self, rank: int, epoch: int, steps: int, seed: Sequence[int]) -> int | None:
        """The step of this epoch at which a rank is struck, None if it is not."""
        if self.rank not in (None, rank) or self.epoch not in (None, epoch):
            return None
        if self.p is None:
            return self.step or 1
        draw = np.random.default_rng([*seed, epoch, rank])
        strikes, step = draw.random() < self.p, 1 + int(draw.integers(max(steps, 1)))
        if not strikes:
            return None
        return self.step or (step if self.phase in ("compute", "exchange") else 1)


@functools.cache
def parse_fault(text: str) -> PlannedFault:
    """A fault as given: ``KIND:KEY=VALUE,KEY=VALUE``. Raises ConfigError, one line."""
    kind, _, rest = text.partition(":")
    if kind not in get_args(Kind):
        raise ConfigError(f"--fault {text}: {unknown_name('kind', kind, get_args(Kind))}")
    values: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in _KEYS:
            raise ConfigError(f"--fault {text}: {unknown_name('key', key, _KEYS)}")
        try:
            values[key] = _KEYS[key](value)
        except ValueError:
            raise ConfigError(f"--fault {text}: {key} is {value!r}, expected {_KEYS[key].__name__}") from None
    plan = PlannedFault(kind, **values)  # type: ignore[arg-type]
    _check(text, plan, values)
    return plan if plan.p is not None or plan.epoch else dataclasses.replace(plan, epoch=1)


def _check(text: str, plan: PlannedFault, values: dict[str, object]) -> None:
    def require(holds: bool, expected: str) -> None:
        if not holds:
            raise ConfigError(f"--fault {text}: expected {expected}")

    if plan.phase not in get_args(Moment):
        raise ConfigError(f"--fault {text}: {unknown_name('phase', plan.phase, get_args(Moment))}")
    for key, kind in _ONLY.items():
        require(key not in values or plan.kind == kind, f"{key} only for {kind}")
    require(plan.rank is not None or plan.p is not None, "rank=N, or p=PROBABILITY for all ranks")
    require(plan.rank is None or plan.rank >= 0, "rank of 0 or more")
    require(plan.epoch is None or plan.epoch >= 1, "epoch of 1 or more")
    require(plan.step is None or plan.step >= 1, "step of 1 or more")
    require(plan.p is None or 0 <= plan.p <= 1, "p between 0 and 1")
    require(plan.seconds >= 0, "seconds of 0 or more")
    require(plan.factor >= 1, "factor of 1 or more")
    if plan.kind in ("slow", "nan"):
        require(plan.phase == "compute", f"phase=compute for {plan.kind}")


@dataclass(frozen=True)
class Mark:
    """That a fault has struck: which `plan` of the run, whom and where, and when, in seconds of the Unix
    clock."""

    plan: int
    kind: str
    rank: int
    epoch: int
    step: int
    at_s: float


def read_marks(folder: Path) -> list[Mark]:
    """The faults that have struck in a run, in the order of time."""
    found = []
    for path in folder.glob("*.json"):
        try:
            found.append(Mark(**json.loads(path.read_bytes())))
        except (OSError, ValueError, TypeError) as error:
            raise StorageError(f"{path} is damaged: {error}") from None
    return sorted(found, key=lambda mark: mark.at_s)


class Exchanging(Protocol):
    """A rank's exchanges, in which faults strike, and the ledger to which a fault's sleep is charged."""

    ledger: Ledger

    def at_each_exchange(self, action: Callable[[], None]) -> AbstractContextManager[None]:
        """Inside, `action` is called in each exchange of the rank."""


class NoFaults:
    """What strikes when nothing was asked for: nothing."""

    def begin(self, epoch: int, steps: int) -> None:
        """An epoch of `steps` steps begins."""

    def step(self, step: int) -> None:
        """A step begins."""

    def at(self, moment: Moment) -> None:
        """A point at which a rank can be struck."""

    def during(self, moment: Moment) -> AbstractContextManager[None]:
        """Inside, each exchange is such a point, between its start and its end."""
        return nullcontext()


class Faults(NoFaults):
    """The faults that strike one rank, in or between its `exchanges`: `harm` does what ends or stops it,
    `poison` makes its gradients no numbers."""

    def __init__(
        self,
        plans: Sequence[PlannedFault],
        folder: Path,
        *,
        rank: int,
        seed: int,
        exchanges: Exchanging,
        harm: Harm,
        poison: Callable[[], None],
    ) -> None:
        self._plans = plans
        self._folder = folder
        self._rank = rank
        self._seed = seed
        self._exchanges = exchanges
        self._harm = harm
        self._poison = poison
        self._over = {(mark.plan, mark.epoch) for mark in read_marks(folder) if mark.rank == rank}
        self._due: dict[int, int] = {}
        self._epoch = self._step = 0
        self._step_began_s = 0.0
        self._points = 0

    def begin(self, epoch: int, steps: int) -> None:
        self._epoch, self._step = epoch, 0
        drawn = {
            number: plan.step_for(self._rank, epoch, steps, (self._seed, number))
            for number, plan in enumerate(self._plans)
        }
        self._due = {number: step for number, step in drawn.items() if step is not None}

    def step(self, step: int) -> None:
        self._step, self._step_began_s = step, time.monotonic()

    def at(self, moment: Moment) -> None:
        point = self._step if moment in ("compute", "exchange") else self._points
        for number, step in self._due.items():
            plan = self._plans[number]
            if plan.phase != moment or point < step:
                continue
            if plan.kind == "slow":
                self._mark_once(number)
                time.sleep((plan.factor - 1) * (time.monotonic() - self._step_began_s))
            elif self._mark_once(number):
                self._strike(plan)

    @contextmanager
    def during(self, moment: Moment) -> Iterator[None]:
        def point() -> None:
            self._points += 1
            self.at(moment)

        before, self._points = self._points, 0
        try:
            if moment != "exchange":
                point()
            with self._exchanges.at_each_exchange(point):
                yield
        finally:
            self._points = before

    def _mark_once(self, number: int) -> bool:
        """Leave the mark of a fault; returns False if it was left before."""
        plan = self._plans[number]
        # One that strikes once does so in one epoch; a resumed run trains that epoch again, without it.
        epoch = self._epoch if plan.p is not None else plan.epoch or self._epoch
        if (number, epoch) in self._over:
            return False
        self._over.add((number, epoch))
        mark = Mark(number, plan.kind, self._rank, epoch, self._step, time.time())
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"{number}-epoch-{epoch:04d}-rank-{self._rank:04d}.json"
        write_atomically(path, json.dumps(dataclasses.asdict(mark)).encode())
        return True

    def _strike(self, plan: PlannedFault) -> None:
        if plan.kind == "sleep":
            with self._exchanges.ledger.phase("other"):
                time.sleep(plan.seconds)
        elif plan.kind == "nan":
            self._poison()
        elif plan.kind == "kill":
            self._harm.kill()
        elif plan.kind == "hang":
            self._harm.hang()
        elif plan.kind == "drop-host":
            self._harm.drop_host()
        elif plan.kind == "cut":
            self._harm.cut_links()
        else:
            raise InjectedCrash(f"rank {self._rank} was asked to crash")
