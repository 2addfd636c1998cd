"""Comparing logs where each rank compares its share of the exchanges for all ranks.

Logs are transposed, not gathered: a rank hands each other one its rows of that one's share, and gets back
what was found of its own. So it holds as many rows as it logged itself, or those of one exchange of all ranks
if they are more, and its time grows with the ranks by a logarithm.

What ranks hand each other is asked for by `yield`, so that nothing here knows what carries it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rankwise.ledger.waits import FOUND, Log, Times, compare


@dataclass(frozen=True)
class Swap:
    """Asks to hand each rank its part: rows of one dtype in rank order, `counts` [ranks] of them for each.
    Gives what the others had for this one, in rank order, `counts_in` of each."""

    rows: Log
    counts: Times
    counts_in: Times


@dataclass(frozen=True)
class Highest:
    """Asks for the largest of each number over all ranks."""

    values: Times


@dataclass(frozen=True)
class Collect:
    """Asks for the numbers of all ranks, in rank order [ranks, ...]."""

    values: Times


@dataclass(frozen=True)
class Give:
    """Asks to hand one rank a number, which need not be looked at before this rank goes on. Gives nothing."""

    to: int
    value: int


@dataclass(frozen=True)
class Take:
    """Asks for the next number that one rank hands this one: they come in the order in which they were
    given."""

    source: int


Asked = Swap | Highest | Collect | Give | Take

Asks = Generator[Asked, Any, Any]
"""What a rank goes through together with all others, and what it then has."""


def compare_shares(rank: int, ranks: int, log: Log, together: int | None = None) -> Asks:
    """What was waiting in the collective exchanges of this rank, of dtype FOUND, as `compare` finds it from
    the logs of all. `log` are this rank's rows; the first ranks, of this number (all if None), have the same
    exchanges, and the others none."""
    together = ranks if together is None else together
    none = np.zeros(ranks, np.int64)
    if rank >= together:
        yield Swap(log[:0], none, none)
        return (yield Swap(np.zeros(0, FOUND), none, none))
    starts, firsts, ends = _shares(together, len(log))
    widths = ends - firsts
    own = np.repeat(firsts - (np.cumsum(widths) - widths), widths) + np.arange(widths.sum())
    with_me = np.arange(ranks) < together
    given = yield Swap(log[own], _padded(widths, ranks), np.where(with_me, widths[rank], 0))
    found = compare(given.reshape(together, widths[rank]))[:, starts[rank] - firsts[rank] :]
    counts = np.where(with_me, ends[rank] - starts[rank], 0)
    return (yield Swap(found.ravel(), counts, _padded(ends - starts, ranks)))


def deal(rows: Log, to: Times, ranks: int) -> Generator[Asked, Any, tuple[Log, Times]]:
    """Hand out rows, each to the rank of `to` [rows]. Gives those for this one, in rank order and in the
    order in which each had them, and whose they are."""
    counts, one = np.bincount(to, minlength=ranks), np.ones(ranks, np.int64)
    counts_in = yield Swap(counts, one, one)
    given = yield Swap(rows[np.argsort(to, kind="stable")], counts, counts_in)
    return given, np.repeat(np.arange(ranks), counts_in)


def _shares(ranks: int, exchanges: int) -> tuple[Times, Times, Times]:
    """Where each rank's share begins and ends, and where the rows that it needs begin: with the exchange
    before, for who held up the late ones there."""
    bounds = np.arange(ranks + 1) * exchanges // ranks
    starts, ends = bounds[:-1], bounds[1:]
    return starts, np.where(ends > starts, np.maximum(starts - 1, 0), starts), ends


def _padded(counts: Times, ranks: int) -> Times:
    return np.pad(counts, (0, ranks - len(counts)))
