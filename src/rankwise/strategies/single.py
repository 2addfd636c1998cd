"""One rank alone: the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import Flagged, State, Strategy
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.strategies.traffic import ModelSize, Traffic

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class Single(Strategy[State]):
    """Plain training; each step commits itself."""

    topologies: ClassVar = ()
    sync_every: ClassVar = None
    recovery: ClassVar = Recovery.FAIL_STOP
    sends_gradients: ClassVar = True

    def init(self, replica: Replica, world: World) -> State:
        return State()

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        trained = super().train(state, replica, batch, world)
        return trained.commit() if len(batch) else trained

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        if world.stopping:
            raise Interrupted(f"stopped in epoch {batch.epoch}")

    def commit(self, state: State, replica: Replica, prepared: None, world: World) -> State:
        return state

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        return Traffic()


@dataclass(frozen=True)
class SingleTurns(Single):
    """One rank alone in a user's loop, whose turns are rounds: that in which it is to stop is committed."""

    stop: ClassVar = Stop.AFTER_ROUND

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        if world.stopping:
            raise Flagged(f"stopped in epoch {batch.epoch}")
