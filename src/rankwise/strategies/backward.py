"""Gradients averaged at the end of each backward pass, for loops whose own optimisers make the steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.data.streams import WHOLE_STREAM
from rankwise.errors import Interrupted, OutOfStepError, RankLost
from rankwise.strategies.base import Flagged, State, Strategy
from rankwise.strategies.exchange import reduction_of
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.system.call_sites import here

if TYPE_CHECKING:
    from torch import Tensor

    from rankwise.models.replica import Replica

MARK, SQUARE, WEIGHT, STOPS = range(4)
"""Numbers behind the gradients: a mark of the pass, its square, the weight, and whether a rank stops."""

MARKS = 127
"""Marks are below this, so that the sum of the squares of a thousand ranks' is exact in float32."""

UNDONE = 2
"""Turns that ranks go back by at most: one may have committed what others have not."""

PLACES = TURN_ENDS, EPOCH_ENDS, MEANS = "the end of a turn", "the end of an epoch", "run.mean"
"""Where ranks meet beside passes; the highest marks are theirs."""


@dataclass(frozen=True)
class BackwardAveraging(Strategy[State]):
    """As each backward pass ends, `.grad` becomes the mean over the samples of all ranks, to which it adds up
    as in one process. So several passes, several models and optimisers, closures, clipping and scaling are
    what they are there. A turn of the loop is a round, in which all ranks make the same passes.

    A pass that fails, since a rank is lost, leaves this rank's own gradients, and the turn goes on to its
    end, where it is undone. One in which ranks hear that the run is to stop is like any other: the turn is
    committed. `Passes`, attached to the replica, make the exchanges.
    """

    topologies: ClassVar = ("allreduce",)
    shares_optimizer: ClassVar = True
    sends_gradients: ClassVar = True
    recovery: ClassVar = Recovery.ROLL_BACK
    stop: ClassVar = Stop.AFTER_ROUND
    replicated: ClassVar = ("directions",)
    undoes_exchanges: ClassVar = False

    topology: Literal["allreduce"] = "allreduce"
    compress: str = "none"

    def init(self, replica: Replica, world: World) -> State:
        replica.attach(Passes(replica.parameters, self.compress, world))
        return State()

    def expect(self, state: State, replica: Replica, batch: Batch, world: World) -> None:
        replica.attached(Passes).begin(state, batch)

    def train(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        return state.trained(len(batch))

    def prepare(self, state: State, replica: Replica, batch: Batch, world: World) -> State:
        passes = replica.attached(Passes)
        after = passes.end_turn()
        prepared = replace(state, memory=after.memory, measured=after.measured)
        stops, passes.stops = passes.stops, False
        if stops:
            raise Flagged(f"stopped in epoch {batch.epoch}", prepared=prepared)
        return prepared

    def commit(self, state: State, replica: Replica, prepared: State, world: World) -> State:
        return prepared.commit()

    def recover(self, state: State, replica: Replica, world: World) -> State:
        replica.attached(Passes).forget()
        return replace(state, pending=0)

    def close_epoch(
        self, state: State, replica: Replica, weights: NDArray[np.float64], world: World
    ) -> State:
        replica.attached(Passes).meet(EPOCH_ENDS)
        return super().close_epoch(state, replica, weights, world)


class Passes:
    """The backward passes of a turn, whose gradients of `parameters` are averaged over all ranks.

    One flat array holds the gradients of a pass times the rank's share in the turn. Behind them stand a
    number for each parameter, on how many ranks it has one, and a tail by which each rank finds out whether
    all are in the same pass and have read the same stream, and whether one is to stop. These are never
    compressed. What compression leaves out of a pass is added to the pass of the same number in the next
    turn: that of a model's and of another's have nothing to do with each other. `stops` says that a rank was
    to stop in the turn, in which all made the same passes so far.
    """

    def __init__(self, parameters: Sequence[Tensor], compress: str, world: World) -> None:
        import torch

        from rankwise.models.replica import Layout

        self._world = world
        self._parameters = list(parameters)
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        layout = Layout(self._parameters)
        self._reduction = reduction_of("allreduce", compress, layout.shapes)
        self._tensor = torch.zeros(
            layout.size + len(self._parameters) + 4, dtype=torch.float64 if wide else torch.float32
        )
        self._flat: NDArray[Any] = self._tensor.numpy()
        self._size = layout.size
        self._counts = self._flat[layout.size : -4]
        self._tail = self._flat[-4:]
        self._behind = self._flat[layout.size :]
        self._gradients = self._tensor[: layout.size]
        self._views = layout.views(self._tensor)
        self._state = State()
        self._share, self._turn, self._pass, self._content = 0.0, 0, 0, 0
        self._weight: float | None = None
        self._before: list[Tensor | None] = []
        self._at = 0, 0
        self._grown: dict[tuple[int, int], list[Tensor | None]] = {}  # gradients with which turns began
        self._task, self._graph_task = -1, torch._C._current_graph_task_id
        self._holds = self._is_held = self._weighted = False
        self._error: RankLost | Interrupted | None = None
        self.stops = False
        for parameter in self._parameters:
            parameter.register_hook(self._came)  # type: ignore[no-untyped-call]

    def begin(self, state: State, batch: Batch) -> None:
        """A turn begins."""
        self.forget()
        self._state = state
        self._share = batch.share
        self._turn = 31 * batch.epoch + batch.step
        self._at = batch.epoch, batch.step
        self._content = batch.content
        if (gradients := self._grown.get(self._at)) is not None:  # the turn is made again
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient
        self._grown = {at: its for at, its in self._grown.items() if at < self._at}
        while len(self._grown) > UNDONE - 1:
            del self._grown[min(self._grown)]

    def gradients_before(self, epoch: int, step: int) -> list[Tensor | None] | None:
        """What the parameters had in `.grad` when this turn began; None if no pass was made in it."""
        return self._grown.get((epoch, step))

    def end_turn(self) -> State:
        """The turn ends: what is held leaves, and a turn without a pass makes one of nothing, so that all
        ranks meet. Returns the state with what compression remembers.

        Raises RankLost and Interrupted, also if a pass of the turn would have.
        """
        self.send_held()
        if not self._pass:
            self.meet(TURN_ENDS)
        if self._error is not None:
            raise self._error
        return self._state

    def send_held(self) -> None:
        """What passes have left here for a later one leaves now, before it is used."""
        if self._is_held:
            self._set_aside()
            self._exchange([None] * len(self._parameters))
            self._add_back()

    def meet(self, where: str) -> bool:
        """All ranks have come to the same of PLACES; returns whether the turn goes on as it should. Raises
        OutOfStepError, on all, if they have not."""
        kept = self._flat.copy() if self._is_held else None
        self._flat[:] = 0
        goes_on = self._sum(MARKS - 1 - PLACES.index(where), where)
        if kept is not None:
            self._flat[:] = kept
        return goes_on

    def forget(self) -> None:
        """Forget the turn."""
        self._pass = 0
        self._is_held = False
        self._error = None
        self.stops = False

    def lose(self, error: RankLost) -> None:
        """An exchange of the loop's own has failed: the turn ends as if one of a pass had."""
        self._error = error

    @contextmanager
    def weighted(self, weight: float | None) -> Iterator[None]:
        """Passes inside count by `weight`, and not by the samples of the turn, unless it is None."""
        self._weight = weight
        try:
            yield
        finally:
            self._weight = None

    @contextmanager
    def summed(self) -> Iterator[None]:
        """Passes inside are of sums, and are added up over the ranks."""
        share, self._share = self._share, float(self._share > 0)
        try:
            yield
        finally:
            self._share = share

    @contextmanager
    def held(self) -> Iterator[None]:
        """Passes inside wait for the next one outside, or for the end of the turn."""
        self._holds = True
        try:
            yield
        finally:
            self._holds = False

    def _came(self, _: Tensor) -> None:
        """A gradient has come, and is added to what the parameter has after this. At the first one of a pass
        that is set aside."""
        task = self._graph_task()
        if task == self._task:
            return
        import torch

        self._add_back()  # of a pass that has failed
        self._task = task
        self._set_aside()
        self._world.ledger.enter("backward")
        torch.autograd.Variable._execution_engine.queue_callback(self._over)

    def _over(self) -> None:
        """The pass is over."""
        self._task = -1
        found = [parameter.grad for parameter in self._parameters]
        alone = self._world.size == 1 and not self._reduction.compresses
        # Nothing came where gradients were only asked for.
        if not alone and self._error is None and any(gradient is not None for gradient in found):
            with self._world.ledger.phase("pack"):
                self._hold(found)
            if self._holds:
                self._forget_gradients()
            else:
                self._exchange(found)
        self._add_back()
        self._world.ledger.enter("other")

    def _set_aside(self) -> None:
        """What a pass adds stands alone."""
        before = [parameter.grad for parameter in self._parameters]
        if self._at not in self._grown and self._world.size > 1:
            # A turn that is made again adds to what earlier ones have left, as gradients are accumulated.
            self._grown[self._at] = [None if its is None else its.clone() for its in before]
        if any(its is not None for its in before):  # most loops have just set all to None
            self._before = before
            self._forget_gradients()

    def _forget_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _add_back(self) -> None:
        """What was set aside, and what a pass has made since."""
        for parameter, before in zip(self._parameters, self._before, strict=False):
            if before is not None:
                if parameter.grad is not None:
                    before.add_(parameter.grad)
                parameter.grad = before
        self._before = []

    def _hold(self, found: Sequence[Tensor | None]) -> None:
        """Put the gradients of a pass into the flat array, or add them to what is held there."""
        import torch

        views = self._views
        scale = self._share if self._weight is None else self._weight
        # Without weight they count for nothing, also those that are no numbers, as of a mean over nothing.
        with torch.no_grad():
            gradients = [
                torch.zeros_like(view)
                if its is None or not scale
                else (its.to_dense() if its.is_sparse else its)
                for its, view in zip(found, views, strict=True)
            ]
            if not self._is_held:
                torch._foreach_copy_(views, gradients)
                self._gradients.mul_(scale)
                self._behind[:] = 0
            else:
                torch._foreach_add_(views, [its.to(self._tensor.dtype) for its in gradients], alpha=scale)
        self._counts += [its is not None for its in found]
        self._tail[WEIGHT] += scale
        self._weighted = self._weight is not None
        self._is_held = True

    def _exchange(self, found: Sequence[Tensor | None]) -> None:
        """Average what is held over all ranks, into the gradients of this pass, which are `found` now."""
        self._is_held = False
        mark = 13 * self._turn + 2 * self._pass + self._weighted + self._content
        mark %= MARKS - len(PLACES)
        where = f"backward pass {self._pass + 1} of a turn"
        self._pass += 1
        if not self._sum(mark, where):
            return
        with self._world.ledger.phase("pack"):
            if self._weighted:
                if not self._tail[WEIGHT]:
                    raise OutOfStepError(
                        "backward passes were given the weight 0 on all ranks, expected more"
                    )
                self._gradients.div_(float(self._tail[WEIGHT]))
            self._give(found)

    def _give(self, found: Sequence[Tensor | None]) -> None:
        """Make what is in the flat array the gradients; of parameters that have none on any rank nothing."""
        import torch

        dense = [its for its in found if its is not None and not its.is_sparse]
        if self._counts.all() and len(dense) == len(found):
            with torch.no_grad():
                torch._foreach_copy_(dense, self._views)
            return
        for parameter, view, count in zip(self._parameters, self._views, self._counts, strict=True):
            parameter.grad = view.to(parameter.dtype, copy=True) if count else None

    def _sum(self, mark: int, where: str) -> bool:
        """Add the flat array up; returns whether the turn goes on as it should."""
        if self._error is not None:
            return False
        world, tail = self._world, self._tail
        tail[MARK], tail[SQUARE], tail[STOPS] = mark, mark * mark, world.stopping
        try:
            world.allreduce(self._behind if self._reduction.compresses else self._flat)
            if self._reduction.compresses and mark < MARKS - len(PLACES):
                self._sum_compressed()
        except RankLost as error:
            self._error = error
            return False
        are_alike = tail[MARK] ** 2 == tail[SQUARE] * world.size
        if are_alike:
            self.stops = self.stops or bool(tail[STOPS])
            return True
        if tail[STOPS]:  # a rank may have left its loop, which they tell each other where the turn ends
            self._error = Interrupted("stopped in a turn of the loop")
            return False
        return self._refuse(where)

    def _refuse(self, where: str) -> bool:
        """All ranks are told that they are not in the same pass, and tell each other where they are."""
        try:
            found = self._world.allgather_object((where, here(), self._content))
        except RankLost as error:
            self._error = error
            return False
        contents = [its[2] for its in found]
        if other := next((rank for rank, its in enumerate(contents) if its != contents[0]), 0):
            raise OutOfStepError(
                f"the streams of a loader differ, rank {other} has read other samples than rank 0 by turn "
                f"{self._at[1]}: {WHOLE_STREAM}"
            )
        places = [its[:2] for its in found]
        other = next((rank for rank, its in enumerate(places) if its[0] != places[0][0]), 0)
        words = " and ".join(f"rank {rank} at {' in '.join(places[rank])}" for rank in sorted({0, other}))
        raise OutOfStepError(
            f"ranks are not in the same backward pass, {words}: make the same passes in each "
            "turn of the loop on all ranks"
        )

    def _sum_compressed(self) -> None:
        if self._tail[MARK] ** 2 != self._tail[SQUARE] * self._world.size:
            return  # of which all are told
        flat = np.append(self._flat[: self._size], self._flat.dtype.type(0))
        memory = dict(self._state.memory)
        residual = "residual" if self._pass == 1 else f"residual_{self._pass}"
        others = {name: memory.pop(name) for name in list(memory) if name.startswith("residual")}
        if residual in others:
            memory["residual"] = others[residual]
        state = replace(self._state, memory=memory, rounds=self._state.rounds + self._pass - 1)
        _, after = self._reduction(flat, np.ones(self._world.size), self._world, state)
        memory = {**after.memory}
        memory = {**others, **memory, residual: memory.pop("residual")}
        self._state = replace(after, memory=memory, rounds=self._state.rounds)
        self._flat[: self._size] = flat[:-1]
