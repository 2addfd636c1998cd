"""What the same run would take on a network that costs nothing: the T_ideal of the POP metrics.

The ranks' exchanges are replayed with the computing between them as it was, exchanges that take no
time, and the same dependencies: a rank that cannot do without another still waits for it (Rosas, Giménez,
Labarta 2014, doi:10.14529/jsfi140201, whose tools simulate it likewise). What is lost then is serialisation
and imbalance; what the real run took longer is transfer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from rankwise.ledger.messages import Name, names_of
from rankwise.ledger.shares import Asked, Asks, Collect, Give, Highest, Take
from rankwise.ledger.waits import ENTRY, Log, Pattern, Times

BLOCK = 32
"""Collective exchanges that ranks replay together at once."""

NEVER = -(2**61)
"""A time long before all others, to which one can be added."""

MESSAGE = np.dtype([*ENTRY.descr, ("segment", "i8")])
"""An end of a message, and how many collective exchanges of this comparison are replayed before it."""


class Turn(NamedTuple):
    """An end of a message that is to be replayed; `busy_ns` is what its rank had computed by then."""

    segment: int
    is_moved: bool
    name: Name
    is_send: bool
    busy_ns: int


class Replay(NamedTuple):
    """The messages of one rank for `add_own`: its own ends, as `in_segments` gives them; those of the others,
    as they came to it, and whose they are."""

    mine: Log
    theirs: Log
    owners: Times


class IdealTime:
    """How long each rank would have waited so far; that and what it computed is its ideal clock."""

    def __init__(self, ranks: int) -> None:
        self._waited_ns: Times = np.zeros(ranks, np.int64)
        self._sent_ns: dict[Name, int] = {}
        self._unsent: list[tuple[int, Turn]] = []

    def add(self, collective: Log, messages: Sequence[Log]) -> None:
        """Replay collective exchanges [ranks, exchanges] and each rank's messages, as one process that has
        the logs of all."""
        logs = [in_segments(its, row) for its, row in zip(messages, collective, strict=True)]
        sent = {
            name: int(segment)
            for rank, log in enumerate(logs)
            for name, segment in zip(names_of(log, rank), log["segment"], strict=True)
            if name[0] == rank
        }
        late, self._unsent = self._unsent, []
        turns = [
            self._in_order(rank, log, [turn for whose, turn in late if whose == rank], sent)
            for rank, log in enumerate(logs)
        ]
        for segment in range(collective.shape[1] + 1):
            self._messages([_of_segment(its, segment) for its in turns])
            if segment < collective.shape[1]:
                self._collective(collective[:, segment])

    def add_own(self, log: Log | None, rank: int, count: int, messages: Replay | None = None) -> Asks:
        """The same together with all ranks, of which each has its own `log` of `count` collective exchanges
        only (None of those that took no part) and, if any has some, its own messages.

        A message is replayed as it was made: its sender hands the receiver one number. So a rank's time grows
        with its own messages, and not with the ranks but by that of finding the largest over all.
        """
        waited = int(self._waited_ns[rank])
        turns: deque[Turn] = deque()
        coming: dict[int, deque[Name]] = {}
        begun = 0
        if messages is not None:
            turns, coming = self._own_turns(rank, messages)
            has_some = np.zeros(count + 1, np.int64)
            has_some[[turn.segment for turn in turns]] = 1
            for segment in np.flatnonzero((yield Highest(has_some))).tolist():
                waited = yield from _replayed(log, rank, waited, begun, segment)
                begun = segment
                waited = yield from self._own_messages(_of_segment(turns, segment), coming, rank, waited)
        waited = yield from _replayed(log, rank, waited, begun, count)
        for source, names in coming.items():  # whose receives are not over yet
            for name in names:
                self._sent_ns[name] = yield Take(source)
        self._waited_ns = (yield Collect(np.array([waited]))).reshape(-1)
        return self._waited_ns

    def _own_turns(self, rank: int, messages: Replay) -> tuple[deque[Turn], dict[int, deque[Name]]]:
        """This rank's ends in the order of the replay, and which messages come to it from whom."""
        sends = messages.theirs["pattern"] == Pattern.SEND
        rows, sources = messages.theirs[sends], messages.owners[sends]
        names = names_of(rows, sources)
        coming: dict[int, deque[Name]] = {}
        for source, name in zip(sources.tolist(), names, strict=True):
            coming.setdefault(source, deque()).append(name)
        late, self._unsent = self._unsent, []
        sent = dict(zip(names, rows["segment"].tolist(), strict=True))
        return self._in_order(rank, messages.mine, [turn for _, turn in late], sent), coming

    def _own_messages(
        self, turns: list[Turn], coming: dict[int, deque[Name]], rank: int, waited: int
    ) -> Generator[Asked, int, int]:
        for turn in turns:
            if turn.is_send:
                yield Give(turn.name[1], waited + turn.busy_ns)
                continue
            source = turn.name[0]
            while turn.name not in self._sent_ns:
                self._sent_ns[coming[source].popleft()] = yield Take(source)
            waited = max(waited, self._sent_ns.pop(turn.name) - turn.busy_ns)
        return waited

    def _in_order(self, rank: int, log: Log, late: list[Turn], sent: Mapping[Name, int]) -> deque[Turn]:
        """A rank's ends in the order of the replay: as it made them, but that a receive which ended before
        the segment of its send, as collective exchanges do not let go all ranks at once, comes at the end
        of that one. Those whose send is not logged yet are left for later."""
        is_send = log["pattern"] == Pattern.SEND
        busy = np.where(is_send, log["posted_busy_ns"], log["entered_busy_ns"])
        columns = log["segment"].tolist(), names_of(log, rank), is_send.tolist(), busy.tolist()
        turns = [Turn(segment, False, *of_it) for segment, *of_it in zip(*columns, strict=True)]
        placed = []
        for turn in [*late, *turns]:
            at = turn.segment if turn.is_send or turn.name in self._sent_ns else sent.get(turn.name)
            if at is None:
                self._unsent.append((rank, turn._replace(segment=-1)))
            else:
                placed.append(turn._replace(segment=max(at, turn.segment, 0), is_moved=at > turn.segment))
        return deque(sorted(placed, key=lambda turn: turn[:2]))

    def of(self, places: Sequence[int]) -> IdealTime:
        """That of these ranks alone; messages that are under way are lost."""
        its = IdealTime(0)
        its._waited_ns = self._waited_ns[list(places)]
        return its

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

    def _messages(self, turns: list[list[Turn]]) -> None:
        """Go on with any rank whose next message can be replayed: a receive comes after its send. What a rank
        made before it made a send came before it to its receiver, so one of them can go on."""
        left = {rank: deque(its) for rank, its in enumerate(turns) if its}
        while left:
            for rank, its in list(left.items()):
                while its and self._message(rank, its[0]):
                    its.popleft()
                if not its:
                    del left[rank]

    def _message(self, rank: int, turn: Turn) -> bool:
        here = self.ideal_ns(rank, turn.busy_ns)
        if turn.is_send:
            self._sent_ns[turn.name] = here
        elif turn.name in self._sent_ns:
            self._waited_ns[rank] += max(self._sent_ns.pop(turn.name) - here, 0)
        else:
            return False
        return True


