"""Loops of users' own that stop inside an epoch and go on there: each sample once, and the bits of one that
was never stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.data.turns import TurnPlan, TurnSampler
from rankwise.errors import ConfigError, Interrupted
from rankwise.program_plan import program_plan
from rankwise.runs import checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.training.folder_book import FolderBook
from rankwise.training.run import Run

from . import effort
from .user_loops import dataset, flat, network

Loop = Callable[[Run, Callable[[], None]], np.ndarray]
"""A user's loop, which says when a turn is made."""


class Numbers(IterableDataset):  # type: ignore[type-arg]
    """A stream of samples."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        return iter(dataset(12))


class Sittings:
    """Runs of a loop on ranks that are threads, which leave a folder, and stop where one of them is asked."""

    def __init__(self, folder: Path, loop: Loop, **options: Any) -> None:
        self.folder = RunFolder(folder)
        self.folder.create()
        self._loop = loop
        self._options = options
        self.said: list[str] = []

    def sit(self, ranks: int, *, stop: tuple[int, int] | None = None, **options: Any) -> list[np.ndarray]:
        """What the loop returns on each rank. Raises Interrupted if it comes to `stop`, a rank and the number
        of one of its turns in this sitting, from 1."""
        started = self.folder.record.exists()
        start = checkpoint.newest(self.folder.checkpoints, on_damage=pytest.fail) if started else None
        given = TrainConfig(**{"ranks": ranks, "threads": 1, **self._options, **options})
        plan = program_plan(given, ("loop.py",), mpi_survives=lambda: ranks > 1)

        def program(world: World) -> np.ndarray:
            made = 0

            def turn() -> None:
                nonlocal made
                made += 1
                world.asked_to_stop = world.asked_to_stop or stop == (world.rank, made)

            book = FolderBook(plan, world, self.folder, say=self.said.append, start=start)
            book.come_in(plan)
            try:
                found = self._loop(Run(plan, world, book), turn)
                book.complete()
            finally:
                book.close()
            return found

        return run_in_threads(ranks, program)

    def to_the_end(self, ranks: int, stops: list[tuple[int, int]]) -> list[np.ndarray]:
        """The same of all sittings, but the last stopped."""
        for stop in stops:
            with pytest.raises(Interrupted, match="go on with"):
                self.sit(ranks, stop=stop)
        return self.sit(ranks)

    @property
    def newest(self) -> checkpoint.Checkpoint:
        return checkpoint.newest(self.folder.checkpoints, on_damage=pytest.fail)


def told(record: Record) -> list[tuple[Any, ...]]:
    """What a record says of its epochs, but for times."""
    return [
        (row.epoch, row.train_loss, row.train_samples, row.steps, row.learning_rate, row.metrics)
        for row in record.epochs
    ]


def shuffled(run: Run, turn: Callable[[], None]) -> np.ndarray:
    """A plain loop over a DataLoader that shuffles by a generator, with momentum, a rate that goes by turns,
    an average of weights, and running means."""
    model = run.model(nn.Sequential(network(), nn.BatchNorm1d(2, dtype=torch.float64)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    run.keep(optimizer=optimizer, scheduler=scheduler, average=average)
    drawn = torch.Generator().manual_seed(5)
    loader = run.loader(DataLoader(dataset(19), batch_size=2, shuffle=True, generator=drawn))
    for _ in run.epochs(2):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            run.log(loss=loss, turn=run.turn)
            turn()
    return np.append(flat(model, average), optimizer.param_groups[0]["lr"])


def around_passes(run: Run, turn: Callable[[], None]) -> np.ndarray:
    """Two passes an epoch with means before, between and behind them, gradients that are added up over turns,
    several optimisers, and turns with data of the loop's own."""
    first, second = run.model(network(1)), run.model(network(2))
    optimizers = [torch.optim.SGD(its.parameters(), lr=0.05, momentum=0.9) for its in (first, second)]
    run.keep(one=optimizers[0], two=optimizers[1])
    loaders = []
    for samples in (9, 11):
        drawn = torch.Generator().manual_seed(samples)  # ranks that are threads share torch's own
        data = DataLoader(dataset(samples), batch_size=2, shuffle=True, generator=drawn)
        loaders.append(run.loader(data))
    x, y = dataset(6).tensors
    for epoch in run.epochs(2):
        run.log(started=run.mean(epoch))
        for model, optimizer, loader in zip((first, second), optimizers, loaders, strict=True):
            for mine, wanted in loader:
                F.mse_loss(model(mine), wanted).backward()
                if run.turn % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                run.log(loss=wanted.mean())
                turn()
            run.log(between=run.mean(optimizer.param_groups[0]["lr"]))
        for step in run.steps(3):
            optimizers[0].zero_grad()
            F.mse_loss(first(x), y + step).backward()
            optimizers[0].step()
            turn()
    return flat(first, second)


