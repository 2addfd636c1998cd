"""What the same run would take on a network that costs nothing: the T_ideal of the POP metrics.

The ranks' exchanges are replayed with the computing between them as it was, exchanges that take no
time, and the same dependencies: who cannot do without whom still waits (Rosas, Giménez, Labarta 2014,
doi:10.14529/jsfi140201, whose tools simulate it likewise). What is lost then is serialisation and
imbalance; what the real run took longer is transfer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rankwise.world.waits import Log, Pattern, Times


class Replay:
    """Ideal clocks of all ranks, moved on with every settled piece of the log."""

    def __init__(self, ranks: int) -> None:
        self.clock_ns: Times = np.zeros(ranks, np.int64)
        self._busy_ns: Times = np.zeros(ranks, np.int64)
        self._sent_ns: dict[tuple[int, int, int], int] = {}

    def add(self, collective: Log, messages: list[Log]) -> None:
        """Replay collective exchanges [ranks, exchanges] and each rank's messages, in the order in which
        the rank made them."""
        moments = [np.where(_is_send(log), log["posted_ns"], log["left_ns"]) for log in messages]
        orders = [np.argsort(moment, kind="stable") for moment in moments]
        logs = [log[order] for log, order in zip(messages, orders, strict=True)]
        cuts = [
            np.searchsorted(moment[order], row["entered_ns"], side="right")
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

    def ideal_ns(self, rank: int, busy_ns: int) -> int:
        """A rank's ideal clock, now that it has computed for `busy_ns` in all."""
        return int(self.clock_ns[rank] + busy_ns - self._busy_ns[rank])

    def _collective(self, row: Log) -> None:
        came = self.clock_ns + row["posted_busy_ns"] - self._busy_ns
        here = self.clock_ns + row["entered_busy_ns"] - self._busy_ns
        pattern, root = row["pattern"][0], row["peer"][0]
        if pattern == Pattern.ALL_TO_ALL:
            here = np.maximum(here, came.max())
        elif pattern == Pattern.ALL_TO_ONE:
            here[root] = max(here[root], came.max())
        else:
            here = np.maximum(here, came[root])
        self.clock_ns, self._busy_ns = here, row["entered_busy_ns"].copy()

    def _messages(self, logs: list[Log]) -> None:
        """Go on with any rank whose next message can be replayed, a receive only after its send."""
        left = [list(log) for log in logs]
        moved = True
        while moved:
            moved = False
            for rank, rows in enumerate(left):
                while rows and self._message(rank, rows[0]):
                    rows.pop(0)
                    moved = True

    def _message(self, rank: int, row: Log) -> bool:
        peer, number = int(row["peer"]), int(row["number"])
        if row["pattern"] == Pattern.SEND:
            busy_ns = int(row["posted_busy_ns"])
            here = self._sent_ns[rank, peer, number] = self.ideal_ns(rank, busy_ns)
        elif (peer, rank, number) in self._sent_ns:
            busy_ns = int(row["entered_busy_ns"])
            here = max(self.ideal_ns(rank, busy_ns), self._sent_ns.pop((peer, rank, number)))
        else:
            return False
        self.clock_ns[rank], self._busy_ns[rank] = here, busy_ns
        return True


def _is_send(log: Log) -> NDArray[np.bool_]:
    return np.asarray(log["pattern"] == Pattern.SEND)
