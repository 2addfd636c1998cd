"""What the same run would take on a network that costs nothing: the T_ideal of the POP metrics.

The ranks' exchanges are replayed with the computing between them as it was, exchanges that take no
time, and the same dependencies: who cannot do without whom still waits (Rosas, Giménez, Labarta 2014,
doi:10.14529/jsfi140201, whose tools simulate it likewise). What is lost then is serialisation and
imbalance; what the real run took longer is transfer.
"""

from __future__ import annotations

import numpy as np

from rankwise.world.waits import Log, Pattern, Times


class Replay:
    """Ideal clocks of all ranks, moved on with every settled piece of the log."""

    def __init__(self, ranks: int) -> None:
        self.clock_ns: Times = np.zeros(ranks, np.int64)
        self._busy_ns: Times = np.zeros(ranks, np.int64)
        self._sent_ns: dict[tuple[int, int, int], int] = {}

    def add(self, collective: Log, messages: list[Log]) -> None:
        """Replay collective exchanges [ranks, exchanges], and each rank's messages before them.

        Messages between two collective exchanges are taken in order of time; those that ended after
        the last exchange come at its end.
        """
        pieces = [
            np.searchsorted(log["left_ns"], collective[rank]["entered_ns"])
            for rank, log in enumerate(messages)
        ]
        done = [0] * len(messages)
        some = any(len(log) for log in messages)
        for number in range(collective.shape[1]):
            if some:
                until = [int(piece[number]) for piece in pieces]
                self._messages([log[a:b] for log, a, b in zip(messages, done, until, strict=True)])
                done = until
            self._collective(collective[:, number])
        if some:
            self._messages([log[a:] for log, a in zip(messages, done, strict=True)])

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
        ends = sorted(
            (int(row["posted_ns"] if row["pattern"] == Pattern.SEND else row["left_ns"]), rank, place)
            for rank, log in enumerate(logs)
            for place, row in enumerate(log)
        )
        for _, rank, place in ends:
            row = logs[rank][place]
            peer, number = int(row["peer"]), int(row["number"])
            here = self.ideal_ns(rank, int(row["entered_busy_ns"]))
            if row["pattern"] == Pattern.SEND:
                self._sent_ns[rank, peer, number] = self.ideal_ns(rank, int(row["posted_busy_ns"]))
            else:
                here = max(here, self._sent_ns.pop((peer, rank, number)))
            self.clock_ns[rank], self._busy_ns[rank] = here, row["entered_busy_ns"]
