"""What every strategy is: a start, and a step with explicit state that is prepared and then committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.strategies.compression import Flat, Memory

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class State:
    """What a strategy knows between two steps. Frozen, so that a step leaves the state before it as it was.

    A sample counts as trained once its update is in a committed synchronisation: `pending` samples
    are trained but not yet committed, `committed` ones are. Both count this rank's own samples.
    `measured` is what the strategy wants in the record of its rank, by name with unit. `memory` holds
    this rank's arrays that a checkpoint must keep, by name.
    """

    rounds: int = 0
    committed: int = 0
    pending: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)

    def trained(self, samples: int) -> State:
        """After `samples` more were trained here."""
        return replace(self, pending=self.pending + samples)

    def commit(self) -> State:
        """After a synchronisation that holds everything pending."""
        return replace(self, rounds=self.rounds + 1, committed=self.committed + self.pending, pending=0)

    def remember(self, **arrays: Flat) -> State:
        """With these arrays in its memory."""
        return replace(self, memory={**self.memory, **arrays})


class NotFiniteError(Exception):
    """What was about to be averaged, or what came of it, is not a number."""


class Strategy(ABC):
    """A way to keep ranks in step. Frozen: all that changes is in the state and the replica.

    A subclass is a frozen dataclass. Fields that are named like options of `rankwise train` are filled
    from them. A step has three parts, so that it can be undone: `train` is this rank's own and is never
    taken back; `prepare`, at the end of a round, exchanges, and fails if a rank is lost; `commit` takes
    over what was prepared, without an exchange, and cannot fail.
    """

    topologies: ClassVar[tuple[str, ...]] = ("allreduce",)
    """Topologies it knows; the first is the default."""

    sync_every: ClassVar[int | str | None] = 1
    """Steps between synchronisations unless the user says so, or ``epoch``."""

    shares_optimizer: ClassVar[bool] = False
    """Whether rank 0's optimiser state is that of all ranks."""

    survives: ClassVar[bool] = True
    """Whether the ranks can go on when one of them is lost."""

    keeps_local_work: ClassVar[bool] = True
    """Whether what a rank has trained in a round is still in its replica when the round's exchange failed;
    otherwise it is trained again."""

    synchronous: ClassVar[bool] = True
    """Whether no rank ends a round before all have come to its end. Otherwise ranks are rounds apart when one
    is lost, and each goes on from where it is."""

    syncs_every_step: ClassVar[bool] = False
    """Whether `train` exchanges too, so that all ranks make every step of a round, with an empty batch if
    they have nothing left. A round is then trained again from its beginning when a rank is lost."""

    sends_gradients: ClassVar[bool] = False
    """Whether ranks agree on gradients, never on weights, so that all may change their weights alike."""

    replicated: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays in a state's memory that are the same on all ranks, so that a newcomer takes them
    from another."""

    @abstractmethod
    def init(self, replica: Replica, world: World) -> State:
        """The state before the first step, without an exchange; all replicas are alike."""

    def expect(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        """Get ready for the gradients of a batch that is about to be trained."""
        return

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        """What this rank does by itself with the gradients of `batch`, if it holds any samples: a step of its
        optimiser, unless a strategy has other plans for them."""
        if not len(batch):
            return state
        with world.ledger.phase("optimizer"):
            replica.step()
        return state.trained(len(batch))

    @abstractmethod
    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> Any:
        """Exchange at the end of a round; returns what `commit` needs.

        Raises Interrupted, on all ranks at the same step, when `world.stopping` was set on any of them;
        what was not committed by then is dropped. Raises NotFiniteError on a rank that has sent nothing
        yet, or on all ranks.
        """

    def commit(self, state: State, replica: Replica, prepared: Any, world: World) -> State:
        """Take over what was prepared: the state after the exchange and this rank's new weights, unless a
        strategy prepares something else. Arrays in the old state's memory are left as they are."""
        after, weights = prepared
        with world.ledger.phase("pack"):
            replica.unpack(weights)
        committed: State = after.commit()
        return committed

    def recover(self, state: State, replica: Replica, world: World) -> State:
        """After ranks were lost, before the round is gone on with; without an exchange."""
        return state

    def open_epoch(self, state: State, replica: Replica, world: World) -> State:
        """Before an epoch's first batch, also after a resume; all ranks together."""
        return state

    def close_epoch(
        self, state: State, replica: Replica, weights: NDArray[np.float64], world: World
    ) -> State:
        """After an epoch's last round: leave in all replicas what is to be evaluated and saved.

        `weights` [ranks] are the shares of the ranks in the epoch's samples. All ranks together.
        """
        agree_on_buffers(replica, weights, world)
        return state


def require_finite(flat: Flat) -> None:
    """Raises NotFiniteError if a number of a flat array is none, or too large to be added up."""
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(flat.sum()):
            raise NotFiniteError


def start_alike(replica: Replica, world: World) -> None:
    """Give all ranks the weights and buffers of rank 0."""
    weights, frozen = replica.pack(), replica.pack_frozen()
    buffers, integers = replica.pack_buffers(), replica.pack_integers()
    for flat in (weights, frozen, buffers, integers):
        if flat.size:
            world.broadcast(flat)
    replica.unpack(weights)
    replica.unpack_frozen(frozen)
    replica.unpack_buffers(buffers)
    replica.unpack_integers(integers)
    if replica.average is not None:
        replica.average.begin()


def agree_on_buffers(replica: Replica, weights: NDArray[np.float64], world: World) -> None:
    """Floating-point buffers become their weighted mean, integer ones the largest.

    Training does not read them, so once an epoch, before it is evaluated, is enough.
    """
    buffers, integers = replica.pack_buffers(), replica.pack_integers()
    if buffers.size:
        buffers *= buffers.dtype.type(weights[world.rank])
        world.allreduce(buffers)
        replica.unpack_buffers(buffers)
    if integers.size:
        world.allreduce(integers, op="max")
        replica.unpack_integers(integers)
