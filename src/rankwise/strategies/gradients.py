"""Synchronous SGD: gradients are averaged before each step of the optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import OutOfStepError
from rankwise.strategies.base import Flagged, State, Strategy, is_as_left, leave, require_finite
from rankwise.strategies.buckets import Buckets, cut
from rankwise.strategies.compression import Flat
from rankwise.strategies.exchange import gather_sum, reduction_of
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.strategies.traffic import (
    ITEM_BYTES,
    Collective,
    ModelSize,
    Traffic,
    flat_bytes,
)

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

BUCKET_MB = 25.0


@dataclass(frozen=True)
class GradientAveraging(Strategy[State]):
    """All ranks step with the mean of their gradients over all samples of the round.

    With `allreduce` each rank forms the mean and steps; the replicas stay the same. With a master, workers
    send their gradients, and the master steps and sends weights: it alone has an optimiser. What is
    compressed are gradients, both ways, and every rank steps. With a round of several steps gradients
    are added up, as those of one large batch. `Buckets`, attached to the replica, hold them.
    """

    topologies: ClassVar = ("allreduce", "master")
    shares_optimizer: ClassVar = True
    sends_gradients: ClassVar = True
    recovery: ClassVar = Recovery.DROP_ROUND
    stop: ClassVar = Stop.AFTER_ROUND
    replicated: ClassVar = ("directions",)

    topology: Literal["master", "allreduce"]
    compress: str = "none"
    bucket_mb: float = BUCKET_MB

    def init(self, replica: Replica, world: World) -> State:
        in_pieces = self._allreduces_plain and world.size > 1
        replica.attach(
            Buckets(
                replica.parameters,
                self._bucket_bytes if in_pieces else math.inf,
                world,
                compressed=self.compress != "none",
            )
        )
        return State()

    def expect(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        buckets = replica.attached(Buckets)
        buckets.expect(batch.share, sends=batch.ends_round)
        if self._is_served(world) and buckets.watch.in_first:
            leave(replica)

    def recover(self, state: State, replica: Replica, world: World) -> State:
        replica.attached(Buckets).clear()
        return replace(state, pending=0)

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        if not len(batch):
            return state
        buckets = replica.attached(Buckets)
        buckets.add()
        # What a worker does to its weights in a turn of its loop, the master's next ones would undo.
        if self._is_served(world) and buckets.watch.in_first and not is_as_left(replica):
            raise OutOfStepError(
                f"rank {world.rank} has changed its weights in a turn of the loop over batches, which only "
                "the master's step may: change them between epochs on all ranks, or take --topology allreduce"
            )
        return state.trained(len(batch))

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> State | Flat:
        """The state after the exchange, the mean being in the buckets; or the master's new weights."""
        buckets = replica.attached(Buckets)
        if self._allreduces_plain:
            stops = buckets.reduce()
            if not stops:
                require_finite(buckets.flat)
        elif self.compress == "none":
            return self._serve(buckets, replica, batch, world)
        else:
            if batch.weights[world.rank]:
                require_finite(buckets.flat)
            reduction = reduction_of(self.topology, self.compress, buckets.shapes)
            stops, state = reduction(buckets.close(), batch.weights, world, state)
        if stops:
            raise Flagged(f"stopped in epoch {batch.epoch}", prepared=state)
        return state

    def complete(
        self, state: State, replica: Replica, batch: Batch, world: World, flagged: Flagged
    ) -> State | Flat:
        buckets = replica.attached(Buckets)
        if flagged.prepared is None:
            return self._answer(buckets, replica, batch, world, stops=False)
        require_finite(buckets.flat)
        after: State = flagged.prepared
        return after

    def commit(self, state: State, replica: Replica, prepared: State | Flat, world: World) -> State:
        if isinstance(prepared, State):
            with world.ledger.phase("pack"):
                replica.attached(Buckets).give()
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
        return self._answer(buckets, replica, batch, world, stops=bool(stops))

    def _answer(self, buckets: Buckets, replica: Replica, batch: Batch, world: World, *, stops: bool) -> Flat:
        """The master's step, unless a rank `stops`, and its weights to all."""
        if world.rank == 0 and not stops:
            with world.ledger.phase("pack"):
                buckets.give()
            with world.ledger.phase("optimizer"):
                replica.step()
        with world.ledger.phase("pack"):
            weights = replica.pack(tail=1)
            weights[-1] = stops
        world.broadcast(weights)
        if weights[-1]:
            raise Flagged(f"stopped in epoch {batch.epoch}")
        return weights

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        reduction = reduction_of(self.topology, self.compress, model.shapes)
        counts = 0 if reduction.compresses else len(model.shapes)
        traffic = reduction.traffic(model.parameters + counts, sum(hosts))
        if self._allreduces_plain:
            sizes = [math.prod(shape) for shape in reversed(model.shapes)]
            pieces = len(cut(sizes, self._bucket_bytes // ITEM_BYTES))
            return replace(
                traffic, each_round=(Collective("allreduce", traffic.payload_bytes, pieces=pieces),)
            )
        if reduction.compresses:
            return traffic
        weights = Collective("broadcast", flat_bytes(model.parameters))
        each_round = Collective("gather", traffic.payload_bytes), weights
        return replace(traffic, each_round=each_round, server_steps=True)

    def _is_served(self, world: World) -> bool:
        """Whether this rank gets its weights from a master."""
        return self.topology == "master" and self.compress == "none" and world.rank > 0

    @property
    def _allreduces_plain(self) -> bool:
        """Whether gradients go to all ranks as they are, so that pieces of them can go out early."""
        return self.topology == "allreduce" and self.compress == "none"

    @property
    def _bucket_bytes(self) -> float:
        return self.bucket_mb * 1e6