def by_steps(run: Run, turn: Callable[[], None]) -> np.ndarray:
    """A budget of steps, and no epochs, with data that a generator of the loop's own picks."""
    model = run.model(network())
    run.keep(optimizer=(optimizer := torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)))
    x, y = dataset(40).tensors
    for step in run.steps(6):
        rows = torch.randperm(40, generator=torch.Generator().manual_seed(step))[: 3 + step]
        optimizer.zero_grad()
        F.mse_loss(model(x[rows]), y[rows]).backward()
        optimizer.step()
        turn()
    return flat(model)


def turns_of(loop: Loop, ranks: int, folder: Path) -> int:
    """Turns that a rank makes in all."""
    made: list[int] = []

    def counted(run: Run, turn: Callable[[], None]) -> np.ndarray:
        return loop(run, lambda: made.append(run.rank))

    Sittings(folder, counted).sit(ranks)
    return made.count(0)


@pytest.mark.parametrize(("loop", "ranks"), effort.rotating([shuffled, around_passes, by_steps], [1, 2]))
def test_stopping_at_each_turn_changes_no_bit(tmp_path: Path, loop: Loop, ranks: int) -> None:
    """Stopped behind any turn, the first and the last of an epoch among them, and again behind the first turn
    of the next sitting, a loop ends with the bits, the metrics and the counts of one that was not."""
    whole = Sittings(tmp_path / "whole", loop)
    expected = whole.sit(ranks)
    turns = turns_of(loop, ranks, tmp_path / "counted")
    # Several ranks hear in the turn behind that one, in each of the two sittings that are stopped.
    for at in range(1, turns - 2, 1 if effort.FULL else 5):
        parts = Sittings(tmp_path / f"parts-{at}", loop)
        found = parts.to_the_end(ranks, [(ranks - 1, at), (0, 1)])
        for rank in range(ranks):
            np.testing.assert_array_equal(found[rank], expected[rank])
        assert told(parts.folder.read()) == told(whole.folder.read())
        assert parts.folder.read().samples == whole.folder.read().samples


@pytest.mark.parametrize(
    ("strategy", "compress"), effort.rotating(["allreduce", "local-sgd", "diloco"], ["none", "int8"])
)
def test_checkpoints_inside_an_epoch(tmp_path: Path, strategy: str, compress: str) -> None:
    """With `--checkpoint-every 2steps` one is written behind every second turn, or the next synchronisation,
    from which a run that ended without a word goes on, to the bit, what compression remembers included."""
    options: dict[str, Any] = {"strategy": strategy, "compress": compress, "checkpoint_every": "2steps"}
    if strategy != "allreduce":
        options["sync_every"] = 2
    whole = Sittings(tmp_path / "whole", shuffled, checkpoint_keep=99, **options)
    expected = whole.sit(2)
    names = sorted(its.name for its in checkpoint.finished(whole.folder.checkpoints))
    # Four turns an epoch, of which the last one ends it.
    parts_of = ["epoch-0000-part-0001", "epoch-0001", "epoch-0001-part-0001"]
    assert names == ["epoch-0000", *parts_of, "epoch-0002"]

    def ends(run: Run, turn: Callable[[], None]) -> np.ndarray:
        made = 0

        def fails() -> None:
            nonlocal made
            made += 1
            if made == 8:
                raise MemoryError("on purpose")

        return shuffled(run, fails)

    parts = Sittings(tmp_path / "parts", ends, **options)
    with pytest.raises(MemoryError):
        parts.sit(2)
    assert parts.newest.inside is not None
    parts._loop = shuffled
    found = parts.sit(2)
    for rank in range(2):
        np.testing.assert_array_equal(found[rank], expected[rank])
    assert told(parts.folder.read()) == told(whole.folder.read())


