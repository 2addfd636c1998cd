"""`Run`: a training loop of a user's own as one rank of a run."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from rankwise.comm import World
from rankwise.data.turns import count_turns
from rankwise.errors import ConfigError, Interrupted
from rankwise.models.loop_replica import HasState, LoopReplica
from rankwise.plan import RunPlan
from rankwise.program_plan import require_loop_can
from rankwise.training.agreement import require_same_place
from rankwise.training.alike import start_with_rank_0
from rankwise.training.book import Book
from rankwise.training.build import has_batch_norm
from rankwise.training.hooks import LoopHooks
from rankwise.training.loader import Loader, require_dealable
from rankwise.training.loop_job import LoopJob
from rankwise.training.metrics import Metrics, means, number_of, weight_of, weighted
from rankwise.training.sharing import share_of
from rankwise.training.stream import StreamLoader
from rankwise.training.turns import Turns

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


class Run:
    """A plain PyTorch loop as one rank of a run::

        run = rankwise.Run(strategy="allreduce")
        model, loader = run.model(model), run.loader(train_loader)
        run.keep(optimizer=optimizer, scheduler=scheduler)
        for epoch in run.epochs(10):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)

    A turn is one batch of each rank. It commits when the next one is asked for or the loop is left: if a
    rank is lost meanwhile, all of it is undone on the others, and made again. All settings are those of the
    first turn: what is trained and kept is told before.
    """

    def __init__(self, plan: RunPlan, world: World, book: Book | None = None) -> None:
        require_loop_can(plan)
        self.world = world
        self._plan = plan
        self._book = book or Book()
        self._models: dict[str, nn.Module] = {}
        self._compiled: list[nn.Module] = []
        self._kept: dict[str, Any] = {}
        self._loaders: list[Loader[Any]] = []
        self._metrics = Metrics()
        self._turns: Turns | None = None
        self._hooks: LoopHooks | None = None
        self._epoch = self._epochs = 0
        self._passes_made, self._passes_over = 0, self._book.passes_over
        self._turns_over = 0
        self._turns_made: dict[int, int] = {}
        self._rows = 1.0

    @property
    def rank(self) -> int:
        """This rank's number, from 0. It changes when ranks are lost."""
        return self.world.rank

    @property
    def size(self) -> int:
        """Ranks that train."""
        return self.world.size

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which prints and writes for all."""
        return self.world.rank == 0

    @property
    def turn(self) -> int:
        """The number of the turn under way in its pass over a loader, or in `steps`, from 0. A turn that is
        made again, as a rank was lost, has the number that it had; `enumerate` would count it twice."""
        return self._turns_over + self._turns.turn if self._turns else 0

    def print(self, *values: object, **options: Any) -> None:
        """`print` on rank 0 alone."""
        if self.first:
            print(*values, **{"flush": True, **options})

    def model(self, model: M) -> M:
        """Train a module in step with the other ranks, and give it the weights of rank 0's; all ranks
        together. Returns the module itself.

        Raises ConfigError if it was given before or training has begun, and ModelError if ranks hold
        different ones, or it cannot be kept in step.
        """
        if not isinstance(model, nn.Module):
            raise ConfigError(f"run.model got a {type(model).__name__}, expected a torch.nn.Module")
        self._require_not_begun("run.model")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ConfigError("run.model got a DistributedDataParallel: give the module inside it")
        inner = _unwrapped(model)
        devices = {its.device.type for its in (*inner.parameters(), *inner.buffers())} - {"cpu"}
        if devices:
            where = ", ".join(sorted(devices))
            raise ConfigError(
                f"run.model got a module on {where}, expected one on cpu: call model.cpu() before"
            )
        if any(its is inner for its in self._models.values()):
            raise ConfigError("run.model got the same module twice: give each module once")
        if self._book.join_state is None:
            start_with_rank_0(inner, self.world, "run.model")
        self._models[_free_name("model", self._models)] = inner
        if inner is not model:
            self._compiled.append(model)
        return model

    def loader(self, loader: DataLoader[T]) -> Loader[T]:
        """Deal the samples of a DataLoader to the ranks, whose batch is its `batch_size`.

        N ranks train in a turn what one process trains in a batch of N times as many, in the order of the
        loader's sampler. A last turn that would leave a rank without a sample joins the one before it. Of a
        `batch_sampler` of its own N batches make a turn, and none is split. A stream (IterableDataset) is
        read by each rank, which keeps its part. Raises ConfigError, one line, for what cannot be dealt.
        """
        require_dealable(loader)
        is_stream = isinstance(loader.dataset, IterableDataset)
        self._loaders.append(dealt := (StreamLoader if is_stream else Loader)(self, loader))
        return dealt

    def keep(self, **things: HasState) -> None:
        """Keep things that have a `state_dict`, by name: optimisers, schedulers, scalers, averages of
        weights. They lie in checkpoints, go on when the run is resumed, and are undone with a turn."""
        self._require_not_begun("run.keep")
        for name, its in things.items():
            if not (hasattr(its, "state_dict") and hasattr(its, "load_state_dict")):
                raise ConfigError(
                    f"run.keep got {name}, which is of type {type(its).__name__}, expected something with "
                    "state_dict() and load_state_dict()"
                )
            named = next((key for key, model in self._models.items() if model is _unwrapped(its)), None)
            if named is not None:
                self._models = {name if key == named else key: model for key, model in self._models.items()}
            elif name in self._kept and self._kept[name] is not its:
                raise ConfigError(f"run.keep got {name} twice: give each thing a name of its own")
            else:
                self._kept[name] = its

    def epochs(self, count: int | range) -> Iterator[int]:
        """The epochs from 0, as `range(count)` has them; or those of a range, which `rankwise run --epochs`
        makes longer or shorter. Goes on where a resumed run stopped. All ranks together; raises what a turn
        does."""
        if not isinstance(count, int | range) or (isinstance(count, int) and count < 0):
            raise ConfigError(f"run.epochs({count!r}) was called, expected a number of epochs, or a range")
        numbers = range(count) if isinstance(count, int) else count
        if self._book.epochs_asked is not None:
            numbers = range(numbers.start, numbers.start + self._book.epochs_asked)
        self._epochs = self._epoch + len(numbers)
        self._book.settle(epochs=self._epochs)
        turns = self._begin()
        for place, number in enumerate(numbers, start=self._epoch + 1):
            self._epoch = place
            if place <= self._book.epochs_over or self._book.is_at_target:
                continue
            if not turns.around.arrival.under_way:
                self._passes_over = 0
            try:
                self._begin_epoch(turns, place)
                while True:
                    self._passes_made = 0
                    turns.around.arrival.comes_behind(place, 0)
                    yield number
                    if turns.all_came():
                        break
                is_last = self._close_epoch(turns, last=number == numbers[-1])
            except Interrupted:  # which a loop that was left has heard of
                raise self._book.interrupted() from None
            finally:
                self._passes_made = self._passes_over = 0
                turns.end_epoch()
            if is_last:
                return

    @overload
    def steps(self, count: int) -> Iterator[int]: ...

    @overload
    def steps(self, count: int, loader: Loader[T]) -> Iterator[T]: ...

    def steps(self, count: int, loader: Loader[T] | None = None) -> Iterator[int] | Iterator[T]:
        """`count` turns from 0, for loops that take data of their own: of the same number of samples on all
        ranks, or passes are weighted by `backward`. Raises what a turn does.

        With a loader over a stream these are its batches, from where the last `steps` has stopped, also in a
        run that goes on; where the stream is over it begins anew.
        """
        if not isinstance(count, int) or count < 0:
            raise ConfigError(f"run.steps({count!r}) was called, expected a number of steps")
        if loader is None:
            return self._pass(lambda turns: turns.steps(count))
        if not isinstance(loader, StreamLoader):
            raise ConfigError(
                f"run.steps({count}, loader) got a {type(loader).__name__}, expected what run.loader returns "
                "for a stream: loop over other loaders themselves, and leave them by break"
            )
        return self._steps_of(count, loader)

    def _steps_of(self, count: int, loader: StreamLoader[T]) -> Iterator[T]:
        self._turns_over = 0
        try:
            while (left := count - self._turns_over) > 0:
                yield from self._pass(partial(Turns.over_stream, loader=loader, most=left))
                self._turns_over += self._turns_made.get(self._passes_made, sys.maxsize)
        finally:
            self._turns_over = 0

    def backward(self, loss: Tensor, *, weight: float | None = None, reduction: str = "mean") -> None:
        """`loss.backward()`, for a loss that is a mean over `weight` things, such as tokens that are not
        ignored, or with `reduction="sum"` a sum: all ranks' gradients are then those of one process that has
        the things of all."""
        passes = self._turns.backward if self._turns else None
        if reduction not in ("mean", "sum"):
            raise ConfigError(f'run.backward: reduction={reduction!r} was given, expected "mean" or "sum"')
        if passes is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        weight = None if weight is None else weight_of(weight)
        with passes.summed() if reduction == "sum" else passes.weighted(weight):
            loss.backward()  # type: ignore[no-untyped-call]

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward passes wait for the next one outside, to leave with it; at the latest they leave
        in front of an optimiser's step, or when the turn ends. Until then their gradients are not in `.grad`:
        clip behind a pass outside."""
        passes = self._turns.backward if self._turns else None
        return passes.held() if passes else nullcontext()

    def log(self, weight: float | None = None, **values: float | Tensor) -> None:
        """Log numbers by name: the mean over the epoch and all ranks stands in the metrics. Each counts by
        the samples of the turn, or by the rows that `shard` gave last, unless a `weight` is given."""
        if not (self._turns and self._turns.around.arrival.under_way):
            self._metrics.add(self._weight(weight), values)

    def mean(self, value: float | Tensor, weight: float | None = None) -> float:
        """The mean of a number over all ranks, weighted as in `log`; all ranks together."""
        weight = self._weight(weight)
        number = number_of(value, "value")
        turns = self._turns
        if turns is not None and not turns.around.arrival.skips_mean(self._epoch, self._passes_made):
            try:
                return turns.mean(lambda: self._mean(number, weight), otherwise=number)
            except Interrupted:
                raise self._book.interrupted() from None
        if turns is not None or self._book.join_state is not None:
            return number  # the others have taken it
        return self._mean(number, weight)

    def _mean(self, number: float, weight: float) -> float:
        sums = np.array([weighted(number, weight), weight])
        self.world.allreduce(sums)
        return float(sums[0] / sums[1]) if sums[1] else float("nan")

    def shard(self, data: Any) -> Any:
        """This rank's part of data to be evaluated: of a tensor, an array, a list, a Dataset, or a
        DataLoader, whose order is then that of its dataset. What is logged or meant after it counts by its
        rows."""
        part, rows = share_of(data, self.rank, self.size)
        self._rows = float(rows)
        if self._turns:
            self._turns.weight = None
        return part

    def turns(self, loader: Loader[T]) -> Iterator[T]:
        """One pass over a loader."""
        return self._pass(lambda turns: turns.over(loader))

    def worker_seed(self) -> int:
        """By which the workers of a loader begin: of this rank, and this part of a pass."""
        turns = self._turns.steps_made if self._turns else 0
        words = [self._plan.seed, self._epoch, self._passes_made, turns, self.world.number]
        return int(np.random.SeedSequence(words).generate_state(1, np.uint32)[0])

    def turns_of(self, loader: Loader[Any]) -> int:
        """How many turns a pass over a loader has."""
        if self._turns:
            return self._turns.turns_of(loader)
        cut = loader.cut(1 + any(map(has_batch_norm, self._models.values())))
        return count_turns(
            loader.drawn(),
            cut["batch_size"] * self.size,
            fewest=cut["least"] * self.size,
            drops_last=loader.drop_last,
        )

    def drawn_before(self, loader: Loader[Any]) -> int:
        """How many epochs a loader, known by its place among the run's, had drawn before this sitting."""
        place = self._loaders.index(loader)
        return self._book.draws[place] if place < len(self._book.draws) else 0

    def place_before(self, loader: Loader[Any]) -> Sequence[int] | None:
        """Where `steps` had come to in a loader's stream before this sitting."""
        place = self._loaders.index(loader)
        return self._book.places[place] if place < len(self._book.places) else None

    def _weight(self, given: float | None) -> float:
        """By how much numbers count that are logged here."""
        if given is not None:
            return weight_of(given)
        of_turn = self._turns.weight if self._turns else None
        return self._rows if of_turn is None else of_turn

    def _pass(self, iterate: Callable[[Turns], Iterator[T]]) -> Iterator[T]:
        turns = self._begin()
        self._passes_made += 1
        if self._passes_made <= self._passes_over or turns.around.is_lost:
            turns.around.arrival.comes_behind(self._epoch, self._passes_made)
            return  # the epoch is gone through again, for what comes behind its passes
        try:
            yield from iterate(turns)
        except Interrupted:
            raise self._book.interrupted() from None
        except GeneratorExit:  # left by a break
            self._passes_over = self._passes_made
            self._turns_made[self._passes_made] = sys.maxsize  # nothing of it is left
            raise
        if not turns.around.is_lost:
            self._turns_made[self._passes_made] = turns.made
            self._passes_over = self._passes_made

    def _begin(self) -> Turns:
        """All is told: what is trained and kept is settled."""
        if self._turns is not None:
            return self._turns
        optimizers = {k: its for k, its in self._kept.items() if isinstance(its, torch.optim.Optimizer)}
        rest = {name: its for name, its in self._kept.items() if name not in optimizers}
        if not self._models:
            raise ConfigError("the loop trains no model: call run.model(model) before it")
        if not optimizers:
            raise ConfigError("the loop has no optimiser: call run.keep(optimizer=optimizer) before it")
        names = ", ".join([*self._models, *sorted(self._kept)])
        if self._book.join_state is None:
            require_same_place(self.world, f"train and keep {names}", ConfigError)
        replica = LoopReplica(
            self._models,
            optimizers,
            rest,
            share_optimizer_state=self._plan.optimizer_state == "average",
            needs_pairs=any(map(has_batch_norm, self._models.values())),
        )
        self._turns = turns = Turns(
            self._plan,
            self.world,
            replica,
            self._metrics,
            least=1 + replica.needs_pairs,
            faults=self._book.faults(replica),
            observer=self._book.observer,
            progress=self._book.progress,
            join_state=self._book.join_state,
            loaders=self._loaders,
        )
        self._hooks = LoopHooks(
            [*self._models.values(), *self._compiled],
            optimizers,
            replica.closed,
            self.world.ledger,
            before_step=turns.before_step,
            mean=self.mean,
        )
        self._book.begin(LoopJob(self._plan, turns.synchroniser, turns))
        return turns

    def _begin_epoch(self, turns: Turns, place: int) -> None:
        self._book.begin_epoch(place)
        seed = np.random.SeedSequence([self._plan.seed, place, self.rank]).generate_state(3, np.uint32)
        torch.manual_seed(int(seed[0]))
        if not self.world.in_threads:
            np.random.seed(seed[1])  # noqa: NPY002  # which a user's transforms draw from
            random.seed(int(seed[2]))
        turns.begin_epoch(place, self._epochs)

    def _close_epoch(self, turns: Turns, *, last: bool) -> bool:
        """Write an epoch down; returns whether it is the last."""
        if turns.batch_size is not None:
            self._book.settle(batch_size=turns.batch_size, said=("batch_size",))

        def write() -> bool:
            logged = means(self._metrics.sums(), self.world)
            found = {
                "train_loss": logged.get("loss"),
                "val_loss": logged.get("val_loss"),
                "val_accuracy": logged.get("val_accuracy"),
                "metrics": logged,
                "steps": turns.steps_made,
                "learning_rate": turns.learning_rate,
            }
            return self._book.epoch_over(self._epoch, found, turns.count(), turns.seconds, last=last)

        return turns.synchroniser.retry_until_all(write)

    def _require_not_begun(self, what: str) -> None:
        if self._turns is not None:
            raise ConfigError(f"{what} was called after the first turn: tell all that is trained before it")


def _unwrapped(model: Any) -> Any:
    """The module that a compiled one calls."""
    return getattr(model, "_orig_mod", model)


def _free_name(name: str, taken: dict[str, Any]) -> str:
    return name if name not in taken else f"{name}_{len(taken) + 1}"
