"""Asynchronous training: a master holds the centre and serves whichever worker comes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted, RankLost
from rankwise.strategies.base import State, Strategy, require_finite
from rankwise.strategies.compression import Flat

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass
class _Desk:
    """The master's books over one epoch."""

    rounds_left: NDArray[np.int64]
    """Exchanges with which each rank still has to come."""

    seen: NDArray[np.int64]
    """How often the centre had changed when each rank fetched it last."""

    waiting: list[tuple[int, Flat]] = field(default_factory=list)
    """Messages that were not answered yet, in the order in which they came."""

    changes: int = 0

    @classmethod
    def of_epoch(cls, rounds: int, ranks: int) -> _Desk:
        """When an epoch begins; rank 0 is the master."""
        left = np.full(ranks, rounds)
        left[0] = 0
        return cls(left, np.zeros(ranks, np.int64))

    def admit(self, max_staleness: int | None) -> Iterator[tuple[int, Flat]]:
        """Messages that may be answered now: not of those too far ahead of the slowest."""
        while True:
            slowest = self.rounds_left.max()
            for place, (source, _) in enumerate(self.waiting):
                if max_staleness is None or slowest - self.rounds_left[source] <= max_staleness:
                    yield self.waiting.pop(place)
                    break
            else:
                return

    def book(self, source: int, *, is_last: bool) -> int:
        """A message was answered; returns how often the centre had changed unseen by its rank."""
        staleness = int(self.changes - self.seen[source])
        self.changes += 1
        self.seen[source] = self.changes
        self.rounds_left[source] = 0 if is_last else self.rounds_left[source] - 1
        return staleness


@dataclass(frozen=True)
class CentreState(State):
    """`fetched` are a worker's weights after its last exchange, and whether that was its last in this run;
    `desk` are the master's books, which change as it serves."""

    fetched: Flat | None = None
    stopped: bool = False
    desk: _Desk | None = None


@dataclass(frozen=True)
class Asynchronous(Strategy):
    """Each worker exchanges with the master every so many steps, and waits for nobody else.

    A message's staleness is how often others changed the centre since its worker fetched it; its mean and
    maximum stand in the record of the master. `max_staleness` bounds by how many exchanges of the epoch a
    worker may be ahead of the slowest (stale synchronous: Ho et al. 2013); staleness is then at most
    2 (workers - 1) (max_staleness + 1). What is evaluated and saved is the centre.

    When a worker is lost, each other may exchange once more what the centre has already. When the master is
    lost, so is what others brought to the centre since the worker that takes its place fetched it last.
    """

    topologies: ClassVar = ("master",)
    synchronous: ClassVar = False
    sync_every: ClassVar = 4

    max_staleness: int | None = None

    @abstractmethod
    def message(self, mine: Flat, fetched: Flat) -> Flat:
        """What a worker sends that holds `mine` and held `fetched` after its last exchange."""

    @abstractmethod
    def serve(self, centre: Flat, message: Flat, workers: int) -> Flat:
        """Change the centre, in place, by a message; returns the reply."""

    @abstractmethod
    def take(self, mine: Flat, reply: Flat) -> Flat:
        """What the worker goes on with."""

    def init(self, replica: Replica, world: World) -> State:
        return CentreState()

    def open_epoch(self, state: State, replica: Replica, world: World) -> State:
        assert isinstance(state, CentreState)
        if world.rank and "weights" in state.memory:
            replica.unpack(state.memory["weights"])
        if world.rank == 0:
            return replace(state, desk=None)
        return replace(state, fetched=replica.pack().copy())

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> tuple[CentreState, Flat]:
        """The state after the exchange, and this rank's new weights."""
        assert isinstance(state, CentreState)
        with world.ledger.phase("pack"):
            flat = replica.pack(tail=1)
            flat[-1] = world.stopping
        if batch.weights[world.rank]:
            require_finite(flat)
        if world.rank == 0:
            return self._serve(state, flat, replica, batch, world)
        return self._call(state, flat, world)

    def recover(self, state: State, replica: Replica, world: World) -> State:
        assert isinstance(state, CentreState)
        return replace(state, desk=None)

    def close_epoch(
        self, state: State, replica: Replica, weights: NDArray[np.float64], world: World
    ) -> State:
        """Raises Interrupted, on all ranks, if any wished to stop: here they meet."""
        stops = np.array([float(world.stopping)])
        world.allreduce(stops, op="max")
        if stops[0]:
            raise Interrupted("stopped at the end of an epoch that was cut short")
        state = super().close_epoch(state, replica, weights, world)
        return state.remember(weights=replica.pack().copy()) if world.rank else state

    def _call(self, state: CentreState, flat: Flat, world: World) -> tuple[CentreState, Flat]:
        """A worker's exchange. Once the master knows that somebody wished to stop there are no more."""
        assert state.fetched is not None
        mine = flat[:-1].copy()
        if state.stopped:
            return state, mine
        with world.ledger.phase("pack"):
            flat[:-1] = self.message(mine, state.fetched)
        world.send(flat, 0)
        world.receive(flat, 0)
        if flat[-1]:
            world.stopping = True
            return replace(state, stopped=True), mine
        with world.ledger.phase("pack"):
            mine = self.take(mine, flat[:-1]).copy()
        return replace(state, fetched=mine), mine

    def _serve(
        self, state: CentreState, flat: Flat, replica: Replica, batch: Batch, world: World
    ) -> tuple[CentreState, Flat]:
        """As many exchanges as there are workers, whoever comes; in the last round all that are left."""
        workers = world.size - 1
        desk = state.desk or _Desk.of_epoch(batch.rounds_left + 1, world.size)
        centre, message = flat[:-1].copy(), np.empty_like(flat)
        try:
            while desk.rounds_left.sum() > workers * batch.rounds_left:
                source = world.receive(message)
                world.stopping = world.stopping or bool(message[-1])
                desk.waiting.append((source, message.copy()))
                for source, content in desk.admit(None if world.stopping else self.max_staleness):
                    with world.ledger.phase("optimizer"):
                        answer = np.append(self.serve(centre, content[:-1], workers), content[-1:])
                        answer[-1] = world.stopping
                        state = _booked(state, desk.book(source, is_last=world.stopping))
                    world.send(answer, source)
        except RankLost:
            replica.unpack(centre)  # what workers have brought stays
            raise
        return replace(state, desk=desk), centre


def _booked(state: CentreState, staleness: int) -> CentreState:
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
        pull = centre.dtype.type(self.elasticity / workers) * (message - centre)
        centre += pull
        return pull

    def take(self, mine: Flat, reply: Flat) -> Flat:
        return mine - reply


@dataclass(frozen=True)
class Downpour(Asynchronous):
    """A worker pushes what it changed since its last exchange, and fetches the centre (Dean et al. 2012)."""

    def message(self, mine: Flat, fetched: Flat) -> Flat:
        return mine - fetched

    def serve(self, centre: Flat, message: Flat, workers: int) -> Flat:
        centre += message
        return centre.copy()

    def take(self, mine: Flat, reply: Flat) -> Flat:
        return reply
