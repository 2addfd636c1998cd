"""One rank alone: the baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import State, Strategy
from rankwise.world import World

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class Single(Strategy):
    """Plain training; each step commits itself."""

    def init(self, replica: Replica, world: World) -> State:
        return State()

    def step(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        if world.stopping:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        with world.ledger.phase("optimizer"):
            replica.optimizer.step()
        return state.trained(len(batch)).commit()
