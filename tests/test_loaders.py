"""`run.loader` where a DataLoader makes batches of its own, or streams its samples."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import astuple
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    get_worker_info,
)

from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.errors import ConfigError, Interrupted, OutOfStepError
from rankwise.runs.folder import RunFolder

from . import effort
from .conftest import Command
from .test_run import IN_STEP, SET_UP, Counted, noted, sgd
from .user_loops import Alone, assert_one_process, dataset, flat, network, on_ranks

KEPT = {"on_failure": "continue", "on_shrink": "keep-global-batch"}


class Buckets(Sampler[list[int]]):
    """Batches of one to four samples, in another order each epoch, which it draws as it begins."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._order = np.random.default_rng(5)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order.permutation(self._samples).tolist()
        sizes = np.resize([3, 1, 4, 2], self._samples).cumsum()
        cuts = [0, *sizes[sizes < self._samples].tolist(), self._samples]
        return iter([order[start:stop] for start, stop in pairwise(cuts)])


def loop_over(make: Callable[[], DataLoader[Any]], epochs: int = 2) -> Callable[[Any], np.ndarray]:
    """A loop over a loader that each rank makes."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(make())
        for _ in run.epochs(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
        return flat(model)

    return loop


def in_buckets(samples: int = 23) -> DataLoader[Any]:
    """A loader with batches of its own."""
    return DataLoader(dataset(samples), batch_sampler=Buckets(samples))


@pytest.mark.parametrize("ranks", effort.daily([1, 2, 3, 5], [2, 5]))
@pytest.mark.parametrize("samples", effort.daily([2, 11, 23], [2, 23]))
def test_batches_of_its_own(ranks: int, samples: int) -> None:
    """N ranks that take a batch each hold the weights of one process that takes the samples of N batches in
    a step, whatever their sizes, also if there are fewer batches than ranks."""
    assert_one_process(ranks, loop_over(lambda: in_buckets(samples)))


@pytest.mark.parametrize("ranks", [2, 3])
def test_batches_of_its_own_from_a_generator(ranks: int) -> None:
    """Batches that are drawn from the loader's own generator are those of one process, epoch by epoch."""

    def make() -> DataLoader[Any]:
        order = torch.Generator().manual_seed(3)
        batches = BatchSampler(RandomSampler(range(23), generator=order), 4, False)
        return DataLoader(dataset(23), batch_sampler=batches, generator=order)

    assert_one_process(ranks, loop_over(make))


def test_no_batch_is_split() -> None:
    """Each rank gets batches as the sampler makes them, N in a turn in their order; in a last turn with
    fewer a rank without one is lent another's, which does not count. `len` is the number of turns."""

    def loop(run: Any) -> Any:
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        seen = []
        loader = run.loader(DataLoader(range(25), batch_sampler=Buckets(25), collate_fn=list))
        before = None
        for _ in run.epochs(1):
            for batch in loader:
                seen.append(batch)
                before = len(loader)
                model(torch.zeros(len(batch), 3, dtype=torch.float64)).sum().backward()
        return seen, before

    batches = [*Buckets(25)]
    results = on_ranks(3, loop)
    assert len(batches) % 3
    for rank, (seen, turns) in enumerate(results):
        mine = [
            batches[at + rank] if at + rank < len(batches) else batches[at]
            for at in range(0, len(batches), 3)
        ]
        assert seen == mine
        assert turns == len(seen)


