"""What every strategy is: a start, and a step with explicit state that is prepared and then committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import ConfigError, Interrupted, OutOfStepError
from rankwise.strategies.compression import Flat, Memory
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.strategies.traffic import ITEM_BYTES, Collective, Exchange, ModelSize, Traffic

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class State:
    """What a strategy knows between two steps: values, in a frozen dataclass, so that a step leaves the state
    before it as it was. What hangs on the model, such as hooks, is attached to the replica.

    A sample counts as trained once its update is in a committed synchronisation: `pending` samples
    are trained but not yet committed, `committed` ones are. Both count this rank's own samples.
    `measured` goes into the record of the rank, by name with unit. `memory` holds the rank's arrays that a
    checkpoint must keep, by name.
    """

    rounds: int = 0
    committed: int = 0
    pending: int = 0
    measured: Mapping[str, float] = field(default_factory=dict)
    memory: Memory = field(default_factory=dict)

    def trained(self, samples: int) -> Self:
        """After `samples` more were trained here."""
        return replace(self, pending=self.pending + samples)

    def commit(self) -> Self:
        """After a synchronisation that holds everything pending."""
        return replace(self, rounds=self.rounds + 1, committed=self.committed + self.pending, pending=0)

    def remember(self, **arrays: Flat) -> Self:
        """With these arrays in its memory."""
        return replace(self, memory={**self.memory, **arrays})


S = TypeVar("S", bound=State)

OF_SITTING = {"of_sitting": True}
"""Metadata of a state's field that a run does not go on with after a stop."""


class Flagged(Interrupted):
    """The flag of an exchange was up. Of an exchange that was made all the same, `prepared` is what `commit`
    needs."""

    def __init__(self, message: str, prepared: Any = None) -> None:
        super().__init__(message)
        self.prepared = prepared


class NotFiniteError(Exception):
    """What was about to be averaged, or what came of it, is not a number."""


