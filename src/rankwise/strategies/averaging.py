"""Averaging of weights every so many steps: the paper's exchange, local SGD, and its relatives."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks, World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import State, Strategy, require_finite
from rankwise.strategies.compression import Flat
from rankwise.strategies.exchange import Reduction

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class RoundState(State):
    """`reduction` is how ranks add up; `anchor` are the weights that the last round ended with, where
    somebody needs them."""

    reduction: Reduction | None = None
    anchor: Flat | None = None


@dataclass(frozen=True)
class Averaged:
    """What a round agreed on: the mean of all weights, and the state that the exchange left."""

    flat: Flat
    state: State
    rate: float


@dataclass(frozen=True)
class ParameterAveraging(Strategy):
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

    def init(self, replica: Replica, world: World) -> State:
        return RoundState(reduction=Reduction.of(self.topology, self.compress, replica.shapes))

    def open_epoch(self, state: State, replica: Replica, world: World) -> State:
        assert isinstance(state, RoundState)
        assert state.reduction is not None
        if self._steps_outside or state.reduction.compressor:
            return replace(state, anchor=replica.pack().copy())
        return state

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> Averaged:
        with world.ledger.phase("pack"):
            # One place behind the weights carries the wish to stop, so that no extra message does.
            flat = replica.pack(tail=1)
            flat[-1] = world.stopping
            if batch.weights[world.rank]:
                require_finite(flat)
        stops, after = self._average(flat, state, batch.weights, world)
        if stops:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        return Averaged(flat[:-1], after, replica.optimizer.param_groups[0]["lr"])

    def commit(self, state: State, replica: Replica, prepared: Averaged, world: World) -> State:
        after, flat = prepared.state, prepared.flat
        assert isinstance(after, RoundState)
        if self._steps_outside:
            with world.ledger.phase("optimizer"):
                after, flat = self._step_outside(after, flat, prepared.rate, replica.size)
        with world.ledger.phase("pack"):
            replica.unpack(flat)
            if after.anchor is not None:
                after = replace(after, anchor=flat.copy())
        if self.optimizer_state == "reset":
            replica.reset_optimizer()
        return after.commit()

    def _average(
        self, flat: Flat, state: State, weights: NDArray[np.float64], ranks: Ranks
    ) -> tuple[bool, State]:
        """Overwrite this rank's weights with the mean over `ranks`, whose shares are `weights` [ranks].

        Behind the weights stands a flag: returns whether any of the ranks set it, and the state.
        """
        assert isinstance(state, RoundState)
        assert state.reduction is not None
        with ranks.ledger.phase("pack"):
            if state.reduction.compressor and state.anchor is not None:
                flat[:-1] -= state.anchor  # what has changed is small, and can be sent with fewer bits
            flat[:-1] *= flat.dtype.type(weights[ranks.rank])
        stops, after = state.reduction(flat, weights, ranks, state)
        if state.reduction.compressor and state.anchor is not None:
            flat[:-1] += state.anchor
        return stops, after

    @property
    def _steps_outside(self) -> bool:
        return self.outer_lr != 1 or self.outer_momentum != 0

    def _step_outside(
        self, state: RoundState, mean: Flat, rate: float, parameters: int
    ) -> tuple[RoundState, Flat]:
        """The outer optimiser's step on the parameters; of shared optimiser state the mean is taken."""
        assert state.anchor is not None
        scale = mean.dtype.type(rate if self.by_rate else 1)
        before = state.anchor[:parameters]
        gradient = (before - mean[:parameters]) / scale
        momentum = gradient.copy()
        if "outer_momentum" in state.memory:
            momentum += mean.dtype.type(self.outer_momentum) * state.memory["outer_momentum"]
        step = (
            gradient + mean.dtype.type(self.outer_momentum) * momentum if self.nesterov_outside else momentum
        )
        mean[:parameters] = before - mean.dtype.type(self.outer_lr) * scale * step
        remembered = state.remember(outer_momentum=momentum)
        assert isinstance(remembered, RoundState)
        return remembered, mean
