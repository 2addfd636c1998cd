"""A user's own loop in a `Run` against one process, in plain torch, that has the batches of all ranks."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    TensorDataset,
    WeightedRandomSampler,
)

from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.config import TrainConfig
from rankwise.data.partition import NOTHING
from rankwise.data.turns import TurnSampler
from rankwise.errors import ConfigError, OutOfStepError, RankwiseError
from rankwise.plan import resolve
from rankwise.training.admission import JoinState
from rankwise.training.history import SampleCounts
from rankwise.training.run import Book, Run

from . import effort
from .conftest import Command
from .user_loops import Alone, assert_one_process, dataset, fixed, flat, network, numbers, on_ranks

SAMPLES = (1, 2, 3, 4, 5, 6, 7, 9, 23)
"""With batches of two: fewer than ranks, ragged turns, a last turn that joins, and one that does not."""


def sgd(model: nn.Module, rate: float = 0.05) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


def loop_over(samples: int, epochs: int = 2, **loading: Any) -> Callable[[Any], np.ndarray]:
    """The loop of the README."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(model=model, optimizer=optimizer)
        options = {key: make() if callable(make) else make for key, make in loading.items()}
        loader = run.loader(DataLoader(dataset(samples), batch_size=2, **options))
        for _ in run.epochs(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        return flat(model)

    return loop


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_samples_on_any_number_of_ranks(ranks: int, samples: int) -> None:
    """N ranks hold the weights of one process with the batches of all, however ragged these are."""
    assert_one_process(ranks, loop_over(samples))


@pytest.mark.parametrize("samples", [6, 7, 11, 12])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_drop_last(ranks: int, samples: int) -> None:
    """`drop_last=True` drops the last turn if it is shorter, and nothing else."""
    assert_one_process(ranks, loop_over(samples, drop_last=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_order_of_a_generator(ranks: int) -> None:
    """With a generator of the user's the samples come in the order in which torch draws them, epoch by
    epoch."""
    assert_one_process(
        ranks, loop_over(11, 3, shuffle=True, generator=lambda: torch.Generator().manual_seed(4))
    )


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_sampler_with_repeats(ranks: int) -> None:
    """A sampler that draws some samples several times is dealt as it draws."""

    def sampler() -> WeightedRandomSampler:
        weights = [float(number % 3 == 0) + 0.1 for number in range(9)]
        return WeightedRandomSampler(weights, 25, generator=torch.Generator().manual_seed(2))

    assert_one_process(ranks, loop_over(9, sampler=sampler))


def clipped(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    optimizer.step()


def scaled(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    scaler = optimizer.scaler
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 0.3)
    scaler.step(optimizer)
    scaler.update()


def in_two_passes(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    optimizer.step()


def without_sync(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    with run.no_sync():
        (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    optimizer.step()


def only_without_sync(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    with run.no_sync():
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()
    optimizer.step()


def with_the_last_not_synced(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    (0.25 * loss).backward(retain_graph=True)
    with run.no_sync():
        (0.75 * loss).backward()
    optimizer.step()


def with_other_gradients(run: Any, loss: Any, model: nn.Module, optimizer: Any) -> None:
    (penalty,) = torch.autograd.grad(loss, model[0].weight, create_graph=True)
    (loss + penalty.square().sum() * 0).backward()
    optimizer.step()


STEPS = [
    clipped,
    scaled,
    in_two_passes,
    without_sync,
    only_without_sync,
    with_the_last_not_synced,
    with_other_gradients,
]


def loop_with(
    step: Callable[..., None], samples: int = 13, set_to_none: bool = True, make: Any = sgd
) -> Callable[[Any], np.ndarray]:
    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = make(model)
        optimizer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=3)
        run.keep(optimizer=optimizer, scaler=optimizer.scaler)
        loader = run.loader(DataLoader(dataset(samples), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad(set_to_none=set_to_none)
                step(run, F.mse_loss(model(x), y), model, optimizer)
        return np.append(flat(model), optimizer.scaler.get_scale())

    return loop


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("ranks", [1, 3])
def test_ways_to_make_a_step(step: Callable[..., None], ranks: int) -> None:
    """Clipping, scaling and several backward passes see the gradients that one process has."""
    assert_one_process(ranks, loop_with(step))


@pytest.mark.parametrize("ranks", [1, 3])
def test_gradients_that_are_zeroed(ranks: int) -> None:
    """`zero_grad(set_to_none=False)` leaves gradients to which passes add."""
    assert_one_process(ranks, loop_with(in_two_passes, set_to_none=False))


def accumulating(waits: bool) -> Callable[[Any], np.ndarray]:
    """A step in each second turn."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(24), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                last = run.turn % 2 == 1
                loss = F.mse_loss(model(x), y) / 2
                if waits and not last:
                    with run.no_sync():
                        loss.backward()
                else:
                    loss.backward()
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
        return flat(model)

    return loop


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_accumulation_over_turns(ranks: int, waits: bool) -> None:
    """Gradients that are added up over turns, with and without `no_sync`, are those of one process."""

    assert_one_process(ranks, accumulating(waits))


def gan(samples: int, epochs: int = 2) -> Callable[[Any], np.ndarray]:
    """Two models and optimisers, and a pass each in a turn."""

    def loop(run: Any) -> np.ndarray:
        maker, judge = run.model(network(1, 2, 3)), run.model(network(2, 3, 1))
        makes, judges = (torch.optim.Adam(its.parameters(), lr=0.01) for its in (maker, judge))
        run.keep(maker=maker, judge=judge, makes=makes, judges=judges)
        loader = run.loader(DataLoader(dataset(samples), batch_size=2))
        for _ in run.epochs(epochs):
            for x, noise in loader:
                judges.zero_grad()
                fakes = maker(noise)
                seen, made = judge(x), judge(fakes.detach())
                loss = F.softplus(-seen).mean() + F.softplus(made).mean()
                loss.backward()
                judges.step()
                makes.zero_grad()
                F.softplus(-judge(fakes)).mean().backward()
                makes.step()
        return flat(maker, judge)

    return loop


@pytest.mark.parametrize("samples", [2, 13])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_gan(ranks: int, samples: int) -> None:
    """Two models with an optimiser each are those of one process."""
    assert_one_process(ranks, gan(samples))


def lbfgs_loop(search: str | None) -> Callable[[Any], np.ndarray]:
    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.2, max_iter=4, line_search_fn=search)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(13), batch_size=4))
        for _ in run.epochs(2):
            for x, y in loader:

                def closure(x: Any = x, y: Any = y) -> Any:
                    optimizer.zero_grad()
                    loss = F.mse_loss(model(x), y)  # called in this turn alone
                    loss.backward()
                    return loss

                optimizer.step(closure)
        return flat(model)

    return loop


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_lbfgs(ranks: int, search: str | None) -> None:
    """An optimiser that asks for the loss several times in a step gets that of all ranks."""
    assert_one_process(ranks, lbfgs_loop(search))


@pytest.mark.parametrize("ranks", [1, 3])
def test_schedulers_and_averages_of_weights(ranks: int) -> None:
    """Schedulers by steps and by epochs and an average of the weights are those of one process."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
        )
        optimizer = sgd(model)
        per_step = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20)
        other = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        run.keep(optimizer=optimizer, per_step=per_step, other=other, average=average)
        loader = run.loader(DataLoader(dataset(13), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                per_step.step()
                average.update_parameters(model)
            other.step()
        rate = optimizer.param_groups[0]["lr"]
        return np.concatenate([flat(model, average), [rate, per_step.last_epoch, other.last_epoch]])

    assert_one_process(ranks, loop)


def words(samples: int = 9) -> TensorDataset:
    """Sentences of five words, of which some are to be left out of the loss, very unevenly."""
    random = np.random.default_rng(3)
    labels = random.integers(0, 4, (samples, 5))
    for number, row in enumerate(labels):
        row[: number % 5] = -100
    return TensorDataset(torch.from_numpy(random.integers(0, 6, (samples, 5))), torch.from_numpy(labels))


class Reader(nn.Module):
    """A recurrent network that takes up the state that it left."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, sparse=sparse)
        self.cell = nn.LSTM(3, 4, batch_first=True)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Any, state: Any = None) -> Any:
        hidden, state = self.cell(self.embedding(x), state)
        return self.out(hidden), state


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_means_over_words(ranks: int, sparse: bool, reduction: str) -> None:
    """A mean over words that are not ignored, or their sum, is that of one process; a network's state goes
    on, and a sparse embedding is trained."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(fixed(Reader(sparse)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(words(), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                _, state = model(x[:, :2])
                out, _ = model(x[:, 2:], tuple(its.detach() for its in state))
                y = y[:, 2:]
                loss = F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction=reduction)
                if reduction == "sum":
                    run.backward(loss, reduction="sum")
                else:
                    run.backward(loss, weight=int((y != -100).sum()))
                optimizer.step()
        return flat(model)

    assert_one_process(ranks, loop)


def test_words_of_which_a_rank_has_none() -> None:
    """A rank whose words are all ignored, whose mean is no number, counts for nothing."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network(outputs=4))
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        labels = torch.tensor([0, 1, -100, -100, 2, 3, 1, 1])
        loader = run.loader(DataLoader(TensorDataset(numbers(8, 3), labels), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                known = y != -100
                losses = F.cross_entropy(model(x), y, reduction="none")
                run.backward(losses.sum() / known.sum(), weight=int(known.sum()))
                optimizer.step()
        return flat(model)

    assert_one_process(2, loop)


class Branches(nn.Module):
    """Parts that are frozen, that nobody uses, and that only some samples use."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)
        self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x: Any) -> Any:
        out = self.frozen(x)
        for its, which in ((self.one, x[:, 0] > 0), (self.other, x[:, 0] <= 0)):
            if which.any():
                out = out.index_add(0, which.nonzero()[:, 0], its(x[which]))
        return out


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_parameters_without_a_gradient(ranks: int, make: Any) -> None:
    """Frozen parameters, and those without a gradient on some ranks or on all, move as in one process: those
    that nobody uses not even by weight decay."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(fixed(Branches()))
        optimizer = make(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(13), batch_size=2))
        for _ in run.epochs(2):
            for x, _ in loader:
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()
        return flat(model)

    assert_one_process(ranks, loop)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_several_passes_over_loaders(ranks: int) -> None:
    """Two loaders one after the other, and one that is gone through twice in an epoch, and left by all ranks
    at the same turn, are what they are in one process."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        generator = torch.Generator().manual_seed(5)
        one = run.loader(DataLoader(dataset(13), batch_size=2, shuffle=True, generator=generator))
        other = run.loader(DataLoader(dataset(5), batch_size=1))

        def train(x: Any, y: Any) -> None:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()

        for epoch in run.epochs(3):
            for number, batch in enumerate(one):
                if number == 1 and epoch == 1:
                    continue
                train(*batch)
            for number, batch in enumerate(other):
                train(*batch)
                if number == 1:
                    break
            for batch in one:
                train(*batch)
        return flat(model)

    assert_one_process(ranks, loop)


def simple(run: Any, body: Callable[[Any, int, Callable[[], None]], Any], samples: int = 17) -> np.ndarray:
    """A loop whose body decides what it does with a turn: `body(run, turn, step)`."""
    model = run.model(network())
    optimizer = sgd(model)
    run.keep(optimizer=optimizer)
    loader = run.loader(DataLoader(dataset(samples), batch_size=2))
    for _ in run.epochs(2):
        for turn, (x, y) in enumerate(loader):

            def step(x: Any = x, y: Any = y) -> None:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()

            if body(run, turn, step) == "break":
                break
    return flat(model)


def returns_early(run: Any) -> np.ndarray:
    model = run.model(network())
    optimizer = sgd(model)
    run.keep(optimizer=optimizer)
    loader = run.loader(DataLoader(dataset(17), batch_size=2))
    for _ in run.epochs(2):
        for turn, (x, y) in enumerate(loader):
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            optimizer.step()
            if turn == 1:
                return flat(model)
    raise AssertionError


def breaks(run: Any, turn: int, step: Callable[[], None]) -> Any:
    step()
    return "break" if turn == 1 else None


def breaks_before(run: Any, turn: int, step: Callable[[], None]) -> Any:
    if turn == 1:
        return "break"
    return step()


def continues(run: Any, turn: int, step: Callable[[], None]) -> Any:
    return None if turn == 1 else step()


@pytest.mark.parametrize("body", [breaks, breaks_before, continues])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_loops_that_all_ranks_leave(ranks: int, body: Any) -> None:
    """A loop that all ranks leave at a turn, or a turn without a step, is what it is in one process."""
    assert_one_process(ranks, lambda run: simple(run, body))


@pytest.mark.parametrize("ranks", [1, 3])
def test_return_out_of_a_loop(ranks: int) -> None:
    """A function that is left in the middle of an epoch by all ranks leaves the weights of one process."""
    assert_one_process(ranks, returns_early)


def one_breaks(run: Any, turn: int, step: Callable[[], None]) -> Any:
    step()
    return "break" if (turn, run.rank) == (1, 1) else None


def one_breaks_before(run: Any, turn: int, step: Callable[[], None]) -> Any:
    if (turn, run.rank) == (1, 1):
        return "break"
    return step()


def one_makes_another_step(run: Any, turn: int, step: Callable[[], None]) -> Any:
    step()
    if (turn, run.rank) == (1, 1):
        step()


def one_makes_no_step(run: Any, turn: int, step: Callable[[], None]) -> Any:
    if (turn, run.rank) != (1, 1):
        step()


def one_makes_another_step_at_the_end(run: Any, turn: int, step: Callable[[], None]) -> Any:
    step()
    if (turn, run.rank) == (2, 1):
        step()


@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd"])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("body", [one_breaks, one_breaks_before])
def test_one_rank_leaves_a_loop(ranks: int, strategy: str, body: Any) -> None:
    """If one rank leaves a loop that others go on with, all end with one line that names it and its line."""
    with pytest.raises(OutOfStepError, match=r"rank 1 .*tests/test_run.py:\d+") as caught:
        on_ranks(ranks, lambda run: simple(run, body), strategy=strategy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "body", [one_makes_another_step, one_makes_no_step, one_makes_another_step_at_the_end]
)
def test_one_rank_makes_other_passes(ranks: int, body: Any) -> None:
    """If one rank makes more backward passes than others, or fewer, all end with one line that says where,
    on any rank."""
    errors: list[OutOfStepError] = []

    def loop(run: Any) -> None:
        try:
            simple(run, body)
        except OutOfStepError as error:
            errors.append(error)
            raise

    with pytest.raises(OutOfStepError, match="backward pass"):
        on_ranks(ranks, loop)
    assert len(errors) == ranks
    assert all("\n" not in str(error) for error in errors)


@pytest.mark.parametrize("ranks", [2, 3])
def test_one_rank_raises(ranks: int) -> None:
    """An exception on one rank ends all, and is the one that is told."""

    def body(run: Any, turn: int, step: Callable[[], None]) -> Any:
        step()
        if (turn, run.rank) == (1, 1):
            raise ZeroDivisionError("a mistake of the user's")

    with pytest.raises(ZeroDivisionError, match="a mistake of the user's"):
        on_ranks(ranks, lambda run: simple(run, body))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_exceptions_that_all_ranks_catch(ranks: int) -> None:
    """A loop that an exception leaves on all ranks, and is caught, goes on with the next epoch as in one
    process."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(17), batch_size=2))
        for _ in run.epochs(3):
            try:
                for turn, (x, y) in enumerate(loader):
                    optimizer.zero_grad()
                    F.mse_loss(model(x), y).backward()
                    optimizer.step()
                    if turn == 1:
                        raise StopAsyncIteration
            except StopAsyncIteration:
                pass
        return flat(model)

    assert_one_process(ranks, loop)


class Noted(Book):
    """Keeps what is to be written down."""

    def __init__(self, join_state: JoinState | None = None) -> None:
        super().__init__(join_state)
        self.metrics: list[dict[str, float]] = []

    def epoch_over(
        self, epoch: int, found: Mapping[str, Any], counts: SampleCounts, seconds: float, *, last: bool
    ) -> bool:
        self.metrics.append(found["metrics"])
        return last


def noted(world: World, book: Book, **options: Any) -> Run:
    """A run that is written down in a book."""
    many = {"strategy": "allreduce", "topology": "allreduce"} if world.size > 1 else {}
    return Run(resolve(TrainConfig(**{"ranks": world.size, **many, **options})), world, book)


def test_a_run_goes_on_in_its_second_loop() -> None:
    """A run that stopped in the second of two loops over epochs goes on there: the epochs of the first are
    over, and those that are left of the second are made."""

    class Over(Book):
        epochs_over = 4

    def loop(world: World) -> list[tuple[int, int]]:
        run = noted(world, Over())
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        loader = run.loader(DataLoader(dataset(4), batch_size=2))
        made = []
        for part, epochs in enumerate((3, 2)):
            for epoch in run.epochs(epochs):
                for x, y in loader:
                    F.mse_loss(model(x), y).backward()
                made.append((part, epoch))
        return made

    assert run_in_threads(2, loop) == [[(1, 1)]] * 2


@pytest.mark.parametrize(("samples", "rows"), [(3, 2), (11, 7)])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_means_over_ragged_shares(ranks: int, samples: int, rows: int) -> None:
    """What is logged and meant over ragged turns and shards is the mean over all samples; also with a weight
    of the user's, and of data of any kind."""
    data, held_out = dataset(samples), dataset(rows)
    (x_all, y_all), (x_out, y_out) = data.tensors, held_out.tensors

    def loop(world: World) -> Any:
        book = Noted()
        run = noted(world, book)
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(data, batch_size=2))
        meant = []
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                run.log(loss=loss, rows=len(x))
                run.log(weight=1, turns=1.0)
                meant.append((run.mean(loss), run.mean(x.sum(), weight=x.sum().abs())))
            with torch.no_grad():
                x, y = run.shard(x_out), run.shard(y_out)
                run.log(val_loss=F.mse_loss(model(x), y))  # no number where there are no rows
                values = [F.mse_loss(model(x), y) for x, y in run.shard(DataLoader(held_out, batch_size=1))]
                meant.append((run.mean(sum(values) / len(values) if values else float("nan")), 0.0))
                shares = [run.shard(its) for its in (list(range(rows)), np.arange(rows), held_out)]
                assert len({len(its) for its in shares}) == 1
                run.log(weight=len(shares[0]), sevens=7.0)
        return book.metrics, meant

    results = run_in_threads(ranks, loop)
    model = network()
    expected = F.mse_loss(model(x_all), y_all).item()
    val = F.mse_loss(model(x_out), y_out).item()
    for metrics, meant in results:
        assert meant == results[0][1]
        assert meant[-1][0] == pytest.approx(val, abs=1e-12)
        for its in metrics:
            assert its["loss"] == pytest.approx(expected, abs=1e-12)
            assert its["val_loss"] == pytest.approx(val, abs=1e-12)
            assert (its["turns"], its["sevens"]) == (1.0, 7.0)
        assert metrics == results[0][0]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_means_over_a_shard_that_was_made_before_the_loop(ranks: int) -> None:
    """A mean after a pass, also after one that was left, counts by the rows of the shard that was made before
    the first turn."""
    held_out = dataset(7)

    def loop(world: World) -> Any:
        run = noted(world, Noted())
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(11), batch_size=2))
        part = run.shard(held_out)
        meant = []
        for epoch in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                if epoch == 1:
                    break
            with torch.no_grad():
                meant.append(run.mean(F.mse_loss(model(part[:][0]), part[:][1])))
        return meant

    expected = F.mse_loss(network()(held_out.tensors[0]), held_out.tensors[1]).item()
    for meant in run_in_threads(ranks, loop):
        assert meant == pytest.approx([expected] * 2, abs=1e-12)


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_model_stays_one_graph(compiled_first: bool) -> None:
    """No clock of a Run stands in a compiled model, whether it was compiled before `run.model` or after it;
    and in the first case its forward passes are in the ledger."""

    torch._dynamo.reset()  # it counts what other tests have compiled

    def compiled(model: nn.Module) -> Any:
        return torch.compile(model, backend="eager", fullgraph=True, dynamic=True)

    def loop(world: World) -> int:
        run = noted(world, Noted())
        model = run.model(compiled(network())) if compiled_first else compiled(run.model(network()))
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(8), batch_size=2))
        for _ in run.epochs(1):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        return run.world.ledger.close().phases_ns["forward"]

    (spent_ns,) = run_in_threads(1, loop)  # torch.compile is not made for several threads
    assert (spent_ns > 0) == compiled_first


@pytest.mark.parametrize("kill_at", [None, *({1: calls} for calls in (28, 32, 36))])
@pytest.mark.parametrize("samples", [24, 25, 26, 27])
def test_length_of_a_loader(samples: int, kill_at: Any) -> None:
    """`len(loader)` is the number of turns: of the pass under way also after a rank is lost, and before the
    first one also where a turn needs two samples of each rank."""

    def loop(run: Any) -> Any:
        model = run.model(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(samples), batch_size=3))
        expected, lengths = len(loader), []
        for _ in run.epochs(3):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                turn, length, size = run.turn, len(loader), run.size
            lengths.append((turn + 1, length))
        return expected, lengths, size

    for expected, lengths, size in on_ranks(2, loop, kill_at=kill_at):
        assert size == (1 if kill_at else 2)
        assert lengths[0][0] == expected or kill_at
        assert all(turns == length for turns, length in lengths)


@pytest.mark.parametrize("calls", [30, 32, 54, 57])
def test_a_rank_is_lost_behind_a_pass_that_was_left(calls: int) -> None:
    """If all ranks leave a pass by `break`, and one is lost in what comes behind it, the others neither undo
    the pass nor train it again."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(12), batch_size=2))
        for _ in run.epochs(3):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                if run.turn == 1:
                    break
            run.mean(1.0)
            run.mean(2.0)
        return flat(model)

    assert_one_process(2, loop, kill_at={1: calls}, on_shrink="keep-global-batch")


@pytest.mark.parametrize("ranks", [2, 3])
def test_other_names_on_one_rank(ranks: int) -> None:
    """If one rank logs other names than the others, all end with one line that has both."""

    def body(run: Any, turn: int, step: Callable[[], None]) -> Any:
        step()
        run.log(**{"loss" if run.rank else "lost": 1.0})

    with pytest.raises(
        OutOfStepError, match=r"rank \d has logged (loss|lost) .* rank \d (loss|lost)"
    ) as caught:
        on_ranks(ranks, lambda run: simple(run, body))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd", "gossip"])
def test_evaluation_in_the_middle(strategy: str) -> None:
    """A model that is evaluated between turns, its mean over all ranks included, is trained as if not."""

    def loop(run: Any, evaluates: bool) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(17), batch_size=2))
        for _ in run.epochs(2):
            for turn, (x, y) in enumerate(loader):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                if evaluates and turn % 2:
                    model.eval()
                    with torch.no_grad():
                        features, labels = (run.shard(its) for its in dataset(5).tensors)
                        run.mean(F.mse_loss(model(features), labels))
                    model.train()
        return flat(model)

    plain, evaluated = (on_ranks(3, lambda run, e=e: loop(run, e), strategy=strategy) for e in (False, True))
    np.testing.assert_array_equal(plain, evaluated)


def plain(run: Any, **given: Any) -> np.ndarray:
    """A loop that is right but for what is given in place of a part of it."""
    model = given.get("model", network)(run) if "model" in given else run.model(network())
    optimizer = given["optimizer"](run, model) if "optimizer" in given else sgd(model)
    run.keep(**(given["keep"](run, optimizer) if "keep" in given else {"optimizer": optimizer}))
    make = given.get("loader", lambda _: DataLoader(dataset(12), batch_size=2))
    loader = run.loader(make(run))
    for _ in run.epochs(given.get("epochs", 2)):
        for x, y in loader:
            optimizer.zero_grad()
            F.mse_loss(model(x), y).backward()
            given.get("step", lambda run, model, optimizer: optimizer.step())(run, model, optimizer)
            given.get("after", lambda run, model, optimizer: None)(run, model, optimizer)
    return flat(model)


def twice(run: Any) -> Any:
    return run.model(run.model(network()))


def passes_in_turns(run: Any, model: Any, optimizer: Any) -> None:
    for _ in run.loader(DataLoader(dataset(12), batch_size=2)):
        pass


def replaces_a_layer(run: Any, model: Any, optimizer: Any) -> None:
    model[0] = nn.Linear(3, 4).double()


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(dataset(12))


class Piped(IterDataPipe):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter(dataset(12))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": twice}, "run.model got the same module twice"),
    ({"model": lambda run: run.model("x")}, "run.model got a str, expected a torch.nn.Module"),
    (
        {"model": lambda run: run.model(nn.Linear(3, 2, device="meta"))},
        "a module on meta, expected one on cpu",
    ),
    ({"model": lambda _: network()}, "the loop trains no model: call run.model"),
    ({"model": lambda run: run.model(network(outputs=2 + run.rank))}, "ranks gave different modules"),
    ({"keep": lambda *_: {}}, "the loop has no optimiser: call run.keep"),
    ({"keep": lambda *_: {"rate": 0.1}}, "run.keep got rate, which is of type float, expected"),
    ({"keep": lambda run, its: {f"number_{run.rank}": its}}, "keep model, number_0 .* keep model, number_1"),
    ({"optimizer": lambda run, its: sgd(its, 0.1 + run.rank)}, r"has lr = \d.1 in the optimiser's group"),
    ({"loader": lambda _: [1, 2]}, "run.loader got a list, expected a torch.utils.data.DataLoader"),
    ({"loader": lambda _: DataLoader(Stream(), batch_size=None)}, "expected one with batch_size=N"),
    ({"loader": lambda _: DataLoader(Piped(), batch_size=2)}, "over an IterDataPipe, expected"),
    (
        {"loader": lambda run: DataLoader(Stream(), batch_size=2 + run.rank)},
        "loop over a stream in batches of 2 .* loop over a stream in batches of 3",
    ),
    ({"loader": lambda _: DataLoader(dataset(12), batch_size=None)}, "expected one with batch_size=N"),
    (
        {"loader": lambda _: DataLoader(dataset(9), batch_sampler=[[0, 1], []])},
        "batch_sampler has drawn an empty batch, expected samples in each",
    ),
    (
        {
            "loader": lambda run: DataLoader(
                dataset(9), batch_sampler=BatchSampler(range(9), 2 + run.rank, False)
            )
        },
        "loop over 9 samples in 5 batches .* loop over 9 samples in 3 batches",
    ),
    (
        {"loader": lambda _: DataLoader(dataset(9), sampler=DistributedSampler(range(9), 2, 0))},
        "a DistributedSampler, but it deals the samples itself",
    ),
    (
        {"loader": lambda run: DataLoader(dataset(12 + run.rank), batch_size=2)},
        "loop over 12 samples in batches of 2 .* loop over 13 samples in batches of 2",
    ),
    (
        {"loader": lambda run: DataLoader(dataset(12), batch_size=2 + run.rank)},
        "loop over 12 samples in batches of 2 .* loop over 12 samples in batches of 3",
    ),
    ({"epochs": 2.5}, r"run.epochs\(2.5\) was called, expected a number of epochs"),
    ({"after": lambda run, *_: run.model(network())}, "run.model was called after the first turn"),
    ({"after": lambda run, _, its: run.keep(other=its)}, "run.keep was called after the first turn"),
    ({"after": lambda run, *_: run.log(loss="high")}, "loss='high' was given, expected a number"),
    ({"after": lambda run, *_: run.log(loss=torch.ones(3))}, r"loss=a Tensor of shape \[3\] was"),
    ({"after": lambda run, *_: run.mean(torch.ones(3))}, r"value=a Tensor of shape \[3\] was"),
    ({"after": lambda run, *_: run.shard(3)}, "run.shard got data of type int, which has no length"),
    ({"after": lambda run, *_: run.backward(torch.ones(1), weight=-1)}, "weight=-1.0 was given, expected"),
    ({"after": lambda run, *_: run.backward(torch.ones(1), reduction="max")}, "reduction='max' was"),
    ({"after": passes_in_turns}, r"a second loader begins at .*test_run.py:\d+, in a turn of the first"),
    ({"after": replaces_a_layer}, "the parameter model.0.weight was added, removed or replaced"),
    ({"step": lambda _, model, __: sgd(model).step()}, "an optimiser SGD steps that run.keep did not get"),
]


@pytest.mark.parametrize(("given", "line"), BAD, ids=[line[:40] for _, line in BAD])
def test_bad_input(given: dict[str, Any], line: str) -> None:
    """What a loop cannot have is refused in one line that says what was given and what was expected."""
    with pytest.raises(RankwiseError, match=line) as caught:
        on_ranks(2, lambda run: plain(run, **given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"strategy": "easgd"}, "--strategy easgd was given, but .* all ranks train"),
        ({"strategy": "downpour"}, "--strategy downpour was given, but .* all ranks train"),
        ({"strategy": "gradient-server"}, "--strategy gradient-server was given, but .* all ranks train"),
        ({"strategy": "paper-stopwatch"}, "--strategy paper-stopwatch was given"),
        ({"strategy": "replication"}, "--strategy replication was given"),
        ({"strategy": "ddp"}, "--strategy ddp "),
        ({"strategy": "two-level"}, "--strategy two-level was given, but it makes"),
        ({"strategy": "allreduce", "sync_every": 3}, "--sync-every 3 was given, but .* backward pass"),
        ({"strategy": "nonsense"}, "nonsense"),
        ({"clip_norm": 1.0}, "clip_norm"),
    ],
)
def test_options_that_a_loop_cannot_have(options: dict[str, Any], line: str) -> None:
    """Strategies and options that a loop cannot have are refused by name when the run is made."""
    with pytest.raises(ConfigError, match=line) as caught:
        on_ranks(2, lambda run: None, **options)
    assert "\n" not in str(caught.value)


def test_other_numbers_of_passes() -> None:
    """A rank that goes through a loader more often than others ends all, with what each was about to do."""

    def loop(run: Any) -> None:
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        loader = run.loader(DataLoader(dataset(12), batch_size=2))
        for _ in run.epochs(1):
            for _ in range(1 + run.rank):
                for x, _ in loader:
                    model(x).sum().backward()

    with pytest.raises(OutOfStepError, match=r"rank 0 is to end an epoch .* rank 1 is to loop over"):
        on_ranks(2, loop)


def with_all_kept(samples: int) -> Callable[[Any], np.ndarray]:
    """Schedulers, an average, and means of the loop's own in turns and between passes."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8)
        )
        optimizer = sgd(model)
        by_step = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)
        by_epoch = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        run.keep(optimizer=optimizer, by_step=by_step, by_epoch=by_epoch, average=average)
        loader = run.loader(DataLoader(dataset(samples), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                by_step.step()
                average.update_parameters(model)
                run.log(loss=loss)
                run.mean(loss)
            by_epoch.step()
            run.mean(1.0)
        settings = [optimizer.param_groups[0]["lr"], by_step.last_epoch, by_epoch.last_epoch]
        return np.concatenate([flat(model, average), settings])

    return loop


SET_UP = 25
"""Calls of the transport before a run trains, in which a lost rank ends it."""

LOOPS = {
    "all that is kept": with_all_kept(13),
    "gan": gan(9),
    "gradients that are accumulated": accumulating(waits=False),
    "lbfgs": lbfgs_loop("strong_wolfe"),
}


@pytest.mark.parametrize(("name", "lost"), effort.rotating(LOOPS, [0, 1]))
def test_a_rank_is_lost(name: str, lost: int) -> None:
    """Whenever a rank is killed, the others end where one process does: nothing that a loop keeps makes a
    step twice or not at all."""
    expected = LOOPS[name](Alone(2))
    kept = {"on_failure": "continue", "on_shrink": "keep-global-batch"}
    calls = [*range(SET_UP + lost, SET_UP + 44, 2 if effort.FULL else 9)]
    left = set()
    for call in calls:
        results = on_ranks(2, LOOPS[name], kill_at={lost: call}, **kept)
        left.add(len(results))
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10, err_msg=f"killed at {call}")
    assert 1 in left


class Counted(Noted):
    """Counts the samples of each epoch too."""

    def __init__(self, join_state: JoinState | None = None) -> None:
        super().__init__(join_state)
        self.counts: list[SampleCounts] = []

    def epoch_over(
        self, epoch: int, found: Mapping[str, Any], counts: SampleCounts, *args: Any, **more: Any
    ) -> bool:
        self.counts.append(counts)
        return super().epoch_over(epoch, found, counts, *args, **more)


IN_STEP = ["allreduce", "local-sgd", "post-local-sgd", "parameter-averaging", "slowmo", "diloco", "gossip"]


@pytest.mark.parametrize("call", [None, SET_UP + 8, SET_UP + 21])
@pytest.mark.parametrize("strategy", IN_STEP)
def test_each_strategy_trains_each_sample_once(strategy: str, call: int | None) -> None:
    """Under each strategy that a loop can have, with and without a rank that is killed, ranks end alike and
    each sample of each epoch was trained once."""

    def loop(world: World) -> tuple[np.ndarray, Counted]:
        book = Counted()
        options = {"topology": "ring"} if strategy == "gossip" else {}
        run = noted(world, book, strategy=strategy, on_failure="continue", **options)
        return with_all_kept(25)(run), book

    kill_at = None if call is None else {1: call}
    results = [its for its in run_in_threads(3, loop, kill_at=kill_at) if its is not Killed]
    assert len(results) == (3 if call is None else 2)
    for weights, book in results:
        np.testing.assert_array_equal(weights, results[0][0])
        assert book.counts == [SampleCounts(25, 25)] * 2
        assert [its["loss"] for its in book.metrics] == [its["loss"] for its in results[0][1].metrics]


@pytest.mark.parametrize(("strategy", "every"), [("local-sgd", 2), ("local-sgd", 1), ("post-local-sgd", 2)])
def test_local_steps_against_plain_ones(strategy: str, every: int) -> None:
    """Local SGD is what plain torch makes of each rank's batches with a mean of the weights every few turns;
    its first half steps each turn if it begins so."""
    ranks, epochs = 3, 4
    features, labels = dataset(23).tensors
    numbered = TensorDataset(torch.arange(23), features, labels)

    def loop(run: Any) -> tuple[np.ndarray, list[list[list[int]]]]:
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(numbered, batch_size=2))
        seen: list[list[list[int]]] = []
        for _ in run.epochs(epochs):
            seen.append([])
            for which, x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                seen[-1].append(which.tolist())
        return flat(model), seen

    results = on_ranks(ranks, loop, strategy=strategy, sync_every=every)
    weights = torch.nn.utils.parameters_to_vector(network().parameters()).detach()
    for epoch in range(epochs):
        turns = [*zip(*(seen[epoch] for _, seen in results), strict=True)]
        assert [index for turn in turns for part in turn for index in part] == [*range(23)]
        interval = 1 if strategy == "post-local-sgd" and epoch < epochs / 2 else every
        for at in range(0, len(turns), interval):
            span = turns[at : at + interval]
            total = sum(len(part) for turn in span for part in turn)
            mean = torch.zeros_like(weights)
            for rank in range(ranks):
                model = network()
                torch.nn.utils.vector_to_parameters(weights.clone(), model.parameters())
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                for turn in span:
                    optimizer.zero_grad()
                    F.mse_loss(model(features[turn[rank]]), labels[turn[rank]]).backward()
                    optimizer.step()
                share = sum(len(turn[rank]) for turn in span) / total
                mean += share * torch.nn.utils.parameters_to_vector(model.parameters()).detach()
            weights = mean
    for result, _ in results:
        np.testing.assert_allclose(result, weights.numpy(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("compress", ["fp16", "bf16", "int8", "topk:0.5", "sign", "powersgd:1"])
@pytest.mark.parametrize("make", [gan(13, 3), loop_over(13, 3)])
def test_compression(make: Callable[[Any], np.ndarray], compress: str) -> None:
    """Ranks that compress gradients hold the same bits, go most of the way that one process goes, and have
    their error added later, of each pass in a turn by itself."""
    start, end = make(Alone(2)) * 0, make(Alone(2))
    results = on_ranks(2, make, compress=compress)
    np.testing.assert_array_equal(results[0], results[1])
    bound = {"fp16": 1e-3, "bf16": 1e-2, "int8": 2e-2}.get(compress, 0.4)
    assert np.linalg.norm(results[0] - end) < bound * np.linalg.norm(end - start)
    assert not np.array_equal(results[0], end)


def test_compression_keeps_what_it_leaves_out_by_pass() -> None:
    """What topk leaves out of the gradients of one model's pass is not put into those of another's."""

    def loop(run: Any) -> np.ndarray:
        one, other = run.model(network()), run.model(network(1))
        ones, others = sgd(one), sgd(other)
        run.keep(ones=ones, others=others)
        loader = run.loader(DataLoader(dataset(16), batch_size=2))
        mixed = 0.0
        for _ in run.epochs(1):
            for x, y in loader:
                ones.zero_grad()
                F.mse_loss(one(x), y).backward()
                ones.step()
                before = [its.grad.clone() for its in one.parameters()]
                others.zero_grad()
                F.mse_loss(other(x), y).backward()
                others.step()
                pairs = zip(before, one.parameters(), strict=True)
                mixed += sum(float((then - its.grad).abs().sum()) for then, its in pairs)
        return np.array([mixed])

    assert all(float(its[0]) == 0 for its in on_ranks(2, loop, compress="topk:0.1"))


@given(
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([None, 1, 3]),
    st.booleans(),
    st.booleans(),
    st.data(),
)
@effort.examples(40, 200)
def test_turns_deal_each_sample_once(
    samples: int, ranks: int, batch: int, every: int | None, drops: bool, keeps: bool, data: st.DataObject
) -> None:
    """All ranks have equally many turns, which hold the samples in order, each once, but for those that
    `drop_last` drops; when ranks are lost after some rounds, the others get what is left, and nothing
    twice. Where a model cannot train on one sample, no rank gets a single one that another can take."""
    least = data.draw(st.sampled_from([1, min(2, batch)]))

    def sampler(rank: int) -> TurnSampler:
        made = TurnSampler(rank=rank, ranks=ranks, sync_every=lambda _: every, keeps_global_batch=keeps)
        made.begin(1, samples, batch_size=batch, drops_last=drops, least=least)
        return made

    samplers = [sampler(rank) for rank in range(ranks)]
    batches = [list(its.batches(1)) for its in samplers]
    assert len({len(its) for its in batches}) == 1
    turns = [np.concatenate([its.indices for its in turn]) for turn in zip(*batches, strict=True)]
    dealt = samples - samples % (ranks * batch) * drops
    assert np.concatenate([[], *turns]).tolist() == [*range(dealt)]
    assert len(turns) == samplers[0].turns(samples, batch_size=batch, drops_last=drops, least=least)
    for turn in zip(*batches, strict=True):
        sizes = [len(its) for its in turn]
        some = sizes[: len(np.flatnonzero(sizes))]
        assert max(some) - min(some) <= 1
        assert len(some) == ranks or sum(sizes) < least * ranks
        assert min(some) >= min(least, sum(sizes))
        assert all(its.is_made for its in turn)
    rounds = samplers[0].rounds(1)
    if ranks == 1 or not rounds:
        return
    over = data.draw(st.integers(0, len(rounds)))
    left = sorted(data.draw(st.sets(st.integers(0, ranks - 1), min_size=1, max_size=ranks - 1)))
    sizes = [len(rounds[over].part(rank)) if over < len(rounds) else 0 for rank in left]
    done = [data.draw(st.integers(0, size)) for size in sizes]
    trained = [np.concatenate([NOTHING, *(its.part(rank) for its in rounds[:over])]) for rank in range(ranks)]
    pairs = zip(left, done, strict=True) if over < len(rounds) else ()
    kept = [rounds[over].part(rank)[:count] for rank, count in pairs]
    for rank in left:
        samplers[rank].redistribute(1, over, left, done)
    again = [list(samplers[rank].batches(1, over)) for rank in left]
    assert len({len(its) for its in again}) == 1
    if not any(map(len, kept)):
        assert all(len(its) == 0 or len(its) >= min(least, dealt) for mine in again for its in mine)
    new = [its.indices for mine in again for its in mine]
    everything = np.concatenate([*trained, *kept, *new])
    assert sorted(everything.tolist()) == [*range(dealt)]
    assert all(samplers[rank].samples(1) == dealt for rank in left)


@effort.only_in_full
@pytest.mark.mpi
def test_dropout_differs_by_rank_and_comes_again(command: Command, tmp_path: Path) -> None:
    """Masks of dropout differ by rank, and are the same in a second run with the same seed; so are the
    numbers that a loader's workers draw."""
    program = """
        import json, torch, rankwise
        from torch import nn
        from torch.utils.data import DataLoader, Dataset
        class Drawn(Dataset):
            def __len__(self): return 8
            def __getitem__(self, index): return torch.rand(4)
        torch.set_num_threads(1)
        run = rankwise.Run(seed=SEED)
        model = run.model(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(Drawn(), batch_size=1, num_workers=1))
        drawn = []
        for _ in run.epochs(2):
            for x in loader:
                out = model[1](torch.ones(8))
                optimizer.zero_grad(); model(x).sum().backward(); optimizer.step()
                drawn.append((out.tolist(), x.tolist()))
        both = run.world.allgather_object(drawn)
        run.print(json.dumps(both))
    """
    told = []
    for seed in (1, 1, 2):
        script = tmp_path / "program.py"
        script.write_text(textwrap.dedent(program).replace("SEED", str(seed)))
        done = command.mpiexec(2, str(script), cwd=tmp_path)
        assert done.code == 0, done
        told.append(json.loads(next(line for line in done.out.splitlines() if line.startswith("[["))))
    assert told[0] == told[1] != told[2]
    (mine, theirs) = told[0]
    assert all(one[0] != other[0] and one[1] != other[1] for one, other in zip(mine, theirs, strict=True))
    assert len({str(its) for its in mine}) == len(mine)


def one_takes_a_mean(run: Any, turn: int, step: Callable[[], None]) -> None:
    if (turn, run.rank) == (1, 1):
        run.mean(5.0)
    step()


def test_one_rank_takes_a_mean() -> None:
    """If one rank alone takes a mean in a turn, all end with one line that says where; all may take one."""
    with pytest.raises(
        OutOfStepError, match=r"rank 0 at .* and rank 1 at run.mean in tests.test_run.py"
    ) as caught:
        on_ranks(2, lambda run: simple(run, one_takes_a_mean))
    assert "\n" not in str(caught.value)
    means = []

    def all_take(run: Any, turn: int, step: Callable[[], None]) -> None:
        means.append(run.mean(float(run.rank), weight=1.0))
        step()

    on_ranks(2, lambda run: simple(run, all_take))
    assert set(means) == {0.5}


def test_rounds_that_all_left_out_count_for_no_rank() -> None:
    """If all ranks leave a pass by `break` and one is lost behind it, only what was trained is counted, also
    of the lost one; a turn that is undone with nobody to make it again is counted as lost."""

    def loop(run: Any) -> list[tuple[int, int, int, int]]:
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(45), batch_size=4))
        found = []
        for _ in run.epochs(1):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                if run.turn == 2:
                    break
            run.mean(1.0)
            found.append(run._turns.synchroniser.retry_until_all(run._turns.count))
        counts = found[-1]
        return [(counts.expected, counts.trained, counts.duplicated, counts.lost)]

    seen = set()
    for calls in range(20, 40):
        options = {"on_failure": "continue", "on_shrink": "keep-global-batch"}
        for counts in on_ranks(2, loop, kill_at={1: calls}, **options):
            seen |= set(counts)
    assert seen == {(24, 24, 0, 0), (24, 16, 0, 8)}
