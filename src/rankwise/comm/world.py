"""One rank's view of all ranks: who they are, also when some are lost, and what they exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rankwise.comm.exchanges import Exchanges, nothing_owed
from rankwise.comm.transport import Transport
from rankwise.errors import RankLost
from rankwise.ledger.exchange_log import Chunk, Closed
from rankwise.ledger.ideal_time import IdealTime
from rankwise.ledger.phases import Ledger
from rankwise.ledger.waits import Times

_Report = tuple[bool, Any, Times]
"""Whether a rank is new, what it tells of itself, and what there is in its last chunk."""


class World(Exchanges):
    """All ranks as this one sees them, and its exchanges with them.

    `stopping` is set where the run is asked to end (by a signal handler); strategies carry it to all ranks
    with the next synchronisation, so that all of them stop at the same point. It is True too while this rank
    is `irregular`: it has left its loop or made no step, of which the others are to hear in the same way.

    `at_end` is called, and `whereabouts` says how far this rank has come, when its program ends. `open_loop`
    says where a loop stands that has the exchanges to itself, empty if none does.

    `members` are the numbers that the ranks began with, `number` this one's: they stay when ranks are lost
    and `rank` changes. With `survives` the others go on if this rank ends.
    """

    def __init__(self, transport: Transport, ledger: Ledger | None = None) -> None:
        super().__init__(transport, ledger or Ledger())
        self.asked_to_stop = self.irregular = False
        self.at_end: Callable[[], None] = nothing_owed
        self.whereabouts: Callable[[], str] = str
        self.open_loop: Callable[[], str] = str
        self.number = transport.rank
        self.members = list(range(transport.size))
        self.in_threads = transport.in_threads
        self.survives = False
        self._is_new = False
        self._refused = False

    @property
    def stopping(self) -> bool:
        """Whether exchanges are to carry to all ranks that this one stops, or has left its loop."""
        return self.asked_to_stop or self.irregular

    @stopping.setter
    def stopping(self, asked: bool) -> None:
        self.asked_to_stop = asked

    def farewell(self) -> None:
        """This rank's program is at its end: do what it still owes the others, or raise what is wrong."""
        self.settle()
        self.at_end()
        self.settle()

    def set_aside(self, ranks: int) -> None:
        """The ranks from this number on stand by: their `rank` is -1 until `stand_by` has come to its end.
        All ranks together."""
        if ranks >= self.size:
            return
        chunk = self.exchange_log.last_chunk()
        reports = self.allgather_object((False, None, chunk.standing))[:ranks]
        self._transport.set_aside(ranks)
        self._take_place()
        self.members = list(range(ranks))
        if self.rank >= 0:
            self._clock = self._measured_clock()
            self.exchange_log.leave_out(*self._closed(chunk, reports), self.members, self._clock)

    def stand_by(self) -> list[Any] | None:
        """Sleep until this rank has taken the place of one that was lost, or the others are done.

        Returns what `repair` does, with None for this one's standing; or None.
        """
        self._is_new = True

        def alive() -> None:
            self.ledger.enter("other")

        while self._transport.stand_by(alive):
            with self.ledger.phase("recovery"):
                standings = self._regroup(None, fill=True)
            if standings is not None:
                return standings
        return None

    def arrive(self, ideal_time: IdealTime) -> None:
        """This rank, which stood by, is one like the others from now on, and goes on from their ideal
        time."""
        self._is_new = False
        self.exchange_log.ideal_time = ideal_time

    def repair(self, standing: Any = None, *, fill: bool = True) -> list[Any]:
        """Go on without ranks that were lost; all that are left call it, after an exchange raised RankLost.

        With `fill` ranks that stand by take the places of those that were lost, behind those that are
        left. Each gives its `standing` (picklable); returns those of all, in the order of their new ranks,
        None for those that have just come. `rank`, `size` and `members` are new. If more are lost meanwhile
        it begins again by itself.
        """
        with self.ledger.phase("recovery"):
            self._transport.call_off(self.under_way)
            self.under_way.clear()
            if not self._refused:
                # Others may be asking whether all have come so far: they must not wait for an answer.
                self._transport.agree(False)
            standings = self._regroup(standing, fill=fill)
            assert standings is not None  # it works, so it still does
            return standings

    def _regroup(self, standing: Any, *, fill: bool) -> list[Any] | None:
        """Meet those that are left; returns None if this rank goes on standing by."""
        while True:
            self.members = self._transport.repair(fill=fill)
            self._take_place()
            if self.rank < 0:
                return None
            reports: list[_Report] = []
            closed = None
            try:
                clock = self._measured_clock()
                chunk = self.exchange_log.last_chunk()
                reports = self._allgather_object((self._is_new, standing, chunk.standing), self.traffic)
                closed = self._closed(chunk, reports)
            except RankLost:
                pass
            self._refused = not self._transport.agree(closed is not None)
            if closed is not None and not self._refused:
                break
            self._transport.call_off(())
        self._clock = clock
        self.exchange_log.leave_out(*closed, self.members, clock)
        return [None if is_new else its for is_new, its, _ in reports]

    def _closed(self, chunk: Chunk, reports: list[_Report]) -> tuple[Closed | None, Times]:
        """What was waiting in what those had together that go on, and how all stand."""
        standings = np.stack([standing for _, _, standing in reports])
        new = [is_new for is_new, _, _ in reports]
        closing = self.exchange_log.closing(chunk, standings, self.members, new)
        return self._go_through(closing), standings

    def confirm(self, so_far: bool = True) -> None:
        """All ranks have come so far. If one has not, or was lost, it raises RankLost on all."""
        with self.ledger.phase("recovery"):
            self._refused = not self._transport.agree(so_far)
            if self._refused:
                raise RankLost("a rank was lost")

    @property
    def hosts(self) -> list[list[int]]:
        """The ranks of each host, the host of rank 0 first."""
        host_of = self._transport.host_of
        return [[rank for rank, its in enumerate(host_of) if its == first] for first in sorted({*host_of})]

    @property
    def why_no_sharing(self) -> str:
        """Why ranks of one host do not add up in memory that they share; empty where they do, and where that
        is not to be expected."""
        return self._transport.why_no_sharing

    def describe(self) -> str:
        """The library behind this world, with its version."""
        return self._transport.describe()

    def abort(self, code: int) -> None:
        """End all ranks at once."""
        self._transport.abort(code)

    def close(self) -> None:
        """Leave in good order, all ranks together."""
        self._transport.close(self.whereabouts())
