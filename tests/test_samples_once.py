"""Each sample once, by count: of runs that stop again and again, grow and shrink in an epoch, save soon after
they went on, and of loops of a user's own whose ranks come and go."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset

from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.config import TrainConfig
from rankwise.errors import Interrupted, ResumeError
from rankwise.plan import RunPlan
from rankwise.program_plan import program_plan
from rankwise.runs import checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.training.folder_book import FolderBook
from rankwise.training.loader import Loader
from rankwise.training.run import Run
from rankwise.training.synchroniser import Synchroniser

from . import effort, tiny
from .processes import wait_for
from .test_stops import same, stopping, told
from .user_loops import dataset, flat, network, on_ranks

Make = Callable[..., RunPlan]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]
Seen = Counter[tuple[int, int]]
"""How often each sample was given to a rank, by epoch and sample."""


@contextmanager
def counting(seen: Seen) -> Iterator[None]:
    """While inside, counts what ranks make steps with."""
    real = Synchroniser.step

    def count(self: Synchroniser) -> None:
        assert self._batch is not None
        seen.update((self._batch.epoch, int(index)) for index in self._batch.indices)
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synchroniser, "step", count)
        yield


def each_once(epochs: int, samples: int) -> Seen:
    return Counter({(epoch, sample): 1 for epoch in range(1, epochs + 1) for sample in range(samples)})


@pytest.mark.parametrize(
    "strategy",
    effort.daily(["allreduce", "local-sgd", "parameter-averaging", "gossip"], ["allreduce", "local-sgd"]),
)
def test_ranks_come_and_go_in_one_epoch(config: Make, train_in_threads: Train, strategy: str) -> None:
    """One rank goes on as two, two as three, three as one and again as two, all in one epoch, each time as
    the last rank is asked to stop, after one step or two: each sample is trained once, in the next epoch
    too. Where ranks stop behind a step of all, none is even given to a rank twice."""

    def plan(ranks: int) -> RunPlan:
        options = {"strategy": strategy} if ranks > 1 else {}
        if strategy in ("local-sgd", "parameter-averaging") and ranks > 1:
            options |= {"topology": "allreduce", "sync_every": 2}
        # Ranks that gossip stop some rounds later.
        return config(ranks=ranks, batch_size=4 if strategy == "gossip" else 8, lr=0.005, **options)

    seen: Seen = Counter()
    with counting(seen):
        for number, (ranks, step) in enumerate([(1, 2), (2, 1), (3, 2), (1, 1), (2, 2)]):
            with pytest.raises(Interrupted, match="epoch 1"), stopping(ranks - 1, step):
                train_in_threads(plan(ranks), resume=number > 0)
        record, _, _ = train_in_threads(plan(3), resume=True)
    assert [(row.epoch, row.train_samples) for row in record.epochs] == [(1, tiny.TRAIN), (2, tiny.TRAIN)]
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert record.samples.trained == record.samples.expected == 2 * tiny.TRAIN
    assert seen.keys() == each_once(2, tiny.TRAIN).keys()
    if strategy == "allreduce":
        assert seen == each_once(2, tiny.TRAIN)


@pytest.mark.parametrize("strategy", effort.daily(["allreduce", "local-sgd", "diloco"], ["local-sgd"]))
def test_a_save_soon_after_going_on(
    config: Make,
    train_in_threads: Train,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    strategy: str,
) -> None:
    """A run that is stopped, goes on, saves a few steps later and ends there without a word goes on from that
    save, to the bits of one that was never stopped; a second time too."""
    sync = {} if strategy == "allreduce" else {"sync_every": 2, "topology": "allreduce"}
    options = {"ranks": 2, "strategy": strategy, "batch_size": 8, "checkpoint_every": "2steps", **sync}
    whole, _, weights = train_in_threads(config(**options), folder="whole")
    with pytest.raises(Interrupted), stopping(1, 3):
        train_in_threads(config(**options), folder="parts")
    real = Synchroniser.step

    def saved() -> int:
        try:
            inside = checkpoint.newest(tmp_path / "parts" / "checkpoints", print).inside
        except ResumeError:  # one is just being put in place of another
            return 0
        return inside["trained"] if inside else 0

    for _ in range(2):
        made: list[int] = []

        def fails(self: Synchroniser, made: list[int] = made, before: int = saved()) -> None:
            made.append(1)
            if len(made) > 2 * 4:
                wait_for(lambda: saved() > before)  # a thread writes it
                raise MemoryError("on purpose")
            real(self)

        monkeypatch.setattr(Synchroniser, "step", fails)
        with pytest.raises(MemoryError):
            train_in_threads(config(**options), folder="parts", resume=True)
        monkeypatch.setattr(Synchroniser, "step", real)
    parts, _, its = train_in_threads(config(**options), folder="parts", resume=True)
    assert same(weights, its)
    assert told(parts) == told(whole)
    assert parts.samples == whole.samples


class Numbered(torch.utils.data.Dataset[Any]):
    """Samples that say their number."""

    def __len__(self) -> int:
        return 17

    def __getitem__(self, index: int) -> Any:
        x, y = dataset(17)[index]
        return index, x, y


class Counting(IterableDataset[Any]):
    """An endless stream of samples that say their number."""

    def __iter__(self) -> Iterator[Any]:
        for number in range(10**6):
            yield number, *dataset(17)[number % 17]


Given = dict[tuple[int, str, int, int], list[int]]
"""The samples of each turn of each rank: by epoch, loader, turn and rank."""


def numbers(given: Given, loader: str, epoch: int) -> list[int]:
    """The samples of an epoch from a loader, of all ranks."""
    return [its for (at, name, *_), batch in given.items() if (at, name) == (epoch, loader) for its in batch]


class OfLoaders:
    """A loop over a loader in each epoch, and over another, or a part of a stream, in every other one. At the
    turn `stop` (epoch, turn, rank) of the first that rank is asked to stop."""

    def __init__(self, second: str) -> None:
        self.second = second
        self.given: Given = {}
        self.stop: tuple[int, int, int] | None = None

    def __call__(self, run: Any) -> np.ndarray:
        def shuffled(seed: int) -> Any:
            drawn = torch.Generator().manual_seed(seed)
            return run.loader(DataLoader(Numbered(), batch_size=2, shuffle=True, generator=drawn))

        model = run.model(network())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        run.keep(optimizer=optimizer)
        always, then = shuffled(1), shuffled(2)
        stream = run.loader(DataLoader(Counting(), batch_size=2))
        for epoch in run.epochs(5):
            passes = {"always": always}
            if epoch % 2 == 0:
                passes[self.second] = then if self.second == "then" else run.steps(3, stream)
            for name, batches in passes.items():
                for numbers, x, y in batches:
                    self.given[epoch, name, run.turn, run.rank] = numbers.tolist()
                    if name == "always" and (epoch, run.turn, run.rank) == self.stop:
                        run.world.stopping = True
                    optimizer.zero_grad()
                    F.mse_loss(model(x), y).backward()
                    optimizer.step()
        return flat(model)


def sitting(folder: RunFolder, loop: Callable[[Any], Any], *, ranks: int, resume: bool = False) -> list[Any]:
    """What a loop returns on ranks that are threads, and is written down as `rankwise run` does it."""
    start = checkpoint.newest(folder.checkpoints, print) if resume else None
    if not resume:
        folder.create()
    plan = program_plan(TrainConfig(ranks=ranks), ("loop.py",), mpi_survives=lambda: True)

    def program(world: World) -> Any:
        book = FolderBook(plan, world, folder, say=print, start=start)
        book.come_in(plan)
        try:
            result = loop(Run(plan, world, book))
            book.complete()
            return result
        finally:
            book.close()

    return run_in_threads(ranks, program)


@pytest.mark.parametrize("second", effort.daily(["then", "stream"], ["stream"]))
def test_a_save_before_a_loader_is_asked_again(tmp_path: Path, second: str) -> None:
    """A loop of a user's own that stops in an epoch, goes on and is stopped in the next one, before a second
    loader was asked again: both loaders go on in the orders of their own generators, a stream where it was,
    each sample of each epoch is given once, and the weights are those of a run that was never stopped."""
    whole, parts = OfLoaders(second), OfLoaders(second)
    expected = sitting(RunFolder(tmp_path / "whole"), whole, ranks=3)
    folder = RunFolder(tmp_path / "parts")
    for number, stop in enumerate([(1, 0, 2), (2, 1, 1), (2, 2, 0), (4, 0, 0)]):
        parts.stop = stop
        with pytest.raises(Interrupted, match=f"epoch {stop[0] + 1}"):
            sitting(folder, parts, ranks=3, resume=number > 0)
    parts.stop = None
    results = sitting(folder, parts, ranks=3, resume=True)
    assert parts.given == whole.given
    for result, its in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, its)
    for epoch in range(5):
        given = [
            n for (at, name, *_), its in parts.given.items() if (at, name) == (epoch, "always") for n in its
        ]
        assert sorted(given) == [*range(17)]
    if second == "stream":
        read = [n for (_, name, *_), its in parts.given.items() if name == "stream" for n in its]
        assert sorted(read) == [*range(3 * 3 * 2 * 3)]
    assert folder.read().samples == RunFolder(tmp_path / "whole").read().samples


@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd"])
@pytest.mark.parametrize("turn", [0, 3])
def test_a_newcomer_is_no_batch_behind(strategy: str, turn: int) -> None:
    """A rank that is killed in the first turn of an epoch, or in its last, is replaced by one that makes as
    many turns as the others from there on: none waits for it at the end, and each sample is trained once."""
    made: dict[int, list[int]] = {}

    def loop(run: Any) -> np.ndarray:
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(Numbered(), batch_size=2, shuffle=True))
        assert len(loader) in (3, 4)
        for epoch in run.epochs(3):
            for _, x, y in loader:
                if (epoch, run.turn, run.world.number) == (1, min(turn, len(loader) - 1), 1):
                    raise Killed
                if epoch == 2:
                    made.setdefault(run.world.number, []).append(run.turn)
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
        return flat(model)

    results = on_ranks(4, loop, strategy=strategy, spares=1, on_failure="continue")
    assert len(results) == 3
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    assert sorted(made) == [0, 2, 3]
    assert len({tuple(turns) for turns in made.values()}) == 1


class Drawing(torch.utils.data.Dataset[Any]):
    """What a worker draws for a sample."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        drawn = torch.rand(()).item(), np.random.rand(), random.random()  # noqa: NPY002
        return torch.tensor([index, *drawn], dtype=torch.float64)


def test_workers_that_stay_draw_as_new_ones() -> None:
    """Workers that stay from pass to pass draw in each what workers draw that begin with it, as those of a
    run that goes on do, and another thing in each pass."""

    class OfPass:
        number = 0

        def worker_seed(self) -> int:
            return self.number

    def drawn(loader: Loader[Any], number: int) -> list[Any]:
        run.number = number
        batches = [np.array([at, at + 1]) for at in range(0, 8, 2)]
        found = [loader.take(its, lambda: list(batches)).tolist() for its in batches]
        loader.leave()
        return found

    def make() -> Loader[Any]:
        its = DataLoader(Drawing(), batch_size=2, num_workers=2, persistent_workers=True)
        return Loader(cast(Run, run), its)

    run = OfPass()
    stays = make()
    passes = [drawn(stays, number) for number in (1, 2, 3)]
    stays.close()
    for number, expected in enumerate(passes, start=1):
        begins = make()
        assert drawn(begins, number) == expected
        begins.close()
    assert len({str(its) for its in passes}) == 3
    assert [row[0] for batch in passes[0] for row in batch] == [*range(8)]
