"""Averaging of weights every few steps: the paper's exchange, local SGD, and its relatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks, World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import State, Strategy, require_finite
from rankwise.strategies.compression import Flat
from rankwise.strategies.exchange import Reduction, reduction_of
from rankwise.strategies.traffic import ModelSize, Traffic

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class RoundState(State):
    """`anchor` are the weights that the last round ended with; None where changes from them are neither
    compressed nor taken by an outer optimiser."""

    anchor: Flat | None = None


@dataclass(frozen=True)
class Averaged:
    """What a round agreed on: the mean of all weights, and the state that the exchange left."""

    flat: Flat
    state: RoundState
    rate: float


@dataclass(frozen=True)
class ParameterAveraging(Strategy[RoundState]):
    """Workers train on their own; at the end of a round their weights are averaged.

    The mean is weighted by the samples that each worker trained in the round (McMahan et al. 2017,
    arXiv:1602.05629), so uneven shards count by their size. `optimizer_state`: each worker keeps its
    own, or it is averaged too, or forgotten (the paper makes a new optimiser each epoch).

    An outer optimiser may stand between two rounds. With x the weights after the last one, m the mean,
    momentum b, rate a, and d = x - m, it takes SGD's step with d as its gradient:

        u <- b u + d,  x <- x - a u        x <- x - a (d + b u) with `nesterov`

    Rate 1 and no momentum are plain averaging. SlowMo (Wang et al. 2020, arXiv:1910.00643) divides d by
    the workers' learning rate in u (`by_rate`); DiLoCo (Douillard et al. 2023, arXiv:2311.08105) has
    Nesterov's form.
    """

    topologies: ClassVar[tuple[str, ...]] = ("master", "allreduce")
    sync_every: ClassVar[int | str | None] = "epoch"
    replicated: ClassVar[tuple[str, ...]] = ("outer_momentum", "directions")

    topology: Literal["master", "allreduce"]
    optimizer_state: Literal["keep", "average", "reset"]
    compress: str = "none"
    outer_lr: float = 1.0
    outer_momentum: float = 0.0
    nesterov_outside: bool = False
    by_rate: bool = False

    def init(self, replica: Replica, world: World) -> RoundState:
        return RoundState()

    def open_epoch(self, state: RoundState, replica: Replica, world: World) -> RoundState:
        if self._steps_outside or self._reduction(replica.shapes).compresses:
            return replace(state, anchor=replica.pack().copy())
        return state

    def prepare(self, state: RoundState, replica: Replica, batch: Batch, world: World) -> Averaged:
        with world.ledger.phase("pack"):
            # One place behind the weights says whether this rank is to stop, so that no extra message does.
            flat = replica.pack(tail=1)
            flat[-1] = world.stopping
            if batch.weights[world.rank]:
                require_finite(flat)
        stops, after = self._average(flat, replica, state, batch.weights, world)
        if stops:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        return Averaged(flat[:-1], after, replica.optimizer.param_groups[0]["lr"])

    def commit(self, state: RoundState, replica: Replica, prepared: Averaged, world: World) -> RoundState:
        after, flat = prepared.state, prepared.flat
        if self._steps_outside and after.anchor is not None:
            with world.ledger.phase("optimizer"):
                after, flat = self._step_outside(after, after.anchor, flat, prepared.rate, replica.size)
        with world.ledger.phase("pack"):
            replica.unpack(flat)
            if after.anchor is not None:
                after = replace(after, anchor=replica.pack().copy())  # as the weights' own type rounds it
        if self.optimizer_state == "reset":
            replica.reset_optimizer()
        return after.commit()

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        return self._reduction(model.shapes).traffic(self._numbers(model), sum(hosts))

    def _reduction(self, shapes: tuple[tuple[int, ...], ...]) -> Reduction:
        return reduction_of(self.topology, self.compress, shapes)

    def _numbers(self, model: ModelSize) -> int:
        """How many numbers a rank averages."""
        return model.with_moments if self.optimizer_state == "average" else model.parameters

    def _average(
        self, flat: Flat, replica: Replica, state: RoundState, weights: NDArray[np.float64], ranks: Ranks
    ) -> tuple[bool, RoundState]:
        """Overwrite this rank's weights with the mean over `ranks`, whose shares are `weights` [ranks].

        Behind the weights stands a flag: returns whether any of the ranks set it, and the state.
        """
        reduction = self._reduction(replica.shapes)
        with ranks.ledger.phase("pack"):
            if reduction.compresses and state.anchor is not None:
                flat[:-1] -= state.anchor  # what has changed is small, and can be sent with fewer bits
            flat[:-1] *= flat.dtype.type(weights[ranks.rank])
        stops, after = reduction(flat, weights, ranks, state)
        if reduction.compresses and state.anchor is not None:
            flat[:-1] += state.anchor
        return stops, after

    @property
    def _steps_outside(self) -> bool:
        return self.outer_lr != 1 or self.outer_momentum != 0

    def _step_outside(
        self, state: RoundState, anchor: Flat, mean: Flat, rate: float, parameters: int
    ) -> tuple[RoundState, Flat]:
        """The outer optimiser's step on the parameters; of shared optimiser state the mean is taken."""
        scale = mean.dtype.type(rate if self.by_rate else 1)
        before = anchor[:parameters]
        gradient = (before - mean[:parameters]) / scale
        momentum = gradient.copy()
        if "outer_momentum" in state.memory:
            momentum += mean.dtype.type(self.outer_momentum) * state.memory["outer_momentum"]
        step = (
            gradient + mean.dtype.type(self.outer_momentum) * momentum if self.nesterov_outside else momentum
        )
        mean[:parameters] = before - mean.dtype.type(self.outer_lr) * scale * step
        return state.remember(outer_momentum=momentum), mean
