"""Synchronous SGD: gradients are averaged before each step of the optimiser."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import State, Strategy, require_finite
from rankwise.strategies.buckets import Buckets
from rankwise.strategies.compression import Flat
from rankwise.strategies.exchange import Reduction, gather_sum

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

BUCKET_MB = 25.0


@dataclass(frozen=True)
class GradientState(State):
    """The gradients of the round that is being trained, and how they are added up."""

    buckets: Buckets | None = None
    reduction: Reduction | None = None


@dataclass(frozen=True)
class GradientAveraging(Strategy):
    """All ranks step with the mean of their gradients over all samples of the round, whoever trained them.

    With `allreduce` each rank forms the mean and steps; the replicas stay alike. With a master, workers
    send their gradients, and the master steps and sends weights: it alone has an optimiser. What is
    compressed are gradients, both ways, and every rank steps. With a round of several steps gradients
    are added up, as those of one large batch.
    """

    topologies: ClassVar = ("allreduce", "master")
    shares_optimizer: ClassVar = True
    sends_gradients: ClassVar = True
    keeps_local_work: ClassVar = False
    replicated: ClassVar = ("directions",)

    topology: Literal["master", "allreduce"]
    compress: str = "none"
    bucket_mb: float = BUCKET_MB

    def init(self, replica: Replica, world: World) -> State:
        in_pieces = self.topology == "allreduce" and self.compress == "none" and world.size > 1
        buckets = Buckets(replica.parameters, self.bucket_mb * 1e6 if in_pieces else math.inf, world)
        return GradientState(
            buckets=buckets, reduction=Reduction.of(self.topology, self.compress, buckets.shapes)
        )

    def expect(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        _buckets(state).expect(batch.share, sends=batch.ends_round)

    def recover(self, state: State, replica: Replica, world: World) -> State:
        _buckets(state).clear()
        return replace(state, pending=0)

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        if not len(batch):
            return state
        _buckets(state).add()
        return state.trained(len(batch))

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> State | Flat:
        """The state after the exchange, the mean being in its buckets; or the master's new weights."""
        assert isinstance(state, GradientState)
        assert state.reduction is not None
        buckets = _buckets(state)
        if self.topology == "allreduce" and state.reduction.compressor is None:
            stops = buckets.reduce()
            require_finite(buckets.flat)
        elif state.reduction.compressor is None:
            return self._serve(buckets, replica, batch, world)
        else:
            if batch.weights[world.rank]:
                require_finite(buckets.flat)
            stops, state = state.reduction(buckets.close(), batch.weights, world, state)
        if stops:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        return state

    def commit(self, state: State, replica: Replica, prepared: State | Flat, world: World) -> State:
        if isinstance(prepared, State):
            with world.ledger.phase("pack"):
                _buckets(prepared).give()
            with world.ledger.phase("optimizer"):
                replica.step()
            return prepared.commit()
        with world.ledger.phase("pack"):
            replica.unpack(prepared)
        return state.commit()

    def _serve(self, buckets: Buckets, replica: Replica, batch: Batch, world: World) -> Flat:
        """Gradients to the master, weights back."""
        if batch.weights[world.rank]:
            require_finite(buckets.flat)
        stops = gather_sum(buckets.close(), batch.weights, world)
        if stops is False:
            with world.ledger.phase("pack"):
                buckets.give()
            with world.ledger.phase("optimizer"):
                replica.step()
        with world.ledger.phase("pack"):
            weights = replica.pack(tail=1)
            weights[-1] = bool(stops)
        world.broadcast(weights)
        if weights[-1]:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        return weights


def _buckets(state: State) -> Buckets:
    assert isinstance(state, GradientState)
    assert state.buckets is not None
    return state.buckets
