"""The one rule by which a program's ranks wait: a wait ends with somebody's entry.

A rank waited until the last entry of another member before its own exit, and that one is charged:

    wait = max(0, max{e_j : e_j <= x} - e)

with e and x the rank's own entry and exit, and e_j the entries of the others, all on one clock. Which ranks
an exchange cannot do without, its name does not tell: that hangs on its size, on the MPI and on the number of
ranks. Who came last before it was over does.

The others of a message are two, and only one of them can be late: the one who was out of MPI. So there e_j
are all its entries into MPI until its own end of the message was over, whatever it came with: a receive that
was begun in time moves nothing as long as nobody looks after it.

Exchanges are compared by columns, so that each of several processes can take a share of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]


def last_to_come(entries: Times, left: Times) -> tuple[Times, Times]:
    """Of exchanges [members, exchanges]: for each member the last entry of another one before it left, and
    which member that was; its own where nobody had come before.

    Takes a time that grows with the members by a logarithm more than their number.
    """
    members, count = entries.shape
    own = np.broadcast_to(np.arange(members)[:, None], entries.shape)
    if members < 2 or not count:
        return entries.copy(), own.copy()
    order = np.argsort(entries, axis=0, kind="stable")
    sorted_entries = np.take_along_axis(entries, order, axis=0)
    # All columns as one sorted array: each begins behind the end of the one before.
    span = sorted_entries[-1] - sorted_entries[0]
    starts = np.concatenate([[0], np.cumsum(span + 2)[:-1]])
    flat = (sorted_entries - sorted_entries[0] + starts).T.ravel()
    asked = np.clip(left - sorted_entries[0], 0, span) + starts
    place = np.searchsorted(flat, asked.ravel(), side="right").reshape(asked.shape) - 1
    place -= np.arange(count) * members
    came = np.take_along_axis(order, place, axis=0)
    place = np.where(came == own, place - 1, place)
    late = np.take_along_axis(order, np.maximum(place, 0), axis=0)
    late = np.where(place < 0, own, late)
    return np.take_along_axis(entries, late, axis=0), late


def last_before(entries: Times, left: Times) -> Times:
    """Where in one partner's sorted `entries` the last one stands before each moment of `left`; -1 if there
    is none."""
    return np.asarray(np.searchsorted(entries, left, side="right") - 1)