@pytest.mark.parametrize(
    ("before", "after", "strategy"),
    [(2, 1, "single"), (1, 2, "allreduce"), (3, 2, "allreduce"), (2, 3, "allreduce"), (2, 2, "local-sgd")],
)
def test_going_on_with_other_ranks(tmp_path: Path, before: int, after: int, strategy: str) -> None:
    """What is left of an epoch is dealt to the ranks that are there, by whatever strategy: each sample is
    trained once."""
    run = Sittings(tmp_path / "run", shuffled)
    with pytest.raises(Interrupted):
        run.sit(before, stop=(0, 2))
    found = run.sit(after, strategy=strategy)
    for other in found:
        np.testing.assert_array_equal(other, found[0])
    samples = run.folder.read().samples
    assert (samples.expected, samples.trained, samples.duplicated, samples.lost) == (38, 38, 0, 0)
    assert [row.train_samples for row in run.folder.read().epochs] == [19, 19]


LOCAL = ("local-sgd", "diloco", "slowmo", "parameter-averaging", "post-local-sgd")


@pytest.mark.parametrize(("strategy", "compress"), effort.rotating(LOCAL, ["none", "int8"], one_in=2))
def test_local_steps_that_are_stopped_in_a_round(tmp_path: Path, strategy: str, compress: str) -> None:
    """Stopped in a round of local steps, of which each rank has made some number, and once more behind the
    next turn, a loop goes on behind each rank's own turn, and ends with the bits, metrics and counts of one
    that was not."""
    options: dict[str, Any] = {"strategy": strategy, "compress": compress}
    options |= {} if strategy == "parameter-averaging" else {"sync_every": 3}
    whole = Sittings(tmp_path / "whole", shuffled, **options)
    expected = whole.sit(2)
    for at in range(1, 8) if effort.FULL else (2, 7):
        parts = Sittings(tmp_path / f"parts-{at}", shuffled, **options)
        found = parts.to_the_end(2, [(1, at), (1, 1)])
        for rank in range(2):
            np.testing.assert_array_equal(found[rank], expected[rank])
        assert told(parts.folder.read()) == told(whole.folder.read())
        assert parts.folder.read().samples == whole.folder.read().samples


@pytest.mark.parametrize(
    ("after", "strategy"), [(1, "single"), (2, "local-sgd"), (3, "local-sgd"), (2, "allreduce")]
)
def test_a_round_that_others_end(tmp_path: Path, after: int, strategy: str) -> None:
    """What is left of a round of local steps, and of its epoch, is dealt to the ranks that are there: each
    sample is trained once."""
    run = Sittings(tmp_path / "run", with_data(29, 2), strategy="local-sgd", sync_every=4)
    with pytest.raises(Interrupted, match=r"stopped in epoch 1; go on with"):
        run.sit(2, stop=(1, 2))
    assert run.newest.inside is not None
    run.sit(after, strategy=strategy, sync_every=4 if strategy == "local-sgd" else None)
    samples = run.folder.read().samples
    assert (samples.expected, samples.trained, samples.duplicated, samples.lost) == (29, 29, 0, 0)


