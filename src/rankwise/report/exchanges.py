"""The exchanges in the timelines of all ranks: each with its waiting apart, and who sent to whom."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from rankwise.ledger.timeline import RankTimeline
from rankwise.ledger.waits import Pattern

_TITLES = {
    Pattern.ALL_TO_ALL: "all to all",
    Pattern.ALL_TO_ONE: "all to rank {root}",
    Pattern.ONE_TO_ALL: "rank {root} to all",
    Pattern.SEND: "send to rank {peer}",
    Pattern.RECEIVE: "receive from rank {peer}",
}

Key = tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """One rank's part in an exchange; times in ns since the run's start.

    It came at `posted_ns`, which in the background is before `entered_ns`; it was waiting for rank `late`
    from `entered_ns` to `transfer_ns`, and in transfer until `left_ns`. All parts of one exchange have
    the same `key`: its number, for a message source and destination too.
    """

    rank: int
    pattern: Pattern
    peer: int
    key: Key
    posted_ns: int
    entered_ns: int
    transfer_ns: int
    left_ns: int
    late: int
    bytes: int

    @property
    def title(self) -> str:
        """What it is, in words."""
        return _TITLES[self.pattern].format(root=self.peer, peer=self.peer)


def read_exchanges(timelines: list[RankTimeline], slack_ns: int) -> list[Exchange]:
    """The exchanges in all timelines.

    Clocks of several hosts agree within `slack_ns`: so near, waiting ends when the rank that was waited
    for came, by its own timeline, lest an arrow from it point backwards.
    """
    rows = [(t.rank, _key(t.rank, row), row) for t in timelines for row in t.exchanges]
    posted_ns = {(rank, key): int(row["posted_ns"]) for rank, key, row in rows}
    found = []
    for rank, key, row in rows:
        entered_ns, left_ns, late = int(row["entered_ns"]), int(row["left_ns"]), int(row["late"])
        transfer_ns = entered_ns + int(row["wait_ns"])
        came_ns = posted_ns.get((late, key), transfer_ns)
        if row["wait_ns"] and abs(came_ns - transfer_ns) <= slack_ns:
            transfer_ns = min(max(came_ns, entered_ns), left_ns)
        found.append(
            Exchange(
                rank=rank,
                pattern=Pattern(row["pattern"]),
                peer=int(row["peer"]),
                key=key,
                posted_ns=int(row["posted_ns"]),
                entered_ns=entered_ns,
                transfer_ns=transfer_ns,
                left_ns=left_ns,
                late=late,
                bytes=int(row["bytes"]),
            )
        )
    return found


def arrows(exchanges: Iterable[Exchange]) -> Iterator[tuple[Exchange, Exchange]]:
    """Who sent to whom: pairs of the two ends' parts.

    In an exchange of all with all only those that were waited for have arrows, to who waited. A pair of
    which one end is not in the timelines has none, nor one whose times contradict each other.
    """
    parts: dict[Key, dict[int, Exchange]] = defaultdict(dict)
    for exchange in exchanges:
        parts[exchange.key][exchange.rank] = exchange
    for ranks in parts.values():
        for source, target in _pairs(ranks):
            if source.posted_ns <= target.transfer_ns < target.left_ns:
                yield source, target


def _pairs(ranks: dict[int, Exchange]) -> Iterator[tuple[Exchange, Exchange]]:
    for one in ranks.values():
        other = ranks.get(one.late if one.pattern == Pattern.ALL_TO_ALL else one.peer)
        if other is None or other.rank == one.rank:
            continue
        if one.pattern in (Pattern.ALL_TO_ONE, Pattern.SEND):
            yield one, other
        elif one.pattern in (Pattern.ALL_TO_ALL, Pattern.ONE_TO_ALL):
            yield other, one


def _key(rank: int, row: Any) -> Key:
    number, peer = int(row["number"]), int(row["peer"])
    match Pattern(row["pattern"]):
        case Pattern.SEND:
            return number, rank, peer
        case Pattern.RECEIVE:
            return number, peer, rank
        case _:
            return (number,)
