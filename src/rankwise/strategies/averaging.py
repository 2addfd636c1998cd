"""Averaging of weights every so many steps: the paper's exchange, with a master or without."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import State, Strategy
from rankwise.world import World

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

Flat = NDArray[np.floating]


@dataclass(frozen=True)
class ParameterAveraging(Strategy):
    """Workers train on their own; at the end of a round their weights are averaged.

    The mean is weighted by the samples that each worker trained in the round (McMahan et al. 2017,
    arXiv:1602.05629), so uneven shards count by their size. Floating-point buffers are averaged like
    weights; of integer buffers the largest is taken. `optimizer_state`: each worker keeps its own,
    or it is averaged too, or forgotten (the paper makes a new optimiser each epoch).
    """

    topology: Literal["master", "allreduce"]
    optimizer_state: Literal["keep", "average", "reset"]

    def init(self, replica: Replica, world: World) -> State:
        flat = replica.pack()
        world.broadcast(flat)
        replica.unpack(flat)
        integers = replica.pack_integers()
        world.broadcast(integers)
        replica.unpack_integers(integers)
        return State()

    def step(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        state = self.train(state, replica, batch, world)
        if not batch.ends_round:
            return state
        assert batch.weights is not None
        with world.ledger.phase("pack"):
            # One place behind the weights carries the wish to stop, so that no extra message does.
            flat = replica.pack(tail=1)
            flat[-1] = world.stopping
        average = average_by_master if self.topology == "master" else average_by_allreduce
        stops = average(flat, batch.weights, world)
        if stops:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        with world.ledger.phase("pack"):
            replica.unpack(flat)
        return self.close_round(state, replica, world)

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        """A worker's own step, without the others."""
        if not len(batch):
            return state
        with world.ledger.phase("optimizer"):
            replica.optimizer.step()
        return state.trained(len(batch))

    def close_round(self, state: State, replica: Replica, world: World) -> State:
        """What is left to do once all replicas hold the mean."""
        if self.optimizer_state == "reset":
            replica.reset_optimizer()
        integers = replica.pack_integers()
        if len(integers):
            world.allreduce(integers, op="max")
            replica.unpack_integers(integers)
        return state.commit()


@dataclass(frozen=True)
class Replication(ParameterAveraging):
    """The same exchange, but every worker trains on all samples."""

    replicates: ClassVar[bool] = True


def average_by_master(flat: Flat, weights: NDArray[np.float64], world: World) -> bool:
    """Overwrite `flat` everywhere with the weighted mean, computed by rank 0 in rank order.

    `weights` [ranks], a master's own is 0. The last element is a flag, not averaged: returns whether
    any rank set it.
    """
    rows = world.gather(flat, root=0)
    if rows is not None:
        with world.ledger.phase("optimizer"):
            stops = rows[:, -1].any()
            if not stops:
                mean_of_rows(rows, weights, out=flat)
            flat[-1] = stops
    world.broadcast(flat, root=0)
    return bool(flat[-1])


def average_by_allreduce(flat: Flat, weights: NDArray[np.float64], world: World) -> bool:
    """The same mean by one sum over all ranks; the order of the additions is MPI's."""
    with world.ledger.phase("pack"):
        flat[:-1] *= flat.dtype.type(weights[world.rank])
    world.allreduce(flat)
    return bool(flat[-1])


def mean_of_rows(rows: Flat, weights: NDArray[np.float64], out: Flat) -> None:
    """The weighted mean of `rows` [ranks, n], added in rank order whoever arrived first."""
    first, *rest = np.flatnonzero(weights)
    np.multiply(rows[first], rows.dtype.type(weights[first]), out=out)
    for rank in rest:
        out += rows[rank] * rows.dtype.type(weights[rank])
