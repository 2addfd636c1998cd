"""Waiting told apart from transfer, from the times at which all ranks entered and left an exchange.

The rules are Scalasca's wait-state patterns (Geimer et al. 2010, doi:10.1002/cpe.1556). With e_i and
x_i the entry and exit of rank i on a common clock, and E the entry of whom rank i cannot do without:

    wait_i = min(max(E - e_i, 0), x_i - e_i)

all to all ("Wait at NxN"): E is the latest entry; one to all ("Late Broadcast"): the root's; all to
one ("Early Reduce"): for the root the latest sender's, for a sender the root's ("Late Receiver"). The
rest of an exchange is transfer.

Who is late may itself have been waiting: a master hands out the mean late because a worker sent late.
What of rank i's wait for r falls into r's own wait for k, in the exchange before, is charged to k.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Times = NDArray[np.int64]


class Pattern(IntEnum):
    """Who cannot do without whom in an exchange."""

    ALL_TO_ALL = 0
    ALL_TO_ONE = 1
    ONE_TO_ALL = 2


@dataclass(frozen=True)
class Split:
    """A rank's waiting in some exchanges, in ns, in all and by the rank that it waited for; and in how
    many of them the clocks contradict each other (somebody left before somebody else had come)."""

    wait_ns: int
    wait_on_ns: dict[int, int]
    violations: int


def split(log: Times, rank: int) -> Split:
    """Split the exchanges of a log for one rank.

    `log` [ranks, exchanges, 4] holds pattern, root, entry in ns and exit in ns, as each rank logged
    them; all ranks took part in all of them, in the same order.
    """
    enter, leave = log[:, :, 2], log[:, :, 3]
    waits, lates = zip(*(_waits(log, other) for other in range(len(log))), strict=True)
    wait, late = waits[rank], lates[rank]
    charged = np.zeros(len(log), np.int64)
    np.add.at(charged, late, wait)
    # The part of each wait in which the late one was waiting itself, in the exchange before.
    now, before = np.arange(1, log.shape[1]), np.arange(log.shape[1] - 1)
    by = late[now]
    start = enter[by, before]
    end = start + np.array(waits)[by, before]
    cause = np.array(lates)[by, before]
    shared = np.minimum(enter[rank, now] + wait[now], end) - np.maximum(enter[rank, now], start)
    shared = np.where((cause != rank) & (wait[now] > 0), np.maximum(shared, 0), 0)
    np.subtract.at(charged, by, shared)
    np.add.at(charged, cause, shared)
    all_to_all = log[rank, :, 0] == Pattern.ALL_TO_ALL
    contradicts = all_to_all & (leave.min(axis=0) < enter.max(axis=0))
    return Split(int(wait.sum()), {r: int(ns) for r, ns in enumerate(charged) if ns}, int(contradicts.sum()))


def _waits(log: Times, rank: int) -> tuple[Times, Times]:
    """How long a rank waited in each exchange, in ns, and for whom (itself where it did not)."""
    pattern, root = log[rank, :, 0], log[rank, :, 1]
    enter, leave = log[:, :, 2], log[:, :, 3]
    is_root = root == rank
    latest = enter.argmax(axis=0)
    for_all = (pattern == Pattern.ALL_TO_ALL) | ((pattern == Pattern.ALL_TO_ONE) & is_root)
    late = np.where(for_all, latest, root)
    until = enter[late, np.arange(log.shape[1])]
    wait = np.minimum(np.maximum(until - enter[rank], 0), leave[rank] - enter[rank])
    return wait, late
