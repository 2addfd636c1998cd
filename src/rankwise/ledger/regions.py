"""Stretches of a program that it has given a name, nested, in the thread that a rank's time is that of."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rankwise.errors import ConfigError
from rankwise.ledger.phases import Ledger
from rankwise.ledger.waits import Times

Path = tuple[str, ...]
"""The name of a region behind those of the regions around it."""

KEPT = 4096
"""Regions that are remembered behind a comparison, for exchanges that are compared only in the next one."""


class Collector(Protocol):
    """What takes note of the regions of the running thread."""

    def begin(self, name: str) -> None:
        """A region begins inside those that are open."""

    def end(self) -> None:
        """The innermost one ends."""


class _Here(threading.local):
    collector: Collector | None = None


_here = _Here()


def collect_in(collector: Collector | None) -> None:
    """From now on regions of the running thread are `collector`'s."""
    _here.collector = collector


@contextmanager
def region(name: str) -> Iterator[None]:
    """Name a stretch of a program: what its ranks did there stands in the record, the report and the trace,
    in a program with a `Run` as in one that uses mpi4py alone. Regions may nest.

        with rankwise.region("load"):
            ...

    Other threads than the one that the rank's time is that of, and programs that rankwise does not account
    for, pass through it. Raises ConfigError if `name` is no text, or empty.
    """
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"region({name!r}): a region needs a name, a text that is not empty")
    collector = _here.collector
    if collector is None:
        yield
        return
    collector.begin(name)
    try:
        yield
    finally:
        collector.end()


@dataclass
class RegionTime:
    """What a rank did in the regions of one path: `phases_ns` is what its ledger counted there, regions
    inside included, which adds up to their length."""

    count: int = 0
    phases_ns: Counter[str] = field(default_factory=Counter)


@dataclass
class _Open:
    path: Path
    start_ns: int
    before_ns: Counter[str]
    found_ns: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Stretch:
    """One region that is over, on the rank's own clock."""

    path: Path
    start_ns: int
    end_ns: int


class LedgerRegions:
    """The regions of a rank that has a ledger.

    What was waiting inside is known later: `found` moves it where it was.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._open: list[_Open] = []
        self._with_exchanges: list[Stretch] = []
        self._times: dict[Path, RegionTime] = {}
        self.recent: deque[Stretch] = deque(maxlen=KEPT)
        """The last of those that are over."""

    def begin(self, name: str) -> None:
        """A region begins inside those that are open."""
        path = (*(self._open[-1].path if self._open else ()), name)
        self._open.append(_Open(path, *self._reading()))

    def end(self) -> None:
        """The innermost one ends."""
        one = self._open.pop()
        end_ns, after_ns = self._reading()
        spent_ns = after_ns.copy()
        spent_ns.subtract(one.before_ns)
        its = self._times.setdefault(one.path, RegionTime())
        its.count += 1
        its.phases_ns.update(spent_ns)
        its.phases_ns.update(one.found_ns)
        stretch = Stretch(one.path, one.start_ns, end_ns)
        self.recent.append(stretch)
        if spent_ns["transfer"]:
            self._with_exchanges.append(stretch)

    def found(self, left_ns: Times, wait_ns: Times, stopped_ns: Times) -> None:
        """These exchanges, which ended at `left_ns`, were waiting and stops so far."""
        for target, ns in (("wait", wait_ns), ("other", stopped_ns)):
            for one in self._open:
                _move(one.found_ns, target, int(ns[left_ns > one.start_ns].sum()))
            for stretch in self._with_exchanges if ns.any() else ():
                inside = (left_ns > stretch.start_ns) & (left_ns <= stretch.end_ns)
                _move(self._times[stretch.path].phases_ns, target, int(ns[inside].sum()))
        self._with_exchanges = self._with_exchanges[-KEPT:]

    def times(self) -> dict[Path, RegionTime]:
        """What is known by now of those that are over."""
        return self._times

    def _reading(self) -> tuple[int, Counter[str]]:
        ledger = self._ledger
        ledger.enter(ledger.running)
        return ledger.mark_ns, Counter(ledger.spent_ns)


def _move(phases_ns: Counter[str], target: str, ns: int) -> None:
    phases_ns["transfer"] -= ns
    phases_ns[target] += ns


def inside(starts: Times, ends: Times, times: Times) -> Times:
    """For each moment the last of some stretches, in order of time, in which it lies; -1 for none."""
    place = np.searchsorted(starts, times, side="right") - 1
    return np.where((place >= 0) & (times < ends[place]), place, -1)
