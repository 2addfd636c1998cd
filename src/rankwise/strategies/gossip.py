"""Decentralised averaging: each rank mixes its weights with its neighbours', and nobody meets all."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import State, Strategy, require_finite
from rankwise.strategies.compression import Flat

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class GossipState(State):
    """`stop_at` is the round after which all ranks stop, 0 as long as nobody wished it."""

    stop_at: int = 0


@dataclass(frozen=True)
class Gossip(Strategy):
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
    synchronous: ClassVar = False

    topology: Literal["ring", "exponential", "complete"]

    def init(self, replica: Replica, world: World) -> State:
        return GossipState()

    def open_epoch(self, state: State, replica: Replica, world: World) -> State:
        if "weights" in state.memory:
            replica.unpack(state.memory["weights"])
        return state

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> tuple[GossipState, Flat]:
        """The state after the exchange, and the mixed weights."""
        assert isinstance(state, GossipState)
        stop_at = state.stop_at or (state.rounds + world.size if world.stopping else 0)
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
        # A wish to stop goes from neighbour to neighbour, and the earliest counts: it is everywhere in time.
        wishes = [int(wish) for wish in (stop_at, *rows[:, -1]) if wish]
        stop_at = min(wishes, default=0)
        if stop_at and state.rounds >= stop_at:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        with world.ledger.phase("optimizer"):
            mixed = _mean_in_rank_order({world.rank: flat, **dict(zip(sources, rows, strict=True))})
        return replace(state, stop_at=stop_at), mixed[:-1]

    def close_epoch(
        self, state: State, replica: Replica, weights: NDArray[np.float64], world: World
    ) -> State:
        state = super().close_epoch(state, replica, weights, world)
        mine = replica.pack().copy()
        mean = mine.copy()
        world.allreduce(mean)
        mean /= world.size
        squares = np.array([np.sum((mine.astype(np.float64) - mean) ** 2)])
        world.allreduce(squares)
        replica.unpack(mean)
        distance = {"consensus_distance": float(np.sqrt(squares[0] / world.size))}
        return replace(state.remember(weights=mine), measured={**state.measured, **distance})


def neighbours(topology: str, rank: int, ranks: int, number: int) -> tuple[list[int], list[int]]:
    """To whom a rank sends, and from whom it receives, in the round of this number; no rank twice."""
    if topology == "complete":
        steps = list(range(1, ranks))
    elif topology == "ring":
        steps = [1, -1]
    else:
        steps = [2 ** (number % max(1, (ranks - 1).bit_length()))]
    to = dict.fromkeys((rank + step) % ranks for step in steps)
    sources = dict.fromkeys((rank - step) % ranks for step in steps)
    return [r for r in to if r != rank], sorted(r for r in sources if r != rank)


def _mean_in_rank_order(parts: dict[int, Flat]) -> Flat:
    total = np.zeros_like(next(iter(parts.values())))
    for rank in sorted(parts):
        total += parts[rank]
    total /= total.dtype.type(len(parts))
    return total