def test_a_lent_batch_moves_nothing() -> None:
    """Where ranks make steps of their own, one that is lent another's batch keeps its weights and its
    optimiser's state: the average is that of ranks which have trained their own batches alone."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(6), batch_sampler=BatchSampler(range(6), 2, False)))
        for _ in run.epochs(1):
            for x, y in loader:
                step(model, optimizer, x, y)
        return flat(model)

    def step(model: Any, optimizer: Any, x: Any, y: Any) -> None:
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()

    xs, ys = dataset(6).tensors
    ends = []
    for batches in ([0, 4], [2]):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for at in batches:
            step(model, optimizer, xs[at : at + 2], ys[at : at + 2])
        ends.append(flat(model))
    expected = (4 * ends[0] + 2 * ends[1]) / 6
    for result in on_ranks(2, loop, strategy="parameter-averaging"):
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("lost", [0, 1])
def test_batches_of_its_own_of_a_rank_that_is_lost(lost: int) -> None:
    """When a rank is killed its batches are dealt to the other, which ends where one process does."""
    loop = loop_over(in_buckets)
    expected = loop(Alone(2))
    left = set()
    for call in range(SET_UP + lost, SET_UP + 30, 3 if effort.FULL else 11):
        results = on_ranks(2, loop, kill_at={lost: call}, **KEPT)
        left.add(len(results))
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10, err_msg=f"killed at {call}")
    assert 1 in left


@pytest.mark.parametrize("call", effort.daily([None, SET_UP + 11], [SET_UP + 11]))
@pytest.mark.parametrize("strategy", IN_STEP)
def test_each_strategy_trains_each_batch_once(strategy: str, call: int | None) -> None:
    """Under each strategy, with and without a rank that is killed, each sample of batches of its own was
    trained once, and ranks end alike."""

    def loop(world: World) -> tuple[np.ndarray, Counted]:
        book = Counted()
        options = {"topology": "ring"} if strategy == "gossip" else {}
        run = noted(world, book, strategy=strategy, on_failure="continue", **options)
        return loop_over(lambda: in_buckets(25))(run), book

    kill_at = None if call is None else {1: call}
    results = [its for its in run_in_threads(3, loop, kill_at=kill_at) if its is not Killed]
    assert len(results) == (3 if call is None else 2)
    for weights, book in results:
        np.testing.assert_array_equal(weights, results[0][0])
        assert [*map(astuple, book.counts)] == [(25, 25, 0, 0)] * 2


class Stream(IterableDataset[Any]):
    """A stream of numbered samples, of which each worker reads every W-th, as torch's page says."""

    def __init__(self, samples: int | None, shuffle: bool = False) -> None:
        self.samples = samples
        self.shuffle = shuffle

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        numbers: Any = count(first, step) if self.samples is None else range(first, self.samples, step)
        if self.shuffle:
            numbers = [numbers[at] for at in torch.randperm(len(numbers)).tolist()]
        for number in numbers:
            yield number, numbers_of(number), numbers_of(number + 1000, 2)


def numbers_of(number: int, length: int = 3) -> torch.Tensor:
    """What a sample holds."""
    return torch.sin(torch.arange(1.0, 1.0 + length, dtype=torch.float64) * (number + 1))