def in_segments(messages: Log, collective: Log) -> Log:
    """A rank's messages as a table of MESSAGE, in the order in which it made them: a send when it was posted,
    a receive when it had come; `collective` are its collective exchanges."""
    moment = np.where(messages["pattern"] == Pattern.SEND, messages["posted_ns"], messages["left_ns"])
    order = np.argsort(moment, kind="stable")
    # Exchanges in the background may end in another order than they began.
    cuts = np.maximum.accumulate(np.searchsorted(moment[order], collective["entered_ns"], side="right"))
    log = np.zeros(len(messages), MESSAGE)
    for name in ENTRY.names or ():
        log[name] = messages[name][order]
    log["segment"] = np.searchsorted(cuts, np.arange(len(log)), side="right")
    return log


def _of_segment(turns: deque[Turn], segment: int) -> list[Turn]:
    """Takes the first of the turns, up to the end of a segment."""
    its = []
    while turns and turns[0].segment <= segment:
        its.append(turns.popleft())
    return its


def _replayed(log: Log | None, rank: int, waited_ns: int, begin: int, end: int) -> Generator[Asked, Log, int]:
    """How long a rank has waited when it has come through these collective exchanges, a block at a time."""
    for start in range(begin, end, BLOCK):
        count = min(BLOCK, end - start)
        if log is None:
            yield Highest(np.full(count * (count + 1) // 2, NEVER))
        else:
            waited_ns = yield from _block(log[start : start + count], rank, waited_ns)
    return waited_ns


def _block(log: Log, rank: int, waited_ns: int) -> Generator[Asked, Log, int]:
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