def test_a_loop_that_is_left_as_the_run_stops(tmp_path: Path) -> None:
    """A run that is stopped where its loop is left by `break`, in a round of local steps, says that it cannot
    go on there, and goes on from its last checkpoint to what it would have been."""

    def leaves(run: Run, turn: Callable[[], None]) -> np.ndarray:
        model = run.model(network())
        run.keep(optimizer=(optimizer := torch.optim.SGD(model.parameters(), lr=0.05)))
        loader = run.loader(DataLoader(dataset(19), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                turn()
                if run.turn == 1:
                    break
        return flat(model)

    options: dict[str, Any] = {"strategy": "local-sgd", "sync_every": 4}
    expected = Sittings(tmp_path / "whole", leaves, **options).sit(2)
    run = Sittings(tmp_path / "run", leaves, **options)
    with pytest.raises(Interrupted, match="behind a loop that was left"):
        run.sit(2, stop=(1, 2))
    found = run.sit(2)
    for rank in range(2):
        np.testing.assert_array_equal(found[rank], expected[rank])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_is_begun_anew(tmp_path: Path, ranks: int) -> None:
    """In a stream no checkpoint is written by steps, of which one line tells, and a run that is stopped there
    says so, goes on from the epoch's beginning, and trains each sample once."""

    def streams(run: Run, turn: Callable[[], None]) -> np.ndarray:
        model = run.model(network())
        run.keep(optimizer=(optimizer := torch.optim.SGD(model.parameters(), lr=0.05)))
        loader = run.loader(DataLoader(Numbers(), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                turn()
        return flat(model)

    expected = Sittings(tmp_path / "whole", streams).sit(ranks)
    run = Sittings(tmp_path / "run", streams, checkpoint_every="1steps")
    with pytest.raises(Interrupted, match="in a stream"):
        run.sit(ranks, stop=(0, 2))
    assert run.said == [
        "--checkpoint-every 1steps writes none inside of epoch 1, as no run could go on from "
        "the middle of a stream"
    ]
    assert run.newest.inside is None
    np.testing.assert_array_equal(run.sit(ranks)[0], expected[0])
    samples = run.folder.read().samples
    assert (samples.expected, samples.trained, samples.duplicated, samples.lost) == (24, 24, 0, 0)


def test_ranks_that_are_rounds_apart_save_epochs() -> None:
    """The ranks of gossip meet at the end of epochs only, and other units are refused."""
    given = TrainConfig(ranks=2, strategy="gossip", checkpoint_every="5steps")
    with pytest.raises(
        ConfigError, match=r"--checkpoint-every 5steps was given, but .* gossip meet at the end"
    ):
        program_plan(given, ("loop.py",), mpi_survives=lambda: True)


def with_data(samples: int, batch: int) -> Loop:
    def loop(run: Run, turn: Callable[[], None]) -> np.ndarray:
        model = run.model(network())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(samples), batch_size=batch))
        for _ in run.epochs(1):
            for x, y in loader:
                optimizer.zero_grad()
                F.mse_loss(model(x), y).backward()
                optimizer.step()
                turn()
        return flat(model)

    return loop


@pytest.mark.parametrize(("samples", "batch", "line"), [(9, 2, "of 9 samples"), (12, 3, "batches of 3")])
def test_another_loop_is_refused(tmp_path: Path, samples: int, batch: int, line: str) -> None:
    """A program that loops over other data, or in other batches, than where the run was stopped is refused in
    one line that says both."""
    run = Sittings(tmp_path / "run", with_data(12, 2))
    with pytest.raises(Interrupted):
        run.sit(1, stop=(0, 2))
    run._loop = with_data(samples, batch)
    with pytest.raises(ConfigError, match=f"loop over a dataset of 12 samples in batches of 2, .*{line}"):
        run.sit(1)


def test_a_loop_that_is_not_come_to_is_refused(tmp_path: Path) -> None:
    """A program that ends its epoch without the loop in which the run was stopped is refused: samples would
    be left out without a word."""

    def without(run: Run, turn: Callable[[], None]) -> np.ndarray:
        model = run.model(network())
        run.keep(optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
        run.loader(DataLoader(dataset(12), batch_size=2))
        for _ in run.epochs(1):
            pass
        return flat(model)

    run = Sittings(tmp_path / "run", with_data(12, 2))
    with pytest.raises(Interrupted):
        run.sit(1, stop=(0, 2))
    run._loop = without
    with pytest.raises(ConfigError, match="and the program ends the epoch"):
        run.sit(1)


@pytest.mark.parametrize("batches", [None, [3, 1, 4, 2]])
def test_plans_as_arrays(batches: list[int] | None) -> None:
    """The plan of an epoch that a checkpoint keeps is the one that was made, also after a rank was lost."""
    sampler = TurnSampler(rank=0, ranks=3, sync_every=lambda _: 2)
    sizes = None if batches is None else np.array(batches)
    sampler.begin(1, 10, batch_size=1 if batches else 2, batches=sizes)
    for lost in (False, True):
        if lost:
            sampler.redistribute(1, 1, [0, 2], [0, 0])
        plan = sampler.plan(1)
        made = np.arange(2 if lost else 3)
        again = TurnPlan.of_arrays(plan.arrays(0, made, made), 1)
        assert again.rounds[0].made == tuple(made)
        assert not any(any(its.made) for its in again.rounds[1:])
        assert again.batch_sizes == plan.batch_sizes
        assert (again.usual_batch, again.least, again.drawn) == (plan.usual_batch, plan.least, plan.drawn)
        np.testing.assert_array_equal(again.credited, plan.credited)
        assert (again.ends is None) == (plan.ends is None)
        for one, other in zip(again.rounds, plan.rounds, strict=True):
            assert one.over == other.over
            for row, its in zip((one.kept, *one.turns), (other.kept, *other.turns), strict=True):
                for part, expected in zip(row, its, strict=True):
                    np.testing.assert_array_equal(part, expected)