def over_stream(make: Callable[[], DataLoader[Any]], epochs: int = 2) -> Callable[[Any], np.ndarray]:
    """A loop over a stream."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(make())
        for _ in run.epochs(epochs):
            for _, x, y in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
        return flat(model)

    return loop


@pytest.mark.parametrize("samples", effort.daily([0, 1, 6, 12, 13, 25], [0, 1, 13]))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_streams(ranks: int, samples: int) -> None:
    """N ranks that read a stream hold the weights of one process with the batches of all, however ragged its
    end."""
    assert_one_process(ranks, over_stream(lambda: DataLoader(Stream(samples), batch_size=2)))


@pytest.mark.parametrize("samples", [12, 13])
def test_streams_without_their_last_turn(samples: int) -> None:
    """`drop_last=True` drops a shorter turn, as it does the shorter batch of one process."""
    loop = over_stream(lambda: DataLoader(Stream(samples), batch_size=2, drop_last=True))
    assert_one_process(2, loop)


def in_steps(samples: int | None, count: int = 5, epochs: int = 3) -> Callable[[Any], np.ndarray]:
    """A loop of so many steps an epoch over a stream, which go on where the last ones have stopped."""

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(Stream(samples), batch_size=2))
        turns = []
        for _ in run.epochs(epochs):
            for _, x, y in run.steps(count, loader):
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                turns.append(run.turn)
        if hasattr(run, "world"):
            assert len(turns) >= count * epochs
            assert turns[:count] == [*range(count)] or run.size == 1
        return flat(model)

    return loop


@pytest.mark.parametrize("samples", effort.daily([None, 4, 13, 24], [None, 13]))
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps_over_a_stream(ranks: int, samples: int | None) -> None:
    """`run.steps(n, loader)` gives n batches of a stream, from where it stopped the last time, and begins it
    anew where it is over, as `next` in one process does."""
    assert_one_process(ranks, in_steps(samples))


@pytest.mark.parametrize("call", range(SET_UP + 1, SET_UP + 40, 3 if effort.FULL else 13))
def test_steps_over_a_stream_of_a_rank_that_is_lost(call: int) -> None:
    """When a rank is killed the steps over a stream are those of one process."""
    loop = in_steps(None)
    [result, *_] = on_ranks(2, loop, kill_at={1: call}, **KEPT)
    np.testing.assert_allclose(result, loop(Alone(2)), rtol=0, atol=1e-10)


def steps_over_a_map(run: Any) -> None:
    for _ in run.steps(3, run.loader(DataLoader(dataset(12), batch_size=2))):
        pass


def steps_over_nothing(run: Any) -> None:
    for _ in run.steps(3, run.loader(DataLoader(Stream(0), batch_size=2))):
        pass


def next_in_steps(run: Any) -> None:
    batches = iter(run.loader(DataLoader(Stream(12), batch_size=2)))
    for _ in run.steps(3):
        next(batches)


@pytest.mark.parametrize(
    ("take", "line"),
    [
        (steps_over_a_map, r"run.steps\(3, loader\) got a Loader, expected what run.loader returns for a"),
        (steps_over_nothing, "run.steps got a loader over a stream without a batch, expected one at least"),
        (
            next_in_steps,
            r"test_loaders.py:\d+, in a turn of run.steps\(n\): loop over run.steps\(n, l",
        ),
    ],
)
def test_steps_that_are_refused(take: Any, line: str) -> None:
    """Steps over what is no stream, or has no batch, are refused in one line, and so is a loader whose
    batches are asked for in steps without it."""

    def loop(run: Any) -> None:
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        for _ in run.epochs(1):
            take(run)

    with pytest.raises(ConfigError, match=line) as caught:
        on_ranks(2, loop)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_reads_a_stream_is_lost(lost: int) -> None:
    """When a rank is killed the other reads the stream again, past what was trained, and ends where one
    process does."""
    loop = over_stream(lambda: DataLoader(Stream(23), batch_size=2))
    expected = loop(Alone(2))
    left = set()
    for call in range(SET_UP + lost, SET_UP + 40, 3 if effort.FULL else 11):
        results = on_ranks(2, loop, kill_at={lost: call}, **KEPT)
        left.add(len(results))
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10, err_msg=f"killed at {call}")
    assert 1 in left


@pytest.mark.parametrize("call", effort.daily([None, SET_UP + 9, SET_UP + 16], [SET_UP + 16]))
@pytest.mark.parametrize("strategy", IN_STEP)
def test_each_strategy_trains_each_sample_of_a_stream_once(strategy: str, call: int | None) -> None:
    """Under each strategy, with and without a rank that is killed, each sample of a stream was trained once,
    and ranks end alike."""

    def loop(world: World) -> tuple[np.ndarray, Counted]:
        book = Counted()
        options = {"topology": "ring"} if strategy == "gossip" else {}
        run = noted(world, book, strategy=strategy, on_failure="continue", **options)
        return over_stream(lambda: DataLoader(Stream(47), batch_size=1))(run), book

    kill_at = None if call is None else {1: call}
    results = [its for its in run_in_threads(3, loop, kill_at=kill_at) if its is not Killed]
    assert len(results) == (3 if call is None else 2)
    for weights, book in results:
        np.testing.assert_array_equal(weights, results[0][0])
        assert {*map(astuple, book.counts)} == {(47, 47, 0, 0)}  # again if a rank is lost meanwhile


def differing(change: Callable[[int, list[int]], list[int]]) -> Callable[[Any], Any]:
    """A loop over 23 numbers, which a rank changes for itself."""

    def loop(run: Any) -> Any:
        class Changed(IterableDataset[Any]):
            def __iter__(self) -> Iterator[int]:
                return iter(change(run.rank, [*range(23)]))

        model = run.model(network())
        run.keep(optimizer=sgd(model))
        for _ in run.epochs(1):
            for batch in run.loader(DataLoader(Changed(), batch_size=2, collate_fn=list)):
                model(torch.zeros(len(batch), 3, dtype=torch.float64)).sum().backward()

    return loop


@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd", "parameter-averaging"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda rank, its: its[rank::2], "rank 1 has read other samples than rank 0 by turn [12]"),
        (lambda rank, its: its[: 23 - 7 * rank], "rank (1 has read other|0's .* is over after 4 turns)"),
        (lambda rank, its: its if rank else [], "rank (1 has read other|0's is over after 0 turns)"),
        (lambda rank, its: its if rank else its[:5] + its[6:], "rank 1 has read other samples"),
    ],
    ids=["a shard of each", "a shorter one", "none", "one sample is left out"],
)
def test_streams_that_differ(strategy: str, change: Any, line: str) -> None:
    """Streams that differ between ranks end all in one line, whether they are other samples or fewer, and
    nobody waits."""
    with pytest.raises(OutOfStepError, match=f"the streams of a loader differ, {line}") as caught:
        on_ranks(2, differing(change), strategy=strategy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", IN_STEP)
def test_endless_streams_are_left(strategy: str) -> None:
    """A loop over a stream without an end is left by `break` on all ranks in the same turn, and begins anew;
    the record counts what was trained."""

    def loop(world: World) -> Any:
        book, seen = Counted(), []
        options = {"topology": "ring"} if strategy == "gossip" else {}
        run = noted(world, book, strategy=strategy, **options)
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(Stream(None), batch_size=2))
        for _ in run.epochs(2):
            for which, x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                seen.append(which.tolist())
                if run.turn == 10:
                    break
        return seen, flat(model), book.counts

    results = run_in_threads(2, loop)
    for rank, (seen, weights, counts) in enumerate(results):
        assert seen == [[at, at + 1] for at in range(2 * rank, 44, 4)] * 2
        assert [*map(astuple, counts)] == [(44, 44, 0, 0)] * 2
        np.testing.assert_array_equal(weights, results[0][1])


@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd"])
@pytest.mark.parametrize(
    "leaves", [lambda rank, turn: rank == 1 and turn == 3, lambda rank, turn: turn == 3 + rank]
)
def test_one_rank_leaves_a_stream(strategy: str, leaves: Any) -> None:
    """A rank that leaves a loop over a stream where others do not ends all, with the places of both."""

    def loop(run: Any) -> Any:
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        for _ in run.epochs(1):
            for _, x, _ in run.loader(DataLoader(Stream(None), batch_size=2)):
                model(x).sum().backward()
                if leaves(run.rank, run.turn) or run.turn == 40:
                    break

    with pytest.raises(
        OutOfStepError, match=r"rank \d left the loop over batches at .* leave it on all ranks"
    ):
        on_ranks(2, loop, strategy=strategy)


@pytest.mark.parametrize("turn", [0, 7, 9])
@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd"])
def test_one_rank_is_asked_to_stop_in_a_stream(strategy: str, turn: int) -> None:
    """A rank that is asked to stop in a loop over a stream without an end stops all, in the middle of a round
    or at its end."""

    def loop(run: Any) -> Any:
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        for _ in run.epochs(1):
            for _, x, _ in run.loader(DataLoader(Stream(None), batch_size=2)):
                model(x).sum().backward()
                run.world.asked_to_stop = run.world.asked_to_stop or (run.rank == 1 and run.turn == turn)
                assert run.turn < 40

    with pytest.raises(Interrupted, match="the run was asked to stop"):
        on_ranks(2, loop, strategy=strategy)


def test_all_ranks_leave_a_stream_in_its_last_turn() -> None:
    """A loop that is left in the last turn of a stream is over, as one that was taken to its end."""

    def loop(run: Any) -> Any:
        model = run.model(network())
        run.keep(optimizer=sgd(model))
        turns = []
        for _ in run.epochs(2):
            for which, x, _ in run.loader(DataLoader(Stream(8), batch_size=2)):
                model(x).sum().backward()
                turns.append(which.tolist())
                if run.turn == 1 and run.rank < 2:
                    break
        return turns

    assert on_ranks(2, loop) == [[[0, 1], [4, 5]] * 2, [[2, 3], [6, 7]] * 2]


def test_a_stream_that_gives_other_samples_when_it_is_read_again() -> None:
    """A stream that begins with other samples each time, as one that counts, is refused when a lost rank
    makes the other read it again."""

    def loop(run: Any) -> Any:
        class Counts(IterableDataset[Any]):
            times = 0

            def __iter__(self) -> Iterator[Any]:
                self.times += 1
                return iter(Stream(23)) if self.times == 1 else iter([*Stream(23)][::-1])

        model = run.model(network())
        run.keep(optimizer=sgd(model))
        for _ in run.epochs(1):
            for _, x, _ in run.loader(DataLoader(Counts(), batch_size=2)):
                model(x).sum().backward()

    with pytest.raises(OutOfStepError, match="was read again, as a rank was lost or the run goes on"):
        on_ranks(2, loop, kill_at={1: SET_UP + 3}, **KEPT)


def test_a_stream_that_can_be_read_once() -> None:
    """A stream that is over when it is read again, as one that is its own iterator, is refused then."""

    def loop(run: Any) -> Any:
        class Once(IterableDataset[Any]):
            samples = iter(Stream(23))

            def __iter__(self) -> Iterator[Any]:
                return self.samples

        model = run.model(network())
        run.keep(optimizer=sgd(model))
        loader = run.loader(DataLoader(Once(), batch_size=2))
        for _ in run.epochs(1):
            for _, x, _ in loader:
                model(x).sum().backward()

    with pytest.raises(OutOfStepError, match="was read again, as a rank was lost or the run goes on"):
        on_ranks(2, loop, kill_at={1: SET_UP + 3}, **KEPT)


def test_length_of_a_stream() -> None:
    """The length of a loader is torch's: of a stream that knows its own, otherwise it raises TypeError."""

    class Sized(Stream):
        def __len__(self) -> int:
            return 23

    def loop(run: Any) -> Any:
        plain = run.loader(DataLoader(Stream(23), batch_size=2))
        with pytest.raises(TypeError, match="has no len"):
            len(plain)
        loaders = [DataLoader(Sized(23), batch_size=2, drop_last=drops) for drops in (False, True)]
        return [len(run.loader(its)) for its in loaders]

    assert on_ranks(2, loop) == [[6, 5]] * 2