class Strategy(ABC, Generic[S]):
    """A way to keep ranks in step, with a state of type S. Frozen: all that changes is in the state and the
    replica.

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

    recovery: ClassVar[Recovery] = Recovery.KEEP_LOCAL_WORK
    """How the ranks go on when one of them is lost."""

    stop: ClassVar[Stop] = Stop.IN_ROUND
    """Where the ranks stand when the run is to stop."""

    sends_gradients: ClassVar[bool] = False
    """Whether ranks agree on gradients, never on weights, so that all may make the same change to them."""

    needs_all_gradients: ClassVar[bool] = False
    """Whether every parameter must have a gradient in each step, so that none can be frozen."""

    undoes_exchanges: ClassVar[bool] = True
    """Whether one commit can be undone back to where its exchange began; otherwise ranks go back by whole
    rounds only, and keep no copy from between."""

    ends_early: ClassVar[bool] = True
    """Whether it carries to all ranks that one has left its loop over batches, or makes no step with one."""

    weighs_samples: ClassVar[bool] = True
    """Whether a rank counts in a mean by its samples, so that batches may differ in size."""

    replicated: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays in a state's memory that are the same on all ranks, so that a newcomer takes them
    from another."""

    @abstractmethod
    def init(self, replica: Replica, world: World) -> S:
        """The state before the first step, without an exchange; all replicas are the same."""

    def expect(self, state: S, replica: Replica, batch: Batch, world: World) -> None:
        """Get ready for the gradients of a batch that is about to be trained."""
        return

    def train(self, state: S, replica: Replica, batch: Batch, world: World) -> S:
        """What this rank does by itself with the gradients of `batch`, if it holds any samples: by default a
        step of its optimiser."""
        if not len(batch):
            return state
        with world.ledger.phase("optimizer"):
            replica.step()
        return state.trained(len(batch))

    @abstractmethod
    def prepare(self, state: S, replica: Replica, batch: Batch, world: World) -> Any:
        """Exchange at the end of a round; returns what `commit` needs.

        Raises Interrupted, on all ranks at the same step, when `world.stopping` was set on any of them: it is
        to stop; or it has left its loop, and the exchange may be made anew. State and weights are as they
        were. A strategy that stops after the round raises Flagged. Raises NotFiniteError on a rank that has
        sent nothing yet, or on all ranks.
        """

    def complete(self, state: S, replica: Replica, batch: Batch, world: World, flagged: Flagged) -> Any:
        """What `commit` needs of the exchange that has just raised `flagged` on all ranks, as the run is to
        stop after this round (`Stop.AFTER_ROUND`). All ranks together; no flag is up."""
        return flagged.prepared

    def commit(self, state: S, replica: Replica, prepared: Any, world: World) -> S:
        """Take over what was prepared: by default the state after the exchange and this rank's new weights.
        Leaves arrays in the old state's memory as they are."""
        after, weights = prepared
        with world.ledger.phase("pack"):
            replica.unpack(weights)
        committed: S = after.commit()
        return committed

    def recover(self, state: S, replica: Replica, world: World) -> S:
        """The state after ranks were lost, before the round goes on; without an exchange."""
        return state

    def copy_of_rank_0(self, state: S) -> tuple[int, Flat] | None:
        """What rank 0 alone has, as this rank knows it, and a number that is higher the newer it is. None on
        rank 0 itself, and where it has nothing that others have not."""
        return None

    def follow_rank_0(self, state: S, replica: Replica, world: World, newest: int, copy: Flat | None) -> S:
        """The state after `recover`, where ranks have copies of what rank 0 alone has, of which the `newest`
        has this number: `copy`, on a rank 0 that takes the place of a lost one. Without an exchange."""
        return state

    def open_epoch(self, state: S, replica: Replica, world: World) -> S:
        """Before an epoch's first batch, also after a resume; all ranks together."""
        return state

    def close_epoch(self, state: S, replica: Replica, weights: NDArray[np.float64], world: World) -> S:
        """After an epoch's last round: leave in all replicas what is to be evaluated and saved.

        `weights` [ranks] are the shares of the ranks in the epoch's samples. All ranks together.
        """
        agree_on_buffers(replica, weights, world)
        return state

    def traffic(self, model: ModelSize, hosts: Sequence[int]) -> Traffic:
        """What `train` and `prepare` exchange, for a prediction: of two ranks or more, `hosts` [hosts] of
        them on each host. Raises ConfigError if the strategy does not say."""
        raise ConfigError(
            f"{type(self).__name__} does not say what it sends, so no run of it can be predicted: write its "
            "method traffic(model, hosts), which docs/extending.md explains"
        )

    def closing_traffic(self, model: ModelSize) -> tuple[Exchange, ...]:
        """What `close_epoch` exchanges: by default the buffers."""
        return buffers_traffic(model)


ROUNDING = 1e-4
"""Part of the largest weight of a tensor by which ranks may differ, as processors of several makes round."""

TINY = 1e-30


def require_finite(flat: Flat) -> None:
    """Raises NotFiniteError if a number of a flat array is none, or too large to be added up."""
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(flat.sum()):
            raise NotFiniteError


def meet(world: World, *, stops: bool) -> None:
    """Raises Interrupted on all ranks if any of them stops: where ranks that are rounds apart meet."""
    flag = np.array([float(stops)])
    world.allreduce(flag, op="max")
    if flag[0]:
        raise Interrupted("stopped at the end of an epoch that was cut short")


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
    _share_extra_state(replica, world, 0)
    if replica.average is not None:
        replica.average.begin()


def agree_on_buffers(replica: Replica, weights: NDArray[np.float64], world: World) -> None:
    """Make floating-point buffers their weighted mean, and integer ones the largest. Those that are the same
    on all ranks stay as they are, bit for bit: tables and masks, which may hold infinities.

    Training does not read the others, so once an epoch, before it is evaluated, is enough. Extra state of
    modules, of which there is no mean, becomes that of the first rank that has trained.
    """
    if world.size == 1:
        return
    _share_extra_state(replica, world, int(np.argmax(weights > 0)))
    replica.buffers.gather()
    integers, marks = replica.pack_integers(), replica.buffer_marks()
    largest = np.concatenate([integers, marks, -marks])
    if largest.size:
        world.allreduce(largest, op="max")
        replica.unpack_integers(largest[: integers.size])
    highest, lowest = np.split(largest[integers.size :], 2)
    differs = highest != -lowest
    if differs.any():
        buffers = replica.pack_buffers()
        with np.errstate(invalid="ignore"):  # of those that are the same
            buffers *= buffers.dtype.type(weights[world.rank])
            world.allreduce(buffers)
        replica.unpack_buffers(buffers, differs.tolist())


