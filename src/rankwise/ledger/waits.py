"""Waiting apart from transfer, found from the times at which all ranks entered and left their exchanges.

The rules are Scalasca's wait-state patterns (Geimer et al. 2010, doi:10.1002/cpe.1556). With e and x
the entry and exit of a rank on the common clock, and E the moment at which the last of the ranks came that
it cannot do without:

    wait = min(max(E - e, 0), x - e)

- all to all ("Wait at NxN"): E is when the latest rank came;
- one to all ("Late Broadcast"): when the root came;
- all to one ("Early Reduce"): for the root when the latest sender came, for a sender when the root did;
- a receive ("Late Sender"): when the rank came that sent the message, also if any sender would do;
- a send ("Late Receiver"): when the receiver came, if the sender was still there (it was synchronous).

An MPI library chooses its own algorithm: a root may be unable to send before a receiver has come, and a
receiver may get its data through another. So a rank that came later than those that are needed, but
before this rank left, is taken to have held it up from then on.

A rank comes to an exchange when it posts it. It waits from when it has nothing else to do: for an
exchange in the background only from its `wait()`; what went on before was hidden behind computing.
The rest of an exchange is transfer.

A rank that did not run for a while inside an exchange (stopped, or without a core) holds up the others
as if it had come only then: what falls into its stall is their wait for it, and its own ``other``.

A late rank may itself have been waiting: a master hands out the mean late because a worker sent late.
The part of rank i's wait for r that falls into r's own wait for k, in the exchange before, is charged to k.

No rank waits longer than it was in an exchange by its own clock, also if that is longer on the common one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Log = NDArray[Any]
"""Exchanges as ranks logged them, of dtype ENTRY."""

Times = NDArray[np.int64]

ENTRY = np.dtype(
    [
        (name, "i8")
        for name in (
            "pattern",
            "peer",
            "number",
            "bytes",
            "posted_ns",
            "entered_ns",
            "left_ns",
            "inside_ns",
            "stall_start_ns",
            "stall_end_ns",
            "posted_busy_ns",
            "entered_busy_ns",
        )
    ]
)
"""`peer` is the root, or the other rank of a message; `number` counts collective exchanges, or the messages
from one rank to another; `inside_ns` is the time from `entered_ns` to `left_ns` on the rank's own clock; the
stall is the longest stretch in which the rank did not run in the exchange; the busy times are what the rank
had computed by then (`Ledger.busy_ns`)."""

TIMES = ("posted_ns", "entered_ns", "left_ns", "stall_start_ns", "stall_end_ns")


class Pattern(IntEnum):
    """Which ranks cannot do without which in an exchange."""

    ALL_TO_ALL = 0
    ALL_TO_ONE = 1
    ONE_TO_ALL = 2
    SEND = 3
    RECEIVE = 4


@dataclass(frozen=True)
class Split:
    """What some exchanges of one rank were made of, in ns.

    `wait_ns` and `late` [exchanges] say how long it waited in each, and for which rank (itself if it did not
    wait); `stopped_ns` [exchanges] is its own stalls; `charged_ns` adds the waiting up by the rank that
    caused it; `hidden_ns` is what went on behind its computing (at most: an exchange may have been over
    earlier).
    """

    wait_ns: Times
    late: Times
    stopped_ns: Times
    charged_ns: dict[int, int]
    hidden_ns: int


FOUND = np.dtype(
    [
        *((name, "i8") for name in ("wait_ns", "late", "stopped_ns", "hidden_ns", "contradicts")),
        ("causes", "i8", 6),
        ("charged_ns", "i8", 6),
    ]
)
"""What a comparison finds of one exchange of one rank, as `Split` has it: `charged_ns` is charged to
`causes`, less than nothing where a part goes on to whom that one waited for. `contradicts` is 1 if clocks
contradict each other in this exchange."""


def split(log: Log, rank: int) -> Split:
    """Split collective exchanges for one rank; `log` [ranks, exchanges], all ranks took part in all."""
    return summed(compare(log)[rank])


def summed(found: Log) -> Split:
    """What was found of some exchanges of one rank, added up."""
    causes, which = np.unique(found["causes"], return_inverse=True)
    charged = np.zeros(len(causes), np.int64)
    np.add.at(charged, which.ravel(), found["charged_ns"].ravel())
    return Split(
        wait_ns=found["wait_ns"].copy(),
        late=found["late"].copy(),
        stopped_ns=found["stopped_ns"].copy(),
        charged_ns={int(cause): int(ns) for cause, ns in zip(causes, charged, strict=True) if ns},
        hidden_ns=int(found["hidden_ns"].sum()),
    )


def compare(log: Log) -> Log:
    """What was waiting in collective exchanges [ranks, exchanges], of dtype FOUND, for all ranks.

    An exchange needs the one before it, for who held up the late one there: of the first one that is not
    known. Takes a time that grows with the ranks by a logarithm more than their number.
    """
    stages = _held_up(log)
    me = np.arange(len(log))[:, None]
    waited = [np.where(stage.cause == me, 0, stage.length) for stage in stages]
    found = np.zeros(log.shape, FOUND)
    found["wait_ns"] = sum(waited)
    found["stopped_ns"] = sum(stage.length for stage in stages) - found["wait_ns"]
    blamed = np.choose(np.argmax(waited, axis=0), [stage.cause for stage in stages])
    found["late"] = np.where(found["wait_ns"] > 0, blamed, me)
    found["hidden_ns"] = hidden(_until(log, stages[0].cause), log)
    found["contradicts"] = _contradicts(log)
    for place, stage in enumerate(stages):
        found["causes"][:, :, place] = stage.cause
        found["charged_ns"][:, :, place] = waited[place]
    # The parts of each wait in which the late one was held up itself, in the exchange before.
    first, before = stages[0], np.arange(log.shape[1] - 1)
    by, starts = first.cause[:, 1:], first.start[:, 1:]
    ends = starts + first.length[:, 1:]
    for place, stage in enumerate(stages, len(stages)):
        start, cause = stage.start[by, before], stage.cause[by, before]
        shared = overlap(starts, ends, start, start + stage.length[by, before])
        shared = np.where((cause != me) & (by != me), shared, 0)
        found["causes"][:, 1:, place], found["charged_ns"][:, 1:, place] = cause, shared
        found["charged_ns"][:, 1:, 0] -= shared
    return found


@dataclass(frozen=True)
class _Stage:
    """Stretches [ranks, exchanges] in which ranks were held up, and by which rank; one that held itself up
    was stopped."""

    start: Times
    length: Times
    cause: Times


def _held_up(log: Log) -> list[_Stage]:
    """What held up each rank in each exchange, one after the other: a rank that it could not do without and
    that had not come yet; one that came even later, though before it could leave; the stall of one."""
    exchanges = log.shape[1]
    posted, entered, left = log["posted_ns"], log["entered_ns"], log["left_ns"]
    late = _late(log)
    needed = _Stage(entered, wait_until(_until(log, late), entered, left), late)

    start = needed.start + needed.length
    until, latest = _last_before(posted, left)
    until, latest = np.maximum(start, until), np.where(until > start, latest, 0)
    sat_through = _Stage(start, until - start, latest)

    # One stall per exchange, the longest: a rank that sat through it had time for short ones beside it.
    stalled, columns = (log["stall_end_ns"] - log["stall_start_ns"]).argmax(axis=0), np.arange(exchanges)
    start = np.maximum(until, log["stall_start_ns"][stalled, columns])
    length = overlap(start, left, start, log["stall_end_ns"][stalled, columns])
    stall = _Stage(start, length, np.broadcast_to(stalled, log.shape))
    return list(_within(log["inside_ns"], needed, sat_through, stall))


def _last_before(posted: Times, left: Times) -> tuple[Times, Times]:
    """Of exchanges [ranks, exchanges]: for each rank when the last one came that came before it left, and
    which rank that was, the first of several. Nobody is long ago."""
    ranks, count = posted.shape
    order = np.argsort(posted, axis=0, kind="stable")
    came = np.take_along_axis(posted, order, axis=0)
    if not came.size:
        return came, order
    place = np.maximum.accumulate(
        np.where(np.diff(came, axis=0, prepend=came[:1] - 1) > 0, np.arange(ranks)[:, None], 0), axis=0
    )
    # All exchanges as one sorted array: each begins behind the end of the one before.
    span = came[-1] - came[0]
    starts = np.concatenate([[0], np.cumsum(span + 2)[:-1]])
    asked = np.clip(left - came[0], -1, span) + starts
    last = np.searchsorted((came - came[0] + starts).T.ravel(), asked.ravel(), side="right")
    last = last.reshape(asked.shape) - 1 - np.arange(count) * ranks
    first = np.take_along_axis(place, np.maximum(last, 0), axis=0)
    until = np.take_along_axis(came, first, axis=0)
    return np.where(last < 0, np.iinfo(np.int64).min, until), np.take_along_axis(order, first, axis=0)


def _within(inside_ns: Times, *stages: _Stage) -> Iterator[_Stage]:
    """The stages, cut where together they are longer than the rank was inside."""
    for stage in stages:
        length = np.minimum(stage.length, inside_ns)
        inside_ns = inside_ns - length
        yield _Stage(stage.start, length, stage.cause)


def _late(log: Log) -> Times:
    """The last to come of the ranks that each rank could not do without [ranks, exchanges]."""
    pattern, root = log["pattern"], log["peer"]
    is_root = root == np.arange(len(log))[:, None]
    for_all = (pattern == Pattern.ALL_TO_ALL) | ((pattern == Pattern.ALL_TO_ONE) & is_root)
    return np.where(for_all, log["posted_ns"].argmax(axis=0), root)


def _until(log: Log, late: Times) -> Times:
    return np.take_along_axis(log["posted_ns"], late, axis=0)


def violations(log: Log) -> int:
    """The number of exchanges of all [ranks, exchanges] in which clocks contradict each other: a rank left
    before another had come."""
    return int(_contradicts(log).sum())


def _contradicts(log: Log) -> NDArray[np.bool_]:
    too_early = log["left_ns"].min(axis=0) < log["posted_ns"].max(axis=0)
    return np.asarray(too_early & (log["pattern"][0] == Pattern.ALL_TO_ALL))


def wait_until(until: Times, entered: Times, left: Times) -> Times:
    """How much of the time from entering to leaving was before `until`."""
    # Clocks of several hosts may contradict each other so far that an exchange seems to end before it began.
    return np.asarray(np.minimum(np.maximum(until - entered, 0), np.maximum(left - entered, 0)))


def overlap(start: Times, end: Times, other_start: Times, other_end: Times) -> Times:
    """How long two stretches of time have in common."""
    return np.asarray(np.maximum(np.minimum(end, other_end) - np.maximum(start, other_start), 0))


def hidden(until: Times, row: Log) -> Times:
    """How long exchanges went on behind computing, once the others had come."""
    return np.asarray(np.maximum(row["entered_ns"] - np.maximum(until, row["posted_ns"]), 0))