@pytest.mark.parametrize("rows", [9, 10, 11])
def test_batchnorm_gets_no_single_sample_of_a_stream(rows: int) -> None:
    """Of a short last turn no rank gets a single sample, which BatchNorm could not train."""

    def loop(run: Any) -> Any:
        model = run.model(torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).double())
        run.keep(optimizer=sgd(model))
        sizes = []
        for _ in run.epochs(1):
            for _, x, _ in run.loader(DataLoader(Stream(rows), batch_size=2)):
                model(x).sum().backward()
                sizes.append(len(x))
        return sizes

    results = on_ranks(3, loop)
    assert len({len(its) for its in results}) == 1
    assert min(size for its in results for size in its) > 1


STREAMS = """
import itertools, os, random, signal, sys
import numpy as np, torch, rankwise
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

words = dict(word.split("=") for word in sys.argv[1:])
workers, steps, alone = int(words["workers"]), int(words.get("steps", 0)), "alone" in words

class Shuffled(IterableDataset):
    samples = 45

    def __iter__(self):
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        order = list(range(first, self.samples, step))
        random.shuffle(order)
        for number in order:
            x = torch.sin(torch.arange(1.0, 4.0, dtype=torch.float64) * (number + 1))
            yield x + 0.1 * torch.rand(()) + 0.1 * np.random.rand(), x.sum()[None]

def begin(worker):
    get_worker_info().dataset.samples = 46 + worker

def collate(samples):
    if "draws" in words:  # as many numbers as this rank has samples
        random.sample(range(9), len(samples)), torch.rand(len(samples)), np.random.rand(len(samples))
    return torch.utils.data.default_collate(samples)

loader = DataLoader(
    Shuffled(), int(words["batch"]), collate_fn=collate, generator=torch.Generator().manual_seed(1),
    num_workers=workers, worker_init_fn=begin if workers else None,
)
torch.manual_seed(0)
model = torch.nn.Linear(3, 1).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
if alone:
    epochs, endless = range(3), (batch for _ in itertools.repeat(None) for batch in loader)
else:
    run = rankwise.Run()
    model, loader = run.model(model), run.loader(loader)
    run.keep(optimizer=optimizer)
    epochs = run.epochs(3)
for epoch in epochs:
    batches = loader
    if steps:
        batches = itertools.islice(endless, steps) if alone else run.steps(steps, loader)
    for x, y in batches:
        if not alone and words.get("kill") == f"{run.world.number}:{epoch}:{run.turn}":
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
if alone or run.first:
    torch.save(model.state_dict(), words["to"])
"""