def _share_extra_state(replica: Replica, world: World, root: int) -> None:
    if replica.extra:
        mine = replica.extra.copy() if world.rank == root else None
        replica.extra.load(world.broadcast_object(mine, root))


def require_same_weights(replica: Replica, epoch: int, world: World, *, rates: bool) -> None:
    """Raises OutOfStepError, on all ranks, if they are at the end of different epochs, set different rates
    and the like in their optimisers, or hold parameters that differ by more than rounding on processors of
    several makes; all ranks together. Without `rates` the rates are the schedule's, which a rank that came
    in late has not asked yet."""
    if world.size == 1:
        return
    mark, settings = replica.settings(rates=rates)
    marks = np.array([replica.weight_mark(), epoch, mark])
    marks = np.concatenate([marks, -marks])
    world.allreduce(marks, op="max")
    same_weights, same_epoch, same_settings = (marks[:3] == -marks[3:]).tolist()
    if not same_epoch:
        epochs = world.allgather(np.array([epoch]))[:, 0]
        other = int((epochs != epochs[0]).argmax())
        raise OutOfStepError(
            f"rank {other} is at the end of epoch {epochs[other]} while rank 0 is at that of epoch "
            f"{epochs[0]}: train the same epochs on all ranks"
        )
    if not same_settings:
        _refuse_settings(world.allgather_object(settings))
    if not same_weights:
        _require_near(replica, world)


def _refuse_settings(settings: Sequence[dict[tuple[int, str], Any]]) -> None:
    for rank, its in enumerate(settings):
        for group, name in settings[0].keys() | its.keys():
            first, other = settings[0].get((group, name)), its.get((group, name))
            if first != other:
                raise OutOfStepError(
                    f"at the end of an epoch the optimiser's group {group} has {name} = {other} on rank "
                    f"{rank} and {first} on rank 0: what changes it must do so equally often in each rank, "
                    "and a master runs no turn of a loop (step a schedule by epochs, not by batches)"
                )


def _require_near(replica: Replica, world: World) -> None:
    names, mine = replica.named_weights()
    first = [weights.copy() for weights in mine]
    for weights in first:
        world.broadcast(weights)
    pairs = zip(mine, first, strict=True)
    off = np.array(
        [np.abs(own - its).max(initial=0) / max(np.abs(its).max(initial=0), TINY) for own, its in pairs]
    )
    rows = world.allgather(np.nan_to_num(off, nan=np.inf))
    for rank, row in enumerate(rows):
        if row.max() > ROUNDING:
            raise OutOfStepError(
                f"at the end of an epoch rank {rank} has other weights than rank 0, first in "
                f"{names[int((row > ROUNDING).argmax())]}: what changes weights or learning rates must do so "
                "equally often in each rank (step a schedule by epochs, not in the loop over batches)"
            )


@dataclass(frozen=True)
class _Left:
    """What a replica's parameters were when an epoch was closed, as a hash."""

    mark: int


def leave(replica: Replica) -> None:
    """An epoch is closed, and the replica holds what is evaluated and not what it goes on from."""
    replica.attach(_Left(replica.weight_mark()))


def is_as_left(replica: Replica) -> bool:
    """Whether nobody has given the replica other weights since; true after a resume."""
    try:
        left = replica.attached(_Left)
    except KeyError:
        return True
    return left.mark == replica.weight_mark()


def marks_traffic(recovery: Recovery) -> tuple[Exchange, ...]:
    """What `require_same_weights` exchanges where weights are the same."""
    return (Collective("allreduce", 48),) if recovery.synchronous else ()


def buffers_traffic(model: ModelSize) -> tuple[Exchange, ...]:
    """What `agree_on_buffers` exchanges."""
    sizes = ((model.integers + 2 * model.buffer_tensors) * 8, model.buffers * ITEM_BYTES)
    return tuple(Collective("allreduce", size) for size in sizes if size)
