"""Two levels: gradients averaged inside a host in each step, and weights across hosts every few steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rankwise.comm import Subgroup, World
from rankwise.data.sampler import Batch
from rankwise.strategies.averaging import Averaged, ParameterAveraging, RoundState
from rankwise.strategies.base import Flagged, require_finite
from rankwise.strategies.buckets import Buckets
from rankwise.strategies.compression import Flat
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.strategies.traffic import ITEM_BYTES, Collective, ModelSize, Traffic, flat_bytes

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class Hierarchical(ParameterAveraging):
    """Ranks of a host step together with the mean of their gradients, as if they were one rank with a
    larger batch; every `sync_across_hosts` steps the hosts average their weights (hierarchical local SGD, Lin
    et al. 2018, arXiv:1808.07217).

    The lowest rank of each host leads it: leaders average among themselves, weighted by the samples of their
    hosts, and hand the mean out. Only what goes between leaders is compressed. When a leader is lost the next
    rank of its host leads; what compression has left out so far is then forgotten. `Buckets`, attached to the
    replica, hold the gradients of a step.
    """

    topologies: ClassVar[tuple[str, ...]] = ("allreduce",)
    sync_every: ClassVar = 8
    recovery: ClassVar = Recovery.ROLL_BACK
    stop: ClassVar = Stop.AFTER_ROUND
    replicated: ClassVar = ("outer_momentum",)

    sync_across_hosts: int = 8

    def init(self, replica: Replica, world: World) -> RoundState:
        replica.attach(Buckets(replica.parameters, math.inf, world))
        return super().init(replica, world)

    def expect(self, state: RoundState, replica: Replica, batch: Batch, world: World) -> None:
        replica.attached(Buckets).expect(len(batch), sends=False)

    def train(self, state: RoundState, replica: Replica, batch: Batch, world: World) -> RoundState:
        """A step of the whole host, with the mean over the samples of its ranks."""
        buckets = replica.attached(Buckets)
        if len(batch):
            buckets.add()
        flat = buckets.close()
        flat[-1] = len(batch)
        _inside(world).allreduce(flat)
        if not flat[-1]:
            return state
        with world.ledger.phase("pack"):
            flat[:-1] /= flat[-1]
            require_finite(flat)
            buckets.give()
        with world.ledger.phase("optimizer"):
            replica.step()
        return state.trained(len(batch))

    def prepare(self, state: RoundState, replica: Replica, batch: Batch, world: World) -> Averaged:
        hosts, inside = world.hosts, _inside(world)
        with world.ledger.phase("pack"):
            flat = replica.pack(tail=1)
            flat[-1] = world.stopping
            require_finite(flat)  # the same on all ranks of a host
        stop = flat[-1:].copy()
        inside.allreduce(stop, "max")
        flat[-1:] = stop
        after = state
        if inside.rank == 0:
            shares = np.array([batch.weights[ranks].sum() for ranks in hosts])
            leaders = Subgroup(world, [ranks[0] for ranks in hosts])
            stops, after = self._average(flat, replica, state, shares, leaders)
            flat[-1] = stops
        inside.broadcast(flat)
        if flat[-1]:
            raise Flagged(f"stopped in epoch {batch.epoch}")
        return Averaged(flat[:-1], after, replica.optimizer.param_groups[0]["lr"])

    def complete(
        self, state: RoundState, replica: Replica, batch: Batch, world: World, flagged: Flagged
    ) -> Averaged:
        return self.prepare(state, replica, batch, world)

    def recover(self, state: RoundState, replica: Replica, world: World) -> RoundState:
        replica.attached(Buckets).clear()
        # Others may lead now, and what leaders compress with must be the same on all of them.
        kept: dict[str, Flat] = {name: state.memory[name] for name in self.replicated if name in state.memory}
        return replace(state, pending=0, memory=kept)

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        numbers, reduction = self._numbers(model), self._reduction(model.shapes)
        size = flat_bytes(numbers)
        return Traffic(
            each_step=(
                Collective("allreduce", flat_bytes(model.parameters + len(model.shapes)), among="host"),
            ),
            each_round=(
                Collective("allreduce", ITEM_BYTES, among="host"),
                *(replace(exchange, among="leaders") for exchange in reduction.collectives(numbers)),
                Collective("broadcast", size, among="host"),
            ),
            payload_bytes=reduction.payload_bytes(numbers) if len(hosts) > 1 else size,
            compressed=reduction.compresses,
        )


def _inside(world: World) -> Subgroup:
    """The ranks of this rank's host."""
    return Subgroup(world, next(ranks for ranks in world.hosts if world.rank in ranks))
