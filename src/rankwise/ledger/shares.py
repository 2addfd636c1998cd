"""Comparing logs where each rank compares its share of the exchanges for all ranks.

Logs are transposed, not gathered: a rank hands each other one its rows of that one's share, and gets back
what was found of its own. So it holds as many rows as it logged itself, or those of one exchange of all ranks
if they are more, and its time grows with the ranks by a logarithm.

What ranks hand each other is asked for by `yield`, so that nothing here knows what carries it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from rankwise.ledger.waits import Log, Times, compare


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


Asks = Generator[Swap | Highest | Collect, Log, Log]
"""What a rank goes through together with all others, and what it then has."""


def compare_shares(rank: int, ranks: int, log: Log) -> Asks:
    """What was waiting in the collective exchanges of this rank, of dtype FOUND, as `compare` finds it from
    the logs of all. `log` are this rank's rows; all ranks have the same exchanges."""
    starts, firsts, ends = _shares(ranks, len(log))
    widths = ends - firsts
    own = np.repeat(firsts - (np.cumsum(widths) - widths), widths) + np.arange(widths.sum())
    given = yield Swap(log[own], widths, np.full(ranks, widths[rank]))
    found = compare(given.reshape(ranks, widths[rank]))[:, starts[rank] - firsts[rank] :]
    counts = np.full(ranks, ends[rank] - starts[rank])
    return (yield Swap(found.ravel(), counts, ends - starts))


def _shares(ranks: int, exchanges: int) -> tuple[Times, Times, Times]:
    """Where each rank's share begins and ends, and where the rows that it needs begin: with the exchange
    before, for who held up the late ones there."""
    bounds = np.arange(ranks + 1) * exchanges // ranks
    starts, ends = bounds[:-1], bounds[1:]
    return starts, np.where(ends > starts, np.maximum(starts - 1, 0), starts), ends
