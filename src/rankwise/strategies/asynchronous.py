"""Asynchronous training: a master holds the centre and serves workers in the order in which they come."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import RankLost
from rankwise.strategies.base import OF_SITTING, State, Strategy, is_as_left, leave, meet, require_finite
from rankwise.strategies.compression import Flat
from rankwise.strategies.recovery import Recovery
from rankwise.strategies.traffic import (
    ITEM_BYTES,
    Collective,
    Exchange,
    Messages,
    ModelSize,
    Server,
    Traffic,
    flat_bytes,
)

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class _Desk:
    """What the master knows of its workers in one epoch.

    `rounds_left` [ranks] are the exchanges that each rank has still to make, `seen` [ranks] how often the
    centre had changed when each fetched it last, `changes` how often it has changed, and `waiting` the
    messages that are not answered yet, with their ranks, in the order in which they came.
    """

    rounds_left: NDArray[np.int64]
    seen: NDArray[np.int64]
    waiting: tuple[tuple[int, Flat], ...] = ()
    changes: int = 0

    @classmethod
    def of_epoch(cls, rounds: int, ranks: int) -> _Desk:
        """When an epoch begins; rank 0 is the master."""
        left = np.full(ranks, rounds)
        left[0] = 0
        return cls(left, np.zeros(ranks, np.int64))

    def received(self, source: int, message: Flat) -> _Desk:
        """After a message came."""
        return replace(self, waiting=(*self.waiting, (source, message)))

    def next(self, max_staleness: int | None) -> tuple[int, Flat] | None:
        """The first message that may be answered now: none of a rank too far ahead of the slowest."""
        slowest = self.rounds_left.max()
        for source, message in self.waiting:
            if max_staleness is None or slowest - self.rounds_left[source] <= max_staleness:
                return source, message
        return None

    @property
    def owing(self) -> list[int]:
        """The ranks from which the next message is still to come."""
        waiting = {source for source, _ in self.waiting}
        return [rank for rank, left in enumerate(self.rounds_left.tolist()) if left and rank not in waiting]

    def staleness(self, source: int) -> int:
        """How often the centre has changed since this rank fetched it."""
        return int(self.changes - self.seen[source])

    def answered(self, source: int, *, is_last: bool) -> _Desk:
        """After the message of a rank was answered, which has only one there at a time."""
        seen, left, changes = self.seen.copy(), self.rounds_left.copy(), self.changes + 1
        seen[source] = changes
        left[source] = 0 if is_last else left[source] - 1
        waiting = tuple(entry for entry in self.waiting if entry[0] != source)
        return _Desk(left, seen, waiting, changes)


COUNT = 2
TAIL = 1 + COUNT
"""Numbers behind the weights of a message: whether to stop, and in an answer how often the centre changed."""

COUNTED = 1 << 20
"""That count is sent as two numbers below this one, which floats of 32 bits hold exactly."""


@dataclass(frozen=True)
class CentreState(State):
    """`fetched` are a worker's weights after its last exchange, and `stopped` whether that was its last in
    this run; `desk` is what the master knows of its workers, None until the epoch's first exchange.

    `centre` is what the master held after this worker's last exchange, which was change number `changes` of
    it; 0 before the first one. Of a rank that `serves`, as the master, the centre is in its replica.
    """

    fetched: Flat = field(default_factory=lambda: np.empty(0))
    centre: Flat = field(default_factory=lambda: np.empty(0), metadata=OF_SITTING)
    changes: int = field(default=0, metadata=OF_SITTING)
    serves: bool = field(default=False, metadata=OF_SITTING)
    stopped: bool = field(default=False, metadata=OF_SITTING)
    desk: _Desk | None = field(default=None, metadata=OF_SITTING)


@dataclass(frozen=True)
class Asynchronous(Strategy[CentreState]):
    """Each worker exchanges with the master every few steps, and waits for no other worker.

    A message's staleness is how often others changed the centre since its worker fetched it; its mean and
    maximum stand in the record of the master. `max_staleness` bounds by how many exchanges of the epoch a
    worker may be ahead of the slowest (stale synchronous: Ho et al. 2013); staleness is then at most
    2 (workers - 1) (max_staleness + 1). What is evaluated and saved is the centre.

    When a rank is lost, each other may exchange once more what the centre has already. Each worker knows the
    centre as of its own last exchange, so that nothing of it is lost with the master: the worker that takes
    its place gets the newest one that is known, and brings in what it has trained since its last exchange.
    """

    topologies: ClassVar = ("master",)
    recovery: ClassVar = Recovery.ASYNCHRONOUS
    sync_every: ClassVar = 4

    max_staleness: int | None = None

    @abstractmethod
    def message(self, mine: Flat, fetched: Flat) -> Flat:
        """What a worker sends that holds `mine` and held `fetched` after its last exchange."""

    @abstractmethod
    def serve(self, centre: Flat, message: Flat, workers: int) -> Flat:
        """Change the centre, in place, by a message; returns the reply."""

    @abstractmethod
    def take(self, mine: Flat, reply: Flat, workers: int) -> tuple[Flat, Flat]:
        """What the worker goes on with, and the centre after this exchange, to the bit."""

    def init(self, replica: Replica, world: World) -> CentreState:
        return CentreState()

    def open_epoch(self, state: CentreState, replica: Replica, world: World) -> CentreState:
        if world.rank == 0:
            return replace(state, desk=None, serves=True)
        if not state.changes:  # here all replicas are what the master's is
            state = replace(state, centre=replica.pack().copy())
        if "weights" in state.memory and is_as_left(replica):
            replica.unpack(state.memory["weights"])
        return replace(state, fetched=replica.pack().copy())

    def prepare(
        self, state: CentreState, replica: Replica, batch: Batch, world: World
    ) -> tuple[CentreState, Flat]:
        """The state after the exchange, and this rank's new weights."""
        with world.ledger.phase("pack"):
            flat = replica.pack(tail=TAIL)
            flat[-TAIL:] = world.asked_to_stop, 0, 0
        if batch.weights[world.rank]:
            require_finite(flat)
        if world.rank == 0:
            return self._serve(state, flat, replica, batch, world)
        return self._call(state, flat, world)

    def recover(self, state: CentreState, replica: Replica, world: World) -> CentreState:
        return replace(state, desk=None)

    def copy_of_rank_0(self, state: CentreState) -> tuple[int, Flat] | None:
        return None if state.serves or not state.centre.size else (state.changes, state.centre)

    def follow_rank_0(
        self, state: CentreState, replica: Replica, world: World, newest: int, copy: Flat | None
    ) -> CentreState:
        if world.rank:
            return state
        # What the master has counted in the exchange that failed is gone, but workers may know it.
        state = replace(state, changes=max(state.changes, newest) + 1)
        if copy is None:
            return state
        centre = copy.copy()
        if state.pending:
            mine = replica.pack()
            self.serve(centre, self.message(mine, state.fetched), max(1, world.size - 1))
        replica.unpack(centre)
        return replace(state, serves=True)

    def close_epoch(
        self, state: CentreState, replica: Replica, weights: NDArray[np.float64], world: World
    ) -> CentreState:
        meet(world, stops=world.stopping)
        state = super().close_epoch(state, replica, weights, world)
        leave(replica)
        return state.remember(weights=replica.pack().copy()) if world.rank else state

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        size = flat_bytes(model.parameters)
        return Traffic(
            each_round=(Messages("server", size + COUNT * ITEM_BYTES, count=2),),
            meeting=Server(self.max_staleness),
            payload_bytes=size,
            served=1,
        )

    def closing_traffic(self, model: ModelSize) -> tuple[Exchange, ...]:
        return (*super().closing_traffic(model), Collective("allreduce", 8))

    def _call(self, state: CentreState, flat: Flat, world: World) -> tuple[CentreState, Flat]:
        """A worker's exchange. There are no more once the master knows that a rank is to stop."""
        weights, tail = np.split(flat, [-TAIL])
        mine = weights.copy()
        if state.stopped:
            return state, mine
        with world.ledger.phase("pack"):
            weights[:] = self.message(mine, state.fetched)
        world.send(flat, 0)
        world.receive(flat, 0)
        stopped, changes = bool(tail[0]), int(tail[1]) * COUNTED + int(tail[2])
        world.stopping = world.asked_to_stop or stopped
        with world.ledger.phase("pack"):  # of the last one too, as the centre holds it
            mine, centre = self.take(mine, weights.copy(), world.size - 1)
        return replace(state, fetched=mine, centre=centre, changes=changes, stopped=stopped), mine

    def _serve(
        self, state: CentreState, flat: Flat, replica: Replica, batch: Batch, world: World
    ) -> tuple[CentreState, Flat]:
        """As many exchanges as there are workers, in the order in which they come; in the last round all that
        are left."""
        workers = world.size - 1
        desk = state.desk or _Desk.of_epoch(batch.rounds_left + 1, world.size)
        centre, message = flat[:-TAIL].copy(), np.empty_like(flat)
        try:
            while desk.rounds_left.sum() > workers * batch.rounds_left:
                # If one of them has ended, the epoch has no end: others are then held back at the desk.
                source = world.receive(message, owing=desk.owing)
                world.stopping = world.asked_to_stop or bool(message[-TAIL])
                desk = desk.received(source, message.copy())
                while due := desk.next(None if world.asked_to_stop else self.max_staleness):
                    source, content = due
                    with world.ledger.phase("optimizer"):
                        answer = content.copy()
                        answer[:-TAIL] = self.serve(centre, content[:-TAIL], workers)
                        state = _measured(state, desk.staleness(source))
                        state = replace(state, changes=state.changes + 1)
                        answer[-TAIL:] = world.asked_to_stop, *divmod(state.changes, COUNTED)
                        desk = desk.answered(source, is_last=world.asked_to_stop)
                    world.send(answer, source)
        except RankLost:
            replica.unpack(centre)  # what workers have brought stays
            raise
        return replace(state, desk=desk), centre