def weights(path: Path) -> np.ndarray:
    return np.concatenate([its.flatten().numpy() for its in torch.load(path).values()])


@effort.only_in_full
@pytest.mark.mpi
def test_steps_over_a_stream_go_on(command: Command, tmp_path: Path) -> None:
    """A run of so many steps an epoch over a stream, which workers read, shuffle and draw from as those of
    one process with the same generator do, goes on in the middle of the stream where it was stopped, and ends
    with the weights of one process."""
    (tmp_path / "loop.py").write_text(STREAMS)
    words = ["workers=2", "steps=7"]
    for options in (
        ["--ranks", "2", "--out", "run", "--epochs", "2", "loop.py", *words, "batch=3", "to=two.pt"],
        ["--resume", "run", "--epochs", "3"],
    ):
        done = command.rankwise("run", *options)
        assert done.code == 0, done
    plain = command(sys.executable, "loop.py", *words, "batch=6", "to=one.pt", "alone=1")
    assert plain.code == 0, plain
    np.testing.assert_allclose(weights(tmp_path / "two.pt"), weights(tmp_path / "one.pt"), rtol=0, atol=1e-10)


@pytest.mark.mpi
@pytest.mark.ulfm
def test_a_killed_rank_loses_no_sample_of_a_stream(command: Command, tmp_path: Path) -> None:
    """If a rank is killed the others read a stream that shuffles without a seed again, and each of its
    samples is trained once, also where they collate with random numbers."""
    (tmp_path / "loop.py").write_text(STREAMS)
    words = ["workers=0", "batch=3", "to=weights.pt", "kill=0:1:3", "draws=1"]
    done = command.rankwise("run", "--ranks", "2", "--out", "run", "loop.py", *words)
    assert done.code == 0, done
    record = RunFolder(tmp_path / "run").read()
    samples = record.samples
    assert (samples.expected, samples.trained, samples.duplicated, samples.lost) == (135, 135, 0, 0)
    assert [its.epoch for its in record.faults] == [2]
