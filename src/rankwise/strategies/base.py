"""What every strategy is: `init` and `step` with explicit state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

from rankwise.data.sampler import Batch
from rankwise.world import World

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class State:
    """What a strategy knows between two steps.

    A sample counts as trained once its update is in a committed synchronisation: `pending` samples
    are trained but not yet committed, `committed` ones are. Both count this rank's own samples.
    `measured` is what the strategy wants in the record of its rank, by name with unit.
    """

    rounds: int = 0
    committed: int = 0
    pending: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)

    def trained(self, samples: int) -> State:
        """After `samples` more were trained here."""
        return replace(self, pending=self.pending + samples)

    def commit(self) -> State:
        """After a synchronisation that holds everything pending."""
        return replace(self, rounds=self.rounds + 1, committed=self.committed + self.pending, pending=0)


class Strategy(ABC):
    """A way to keep ranks in step. Frozen: all that changes is in the state and the replica."""

    replicates: ClassVar[bool] = False
    """Whether every worker trains on all samples instead of a shard."""

    @abstractmethod
    def init(self, replica: Replica, world: World) -> State:
        """Bring all replicas to the same start; called once by all ranks together."""

    @abstractmethod
    def step(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        """Use the gradients of `batch` (none if it is empty) and synchronise where that is due.

        Returns the state after it. Raises Interrupted, on all ranks at the same step, when
        `world.stopping` was set on any of them; what was not committed by then is dropped.
        """