def _measured(state: CentreState, staleness: int) -> CentreState:
    count = state.measured.get("exchanges", 0) + 1
    mean = state.measured.get("staleness_mean", 0)
    measured = {
        "exchanges": count,
        "staleness_mean": mean + (staleness - mean) / count,
        "staleness_max": max(staleness, state.measured.get("staleness_max", 0)),
    }
    return replace(state, measured={**state.measured, **measured})


@dataclass(frozen=True)
class EASGD(Asynchronous):
    """A spring between each worker x and the centre c (Zhang, Choromanska, LeCun 2015, arXiv:1412.6651).

    With d = a (x - c): c <- c + d and x <- x - d, where a = elasticity / workers.
    """

    elasticity: float = 0.9

    def message(self, mine: Flat, fetched: Flat) -> Flat:
        return mine

    def serve(self, centre: Flat, message: Flat, workers: int) -> Flat:
        before = centre.copy()
        centre += self._pull(message, before, workers)
        return before

    def take(self, mine: Flat, reply: Flat, workers: int) -> tuple[Flat, Flat]:
        pull = self._pull(mine, reply, workers)
        return mine - pull, reply + pull

    def _pull(self, mine: Flat, centre: Flat, workers: int) -> Flat:
        pull: Flat = centre.dtype.type(self.elasticity / workers) * (mine - centre)
        return pull


@dataclass(frozen=True)
class Downpour(Asynchronous):
    """A worker pushes what it changed since its last exchange, and fetches the centre (Dean et al. 2012)."""

    def message(self, mine: Flat, fetched: Flat) -> Flat:
        return mine - fetched

    def serve(self, centre: Flat, message: Flat, workers: int) -> Flat:
        centre += message
        return centre.copy()

    def take(self, mine: Flat, reply: Flat, workers: int) -> tuple[Flat, Flat]:
        return reply, reply
