"""What the same run would take on a network that costs nothing: the T_ideal of the POP metrics.

The ranks' exchanges are replayed with the computing between them as it was, exchanges that take no
time, and the same dependencies: a rank that cannot do without another still waits for it (Rosas, Giménez,
Labarta 2014, doi:10.14529/jsfi140201, whose tools simulate it likewise). What is lost then is serialisation
and imbalance; what the real run took longer is transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from rankwise.ledger.shares import Asks, Collect, Highest
from rankwise.ledger.waits import Log, Name, Pattern, Times, message_name

BLOCK = 32
"""Exchanges that ranks replay together at once."""

NEVER = -(2**61)
"""A time long before all others, to which one can be added."""


class IdealTime:
    """How long each rank would have waited so far; that and what it computed is its ideal clock."""

    def __init__(self, ranks: int) -> None:
        self._waited_ns: Times = np.zeros(ranks, np.int64)
        self._sent_ns: dict[Name, int] = {}
        self._unsent: list[tuple[int, Log]] = []

    def add(self, collective: Log, messages: list[Log]) -> None:
        """Replay collective exchanges [ranks, exchanges] and each rank's messages, in the order in which
        the rank made them."""
        moments = [np.where(_is_send(log), log["posted_ns"], log["left_ns"]) for log in messages]
        orders = [np.argsort(moment, kind="stable") for moment in moments]
        logs = [log[order] for log, order in zip(messages, orders, strict=True)]
        cuts = [
            # Exchanges in the background may end in another order than they began.
            np.maximum.accumulate(np.searchsorted(moment[order], row["entered_ns"], side="right"))
            for moment, order, row in zip(moments, orders, collective, strict=True)
        ]
        done = [0] * len(logs)
        for number in range(collective.shape[1]):
            until = [int(cut[number]) for cut in cuts]
            if until != done:
                self._messages([log[a:b] for log, a, b in zip(logs, done, until, strict=True)])
                done = until
            self._collective(collective[:, number])
        self._messages([log[a:] for log, a in zip(logs, done, strict=True)])

    def add_own(self, log: Log, rank: int) -> Asks:
        """The same for collective exchanges alone, together with all ranks, of which each has its own `log`
        only. Its time does not grow with the ranks but by that of finding the largest over all."""
        waited = int(self._waited_ns[rank])
        for start in range(0, len(log), BLOCK):
            waited = yield from _replayed(log[start : start + BLOCK], rank, waited)
        self._waited_ns = (yield Collect(np.array([waited]))).reshape(-1)
        return self._waited_ns

    def leave_out(self, survivors: list[int]) -> None:
        """Go on with these ranks alone; messages that are under way are lost."""
        self._waited_ns = self._waited_ns[survivors]
        self._sent_ns.clear()
        self._unsent.clear()

    def welcome(self, busy_ns: list[int]) -> None:
        """Let ranks in behind those that are here; `busy_ns` [ranks] is how long each has computed. Their
        ideal clocks begin where the latest of the others is."""
        here = len(self._waited_ns)
        latest = (self._waited_ns + busy_ns[:here]).max()
        self._waited_ns = np.append(self._waited_ns, latest - np.array(busy_ns[here:], np.int64))

    def ideal_ns(self, rank: int, busy_ns: int) -> int:
        """A rank's ideal clock when it has computed for `busy_ns` in all."""
        return int(self._waited_ns[rank]) + busy_ns

    def _collective(self, row: Log) -> None:
        came = row["posted_busy_ns"] + self._waited_ns
        here = row["entered_busy_ns"] + self._waited_ns
        pattern, root = row["pattern"][0], row["peer"][0]
        if pattern == Pattern.ALL_TO_ALL:
            self._waited_ns += np.maximum(came.max() - here, 0)
        elif pattern == Pattern.ALL_TO_ONE:
            self._waited_ns[root] += max(came.max() - here[root], 0)
        else:
            self._waited_ns += np.maximum(came[root] - here, 0)

    def _messages(self, logs: list[Log]) -> None:
        """Go on with any rank whose next message can be replayed: a receive comes after its send.

        Receives whose send is not logged yet are left for later, so that they hold up no other rank.
        """
        self._unsent = [late for late in self._unsent if not self._message(*late)]
        left = [deque(log) for log in logs]
        while any(left):
            moved = False
            for rank, rows in enumerate(left):
                while rows and self._message(rank, rows[0]):
                    rows.popleft()
                    moved = True
            if not moved:
                self._unsent += [(rank, rows.popleft()) for rank, rows in enumerate(left) if rows]

    def _message(self, rank: int, row: Log) -> bool:
        name = message_name(row, rank)
        if row["pattern"] == Pattern.SEND:
            self._sent_ns[name] = self.ideal_ns(rank, int(row["posted_busy_ns"]))
        elif name in self._sent_ns:
            here = self.ideal_ns(rank, int(row["entered_busy_ns"]))
            self._waited_ns[rank] += max(self._sent_ns.pop(name) - here, 0)
        else:
            return False
        return True


def _is_send(log: Log) -> NDArray[np.bool_]:
    return np.asarray(log["pattern"] == Pattern.SEND)


def _replayed(log: Log, rank: int, waited_ns: int) -> Generator[Highest, Log, int]:
    """How long a rank has waited when it has come through a few collective exchanges.

    An exchange m is over at M_m, when the last rank has come that it needs; a rank then has waited so that
    its clock is there. It comes to a later one n at M_m + D_nm, where D_nm is what it computed between. So
    the largest over all ranks of D, and of when they come if they waited for nothing, say all M.
    """
    pattern, root = log["pattern"], log["peer"]
    came, here = log["posted_busy_ns"], log["entered_busy_ns"]
    is_needed = (pattern != Pattern.ONE_TO_ALL) | (root == rank)
    waits = (pattern != Pattern.ALL_TO_ONE) | (root == rank)
    later, earlier = np.tril_indices(len(log), -1)
    between = np.where(is_needed[later] & waits[earlier], came[later] - here[earlier], NEVER)
    at_first = np.where(is_needed, came + waited_ns, NEVER)
    highest = yield Highest(np.concatenate([at_first, between]))
    over, between = highest[: len(log)].copy(), highest[len(log) :]
    for number in range(1, len(log)):
        row = between[number * (number - 1) // 2 :][:number]
        over[number] = max(over[number], (over[:number] + row).max())
    return int(np.where(waits, over - here, NEVER).max(initial=waited_ns))
