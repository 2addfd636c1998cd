"""The turns of a user's loop on one rank: what they train, and what becomes of it when they end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from rankwise.comm import World
from rankwise.comm.exchanges import nothing_owed, raising
from rankwise.data.partition import NOTHING, Indices
from rankwise.data.sampler import Batch
from rankwise.data.streams import StreamSampler
from rankwise.errors import ConfigError, RankLost
from rankwise.models.loop_replica import LoopReplica
from rankwise.models.snapshot import Snapshot
from rankwise.plan import RunPlan
from rankwise.runs.progress import NoProgress
from rankwise.strategies.backward import MEANS, BackwardAveraging, Passes
from rankwise.strategies.base import Strategy
from rankwise.strategies.gradients import GradientAveraging
from rankwise.strategies.recovery import Stop
from rankwise.strategies.single import Single, SingleTurns
from rankwise.survival.fault_injection import NoFaults
from rankwise.system.call_sites import here, left_by, place_of
from rankwise.training.admission import JoinState
from rankwise.training.agreement import require_same_model, require_same_place
from rankwise.training.around import Around
from rankwise.training.counting import count_samples
from rankwise.training.history import SampleCounts
from rankwise.training.loader import Draw, Loader
from rankwise.training.metrics import NOTHING as NOTHING_LOGGED
from rankwise.training.metrics import Metrics
from rankwise.training.observer import Observer, Recovered
from rankwise.training.place import Place
from rankwise.training.stream import StreamLoader
from rankwise.training.synchroniser import Synchroniser

T = TypeVar("T")

NO_DRAW = Draw(NOTHING)
"""Of a pass without a loader."""


def strategy_of(plan: RunPlan) -> Strategy[Any]:
    """How the ranks of a loop keep in step: where gradients are averaged, that is done in each backward pass,
    since the loop makes the steps. What can commit each turn does."""
    strategy = plan.entry.build(plan)
    if isinstance(strategy, GradientAveraging):
        return BackwardAveraging(compress=strategy.compress)
    return SingleTurns() if isinstance(strategy, Single) else strategy


class Turns:
    """Keeps the turns of a loop in step with those of other ranks, by a replica of what it trains.

    A pass is one iteration over a loader, or over `steps`; passes are numbered from 1, as the epochs of a
    `Synchroniser` are. A turn ends, and commits, when the next one is asked for or the loop is left. A rank
    that comes in for a lost one goes on from its `join_state`.
    """

    def __init__(
        self,
        plan: RunPlan,
        world: World,
        replica: LoopReplica,
        metrics: Metrics,
        *,
        least: int,
        faults: NoFaults,
        observer: Observer,
        progress: NoProgress,
        join_state: JoinState | None = None,
        loaders: Sequence[Loader[Any]] = (),
    ) -> None:
        if join_state is None:
            require_same_model(world, replica.model, replica.optimizer)
        self.world = world
        self.replica = replica
        self.metrics = metrics
        self.weight: float | None = None
        self.passes = 0
        self.batch_size: int | None = None
        self.loaders = loaders
        self.turn = self.made = 0
        self._loader: Loader[Any] | None = None
        self._lost: RankLost | None = None
        self._lent: Snapshot | None = None
        self._ended_early = False
        self._observer = observer
        self.seconds = 0.0
        self._pass_began_s = 0.0
        self._turns_before = self._passes_before = self._left_out = 0
        self._drawn = self._drawn_for_nothing = NO_DRAW
        self._kind = ""
        self._draws: list[int] = []
        self._counts: dict[int, SampleCounts] = {}
        self._seed, self._spares = plan.seed, plan.spares
        self._is_open = self._is_left = self._takes_own_data = False
        self._progress = progress
        self._least = least
        self._sampler = StreamSampler(
            rank=world.rank,
            ranks=world.size,
            sync_every=lambda _: self._turns_a_round(plan),
            keeps_global_batch=plan.on_shrink == "keep-global-batch",
        )
        self._strategy = strategy_of(plan)
        self.synchroniser = Synchroniser(
            replica,
            self._strategy,
            self._sampler,
            world,
            survives=plan.on_failure == "continue" and world.size > 1,
            min_ranks=plan.min_ranks,
            spares=plan.spares,
            faults=faults,
            observer=self,
            join_state=join_state,
        )
        self.around = Around(self.synchroniser, replica, metrics)
        if join_state is not None:
            self.come_in(join_state.history)

    @property
    def backward(self) -> Passes | None:
        """The backward passes of a turn, where gradients are averaged in them."""
        try:
            return self.replica.attached(Passes)
        except KeyError:
            return None

    def over(self, loader: Loader[T]) -> Iterator[T]:
        """One pass over a loader's samples: this rank's batch of each turn."""
        if isinstance(loader, StreamLoader):
            yield from self.over_stream(loader)
            return
        self._require_no_open_turn()
        self.batch_size = loader.batch_size
        ledger = self.world.ledger
        ledger.enter("data")
        mine = self._draw(loader.draw)
        cuts = loader.cuts if mine.batches is None else f"{len(mine.batches)} batches"
        if not self.around.arrival.enters_pass(loader.kind):
            if not self._begin_pass(f"loop over {len(mine.order)} samples in {cuts}", mine):
                return
            self._kind = loader.kind
            batches = self._drawn.batches
            if batches is not None and not batches.all():
                raise ConfigError(
                    "the loader's batch_sampler has drawn an empty batch, expected samples in each"
                )
            cut = loader.cut(self._least)
            self._sampler.begin(self.passes + 1, len(self._drawn.order), batches=batches, **cut)
        order = self._drawn.order
        ledger.enter("other")
        self._loader = loader
        try:
            yield from self._turns(lambda batch: loader.take(order[_samples(batch)], self._ahead(order)))
        finally:
            self._loader = None
        loader.leave()

    def over_stream(self, loader: StreamLoader[T], most: int | None = None) -> Iterator[T]:
        """One pass over a stream, of which each rank reads all and gets its part; with `most` over as many
        turns of it, from where the last such pass has ended."""
        self._require_no_open_turn()
        self.batch_size = loader.batch_size
        if self._spares:
            raise ConfigError(
                f"--spares {self._spares} was given, but no rank can come into a pass over a stream: leave "
                "it out, and the others go on without a lost rank"
            )
        mine = self._draw(loader.draw if most is None else loader.draw_on)
        last = " without the last" if loader.drop_last else ""
        workers = f" by {loader.num_workers} workers" if loader.num_workers else ""
        where = f", {most} turns from sample {sum(loader.place or ())}" if most else ""
        doing = f"loop over a stream in batches of {loader.batch_size}{last}{workers}{where}"
        if not self._begin_pass(doing, mine):
            return
        self._kind = ""
        drawn = self._drawn
        seed = [self._seed, self.loaders.index(loader), loader.draws]
        is_new = not any(loader.place or ())
        compares = self.backward is None
        reader = loader.open(drawn, seed, self.world, stops=self._stops_reading, compares=compares)
        self._sampler.begin_stream(
            self.passes + 1, reader, batch_size=loader.batch_size or 1, least=self._least, most=most
        )
        self._loader = loader
        try:
            yield from self._turns(lambda _: reader.take())
        finally:
            self._loader = None
        self.synchroniser.retry_until_all(reader.compare)
        loader.end_pass()
        if most and is_new and not self.made:
            raise ConfigError("run.steps got a loader over a stream without a batch, expected one at least")

    def _stops_reading(self) -> bool:
        """Whether this rank is to stop, and goes to the end of the round without training."""
        return self.world.asked_to_stop and self._strategy.stop is not Stop.AFTER_ROUND

    @property
    def learning_rate(self) -> float:
        """Of the first group of the first optimiser."""
        groups = self.replica.optimizer.param_groups or self.replica.closed[0].param_groups
        return float(groups[0]["lr"])

    @property
    def steps_made(self) -> int:
        """Turns of the epoch so far."""
        return self._turns_before

    def count(self) -> SampleCounts:
        """The samples of the epoch's passes so far; all ranks together."""
        columns = zip(*map(astuple, self._counted().values()), strict=True)
        return SampleCounts(*map(sum, columns))

    def _counted(self) -> dict[int, SampleCounts]:
        """The samples of each pass of the epoch; all ranks together."""
        number = self.passes
        if number in self._counts or number <= self._passes_before:
            return self._counts
        expected = self._sampler.expected(number)
        trained = np.bincount(self.synchroniser.trained(), minlength=len(expected))
        if self._ended_early:  # nothing was left out but what the loop itself did
            total = np.append(trained, 0)
            total[-1] = self._left_out if self.world.rank == 0 else 0
            self.world.allreduce(total)
            expected = total[:-1].clip(max=1)
            expected[np.flatnonzero(expected == 0)[: total[-1]]] = 1  # turns hold samples in their order
        return {**self._counts, number: count_samples(self.world, trained, expected, self._seed)}

    def turns_of(self, loader: Loader[Any]) -> int:
        """How many turns a pass over a loader has; the one under way, as its turns are dealt now."""
        if loader is self._loader:
            return self._sampler.steps(self.passes)
        return self._sampler.turns(loader.drawn(), **loader.cut(self._least))

    def steps(self, count: int) -> Iterator[int]:
        """`count` turns, each with data of the loop's own, of which all ranks have equally much."""
        self._require_no_open_turn()
        self._draws = [its.draws_so_far for its in self.loaders]
        kind = f"make {count} steps"
        if not self.around.arrival.enters_pass(kind):
            if not self._begin_pass(kind, NO_DRAW):
                return
            self._kind = kind
            self._sampler.begin(self.passes + 1, count * self._sampler.turn_size(1), batch_size=1)
        self._takes_own_data = True
        try:
            yield from self._turns(lambda batch: batch.step - 1)
        finally:
            self._takes_own_data = False

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """Nothing is trained and logged yet in this epoch, from 1, of this number."""
        if self.around.arrival.under_way:
            self.around.epochs = epochs
            return
        self.seconds = 0.0
        self._turns_before = 0
        self._passes_before = self.passes
        self._counts = {}
        self.around.begin_epoch(epoch, epochs)

    def end_epoch(self) -> None:
        """The epoch is written down, or its loop was left."""
        if not self.around.arrival.under_way:
            self._passes_before = self.passes
            self.around.end_epoch()

    def all_came(self) -> bool:
        """Whether all ranks have come to the end of an epoch; if not, all that are left go through what is
        behind its passes again."""
        return self.around.all_came(lambda: self.history)

    def mean(self, action: Callable[[], float], *, otherwise: float) -> float:
        """A mean of the loop's own; all ranks together. Returns what the action does; or `otherwise` if a
        rank is lost, where what it is for is gone through again: the turn that is open, or what comes behind
        the passes of an epoch. Raises OutOfStepError if other ranks are elsewhere."""
        if not self._is_open:
            return self.around.mean(action, otherwise=otherwise)
        if self._lost is not None:
            return otherwise
        try:
            return action() if self.backward is None or self.backward.meet(MEANS) else otherwise
        except RankLost as error:
            self._lost = error
            if self.backward is not None:
                self.backward.lose(error)
            self.world.owed = raising(error)
            return otherwise

    def before_step(self) -> None:
        """An optimiser is about to make a step."""
        if self.backward is not None:
            self.backward.send_held()

    @property
    def history(self) -> Place:
        """Where the loop is, for a rank that comes in."""
        progress, around = self.synchroniser.progress, self.around
        is_open = not progress.closed
        return Place(
            epoch=around.epoch,
            stage=around.stage,
            passes_over=progress.epoch - is_open - self._passes_before,
            turns=around.turns_over,
            is_open=is_open,
            again=around.again,
            means=around.means,
            counts=self._counts,
            ended_early=self._ended_early,
            draws=self._draws if is_open else [its.draws_so_far for its in self.loaders],
            drawn=self._drawn if is_open else NO_DRAW,
            gradients=self._gradients(),
            kind=self._kind,
            sums=dict.fromkeys(self.metrics.sums(), NOTHING_LOGGED),
            history=self._observer.history,
        )

    @property
    def is_a_place(self) -> bool:
        """Whether a run could go on from here: not in a stream, which is not read on from its middle, behind
        a loop that was left, where ranks are rounds apart, and where what is trained of a round is undone."""
        work, recovery = self.synchroniser.inside.work, self._strategy.recovery
        is_whole = not work.under_way or recovery.keeps_local_work
        is_open = not (work.progress.closed or work.left_out)
        return bool(self._kind and not self._is_left and is_open and is_whole and recovery.synchronous)

    @property
    def place(self) -> Place:
        """Where the loop is, for a run that goes on there."""
        seconds = self.seconds + time.monotonic() - self._pass_began_s
        return replace(
            self.history,
            gradients=self.replica.gradients(),
            sums=self.metrics.sums(self.around.turns_over + self._turns_of_pass),
            seconds=seconds,
            history=None,
        )

    @property
    def _turns_of_pass(self) -> int:
        """That are over on this rank, of the pass under way."""
        work = self.synchroniser.inside.work
        rounds, over = self._sampler.rounds(work.progress.epoch), work.progress.rounds
        begun = rounds[over].over if over < len(rounds) else 0
        return sum(its.steps for its in rounds[:over]) + begun + work.made

    def _gradients(self) -> list[Tensor | None]:
        """What is in `.grad` where all go on."""
        progress, found = self.synchroniser.progress, None
        if self.around.again:
            found = self.around.gradients
        elif self.backward is not None:
            found = self.backward.gradients_before(progress.epoch, progress.rounds + 1)
        return self.replica.gradients() if found is None else found

    def recovered(self, event: Recovered) -> None:
        """Ranks were lost."""
        self._observer.recovered(event)

    def committed(self, seconds: float) -> None:
        """A round is committed again."""
        self._observer.committed(seconds)

    def come_in(self, place: Place, draw_on: Callable[[], None] = nothing_owed) -> None:
        """Be on the way to where the others are, or where the run was stopped, which the synchroniser has
        come to."""
        progress = self.synchroniser.progress
        self.passes = progress.epoch - place.is_open
        self._passes_before = self.passes - place.passes_over
        self._counts, self._drawn = dict(place.counts), place.drawn
        self._turns_before = place.turns + (self._turns_of_pass if place.is_open else 0)
        self._ended_early = place.ended_early
        self._kind, self.seconds = place.kind, place.seconds
        self.around.come_in(place, draw_on)

    def _require_no_open_turn(self) -> None:
        if self._is_open and self._takes_own_data:
            raise ConfigError(
                f"a loop over a loader begins at {here()}, in a turn of run.steps(n): loop over "
                "run.steps(n, loader), which gives the batches of a stream, or over the loader alone"
            )
        if self._is_open:
            raise ConfigError(
                f"a loop over a second loader begins at {here()}, in a turn of the first: make one loader of "
                "both (torch.utils.data.StackDataset), or take the second's batches from a plain DataLoader"
            )

    def _draw(self, draw: Callable[[], Draw]) -> Draw:
        """What this rank would have in a pass, on all ranks, as each may be rank 0 the next time; what it has
        drawn already for one that did not begin."""
        self._draws = [its.draws_so_far for its in self.loaders]
        kept, self._drawn_for_nothing = self._drawn_for_nothing, NO_DRAW
        return draw() if kept is NO_DRAW else kept

    def _begin_pass(self, doing: str, drawn: Draw) -> bool:
        """What all ranks do together before a pass. Returns whether it begins: if not, all is gone through
        again from behind the last one."""

        def meet() -> tuple[dict[int, SampleCounts], Draw]:
            require_same_place(self.world, doing)
            return self._counted(), self.world.broadcast_object(drawn)

        found = self.around.pass_begins(meet)
        if found is None:
            self._drawn_for_nothing = drawn
            return False
        self._counts, self._drawn = found
        return True

    def _turns_a_round(self, plan: RunPlan) -> int | None:
        """Turns between synchronisations, None for all of a pass."""
        if isinstance(self._strategy, SingleTurns):
            return 1
        if plan.local_after is not None:
            if not self.around.epochs:
                raise ConfigError(
                    f"--strategy {plan.strategy} was given, which goes by the part of the run that is over: "
                    "loop over run.epochs(n)"
                )
            if self.around.epoch <= plan.local_after * self.around.epochs:
                return 1
        return plan.sync_every if isinstance(plan.sync_every, int) else None

    def _ahead(self, order: Indices) -> Callable[[], list[Indices]]:
        """The samples of this rank's batches from the round under way on, as they are dealt now."""
        rounds = self.synchroniser.progress.rounds
        return lambda: [order[_samples(batch)] for batch in self._sampler.batches(self.passes, rounds)]

    def _turns(self, take: Callable[[Batch], T]) -> Iterator[T]:
        """The turns of a pass, of which the sampler knows."""
        self.passes += 1
        self._left_out = self.made = 0
        self._is_left = False
        self._pass_began_s = time.monotonic()
        ledger, before = self.world.ledger, self.around.turns_over
        for batch in self.synchroniser.batches(self.passes):
            self.turn = batch.step - 1
            self.made = batch.step
            self._turns_before = before + batch.step
            self.metrics.begin(self._turns_before)
            self.weight = float(len(batch))
            ledger.enter("data")
            data = take(batch)
            ledger.enter("other")
            self._is_open = True
            self._lent = None
            if self.backward is None and not len(batch):  # lent a sample, of which no step may stay
                self._lent = self.replica.snapshot()
            try:
                yield data
            except GeneratorExit:
                self._leave(batch)
                self._end_pass()
                raise
            self._end_turn(batch)
        self._end_pass()

    def _end_pass(self) -> None:
        """The pass is over."""
        self.weight = None
        self._ended_early = self.synchroniser.ended_early
        self.seconds += time.monotonic() - self._pass_began_s
        self.around.passes_end(self._turns_before)

    def _leave(self, batch: Batch) -> None:
        """The loop was left in a turn, which ends with it, unless an exception has left it."""
        frame, raises = left_by(sys._getframe(1).f_back)
        self._is_left = True
        if self._loader is not None:
            self._loader.leave()
        if not raises:
            try:
                self._end_turn(batch)
                if self.backward is not None and self.synchroniser.progress.rounds < batch.step:
                    self._left_out = round(len(batch) / batch.share)  # undone, and nobody makes it again
            except BaseException as error:  # nobody hears it here: it is raised in the next exchange
                self.world.owed = raising(error)
        self._is_open = False
        self.synchroniser.leave(place_of(frame), at_once=not raises)

    def _end_turn(self, batch: Batch) -> None:
        self._is_open, self._lost = False, None
        self.world.ledger.enter("other")
        if self._lent is not None:
            self._lent.restore_tensors()
        self.synchroniser.step()
        self._progress.add(len(batch), self.metrics.last("loss"))


def _samples(batch: Batch) -> Indices:
    return batch.indices if len(batch) else batch.lent
