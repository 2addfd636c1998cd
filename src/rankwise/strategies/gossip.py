"""Decentralised averaging: each rank mixes its weights with its neighbours', and no rank meets all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import OF_SITTING, State, Strategy, is_as_left, leave, meet, require_finite
from rankwise.strategies.compression import Flat
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.strategies.traffic import (
    ITEM_BYTES,
    Collective,
    Exchange,
    Messages,
    ModelSize,
    Neighbours,
    Traffic,
    flat_bytes,
)

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class GossipState(State):
    """`stop_at` is the round after which all ranks stop, 0 for none."""

    stop_at: int = field(default=0, metadata=OF_SITTING)


@dataclass(frozen=True)
class Gossip(Strategy[GossipState]):
    """After each round a rank takes the mean of its weights and those that it receives (D-PSGD: Lian et al.
    2017, arXiv:1705.09056).

    On a `ring` these are the two neighbours'; on the `exponential` graph those of one rank that is 1, 2, 4,
    ... places away, one distance a round in turn (Ying et al. 2021, arXiv:2110.13363); on the `complete`
    graph all. What is evaluated and saved is the mean of all ranks; how far they are from it, the root of
    the mean squared distance, is `consensus_distance` in the record.

    Ranks are rounds apart, at most as many as the graph's hops between them. What a lost rank trained in
    these is dealt again, though it may have reached others already.
    """

    topologies: ClassVar = ("ring", "exponential", "complete")
    recovery: ClassVar = Recovery.ASYNCHRONOUS
    stop: ClassVar = Stop.LATER

    topology: Literal["ring", "exponential", "complete"]

    def init(self, replica: Replica, world: World) -> GossipState:
        return GossipState()

    def open_epoch(self, state: GossipState, replica: Replica, world: World) -> GossipState:
        if "weights" in state.memory and is_as_left(replica):
            replica.unpack(state.memory["weights"])
        return state

    def prepare(
        self, state: GossipState, replica: Replica, batch: Batch, world: World
    ) -> tuple[GossipState, Flat]:
        """The state after the exchange, and the mixed weights."""
        stop_at = state.stop_at or (state.rounds + world.size if world.asked_to_stop else 0)
        with world.ledger.phase("pack"):
            flat = replica.pack(tail=1)
            flat[-1] = stop_at
            require_finite(flat)
        to, sources = neighbours(self.topology, world.rank, world.size, state.rounds)
        rows = np.empty((len(sources), len(flat)), flat.dtype)
        receives = [world.start_receive(row, source) for row, source in zip(rows, sources, strict=True)]
        sends = [world.start_send(flat, rank) for rank in to]
        for exchange in [*receives, *sends]:
            exchange.wait()
        # When to stop goes from neighbour to neighbour, and the earliest counts: all know it in time.
        stop_at = min((int(stop) for stop in (stop_at, *rows[:, -1]) if stop), default=0)
        if stop_at and state.rounds >= stop_at:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        with world.ledger.phase("optimizer"):
            mixed = _mean_in_rank_order({world.rank: flat, **dict(zip(sources, rows, strict=True))})
        return replace(state, stop_at=stop_at), mixed[:-1]

    def close_epoch(
        self, state: GossipState, replica: Replica, weights: NDArray[np.float64], world: World
    ) -> GossipState:
        meet(world, stops=world.irregular)
        state = super().close_epoch(state, replica, weights, world)
        mine = replica.pack().copy()
        mean = mine.copy()
        world.allreduce(mean)
        mean /= world.size
        squares = np.array([np.sum((mine.astype(np.float64) - mean) ** 2)])
        world.allreduce(squares)
        replica.unpack(mean)
        leave(replica)
        distance = {"consensus_distance": float(np.sqrt(squares[0] / world.size))}
        return replace(state.remember(weights=mine), measured={**state.measured, **distance})

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        size = flat_bytes(model.parameters)
        to, _ = neighbours(self.topology, rank=0, ranks=sum(hosts), number=0)
        return Traffic(
            each_round=(Messages("neighbours", size, count=len(to)),),
            meeting=Neighbours(partial(distances, self.topology)),
            payload_bytes=size,
            unpacked=len(to),
        )

    def closing_traffic(self, model: ModelSize) -> tuple[Exchange, ...]:
        mean, squares = model.parameters * ITEM_BYTES, 8
        own = Collective("allreduce", 8), Collective("allreduce", mean), Collective("allreduce", squares)
        return (*super().closing_traffic(model), *own)


def distances(topology: str, ranks: int, number: int) -> Sequence[int]:
    """How many places away those are to whom a rank sends in the round of this number; it receives from as
    many places the other way."""
    if topology == "complete":
        return range(1, ranks)
    if topology == "ring":
        return (1, -1)
    return (2 ** (number % max(1, (ranks - 1).bit_length())),)


def neighbours(topology: str, rank: int, ranks: int, number: int) -> tuple[list[int], list[int]]:
    """The ranks to which a rank sends, and those from which it receives, in the round of this number; none
    twice."""
    steps = distances(topology, ranks, number)
    to = dict.fromkeys((rank + step) % ranks for step in steps)
    sources = dict.fromkeys((rank - step) % ranks for step in steps)
    return [r for r in to if r != rank], sorted(r for r in sources if r != rank)


def _mean_in_rank_order(parts: dict[int, Flat]) -> Flat:
    total = np.zeros_like(next(iter(parts.values())))
    for rank in sorted(parts):
        total += parts[rank]
    total /= total.dtype.type(len(parts))
    return total
