"""Runs that stop inside an epoch and go on at the very step: each sample once, and the bits of a run that was
never stopped."""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import nn

from rankwise import strategies
from rankwise.comm import World
from rankwise.config import TrainConfig
from rankwise.data.partition import without
from rankwise.errors import ConfigError, Interrupted, ResumeError
from rankwise.plan import RunPlan, resolve
from rankwise.runs import checkpoint
from rankwise.runs.cadence import Every, parse_every
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.training.cadence import Cadence
from rankwise.training.synchroniser import Synchroniser

from . import effort, tiny
from .conftest import Command, read_weights

Make = Callable[..., RunPlan]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]

MEETING = [
    (name, topology)
    for name, entry in strategies.STRATEGIES.items()
    if name not in ("ddp", "easgd", "downpour")
    for topology in entry.topologies or (None,)
]
"""Deterministic strategies, whose ranks can be threads, by their topologies."""

FOLDERS = itertools.count()
"""Hypothesis makes several runs in one test's folder."""


def normed(
    image_shape: tuple[int, int, int] = (1, tiny.SIDE, tiny.SIDE), classes: int = tiny.CLASSES
) -> nn.Module:
    """A network with buffers, in which ranks differ within an epoch."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(image_shape), 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Linear(12, classes),
    )


@contextmanager
def stopping(rank: int, step: int) -> Iterator[None]:
    """While inside, this rank is asked to stop as it makes this step of a sitting, from 1."""
    real, made = Synchroniser.step, {}

    def count(self: Synchroniser) -> None:
        made[id(self)] = made.get(id(self), 0) + 1
        if self.world.rank == rank and made[id(self)] == step:
            self.world.stopping = True
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Synchroniser, "step", count)
        yield


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether all tensors have the same bits."""
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def told(record: Record) -> list[tuple[Any, ...]]:
    """What a record says of its epochs, but for times."""
    return [
        (row.epoch, row.train_loss, row.val_loss, row.train_samples, row.learning_rate)
        for row in record.epochs
    ]


def in_sittings(
    train: Train, plan: RunPlan, stops: list[tuple[int, int]], folder: str
) -> tuple[Record, RunFolder, dict[str, Any]]:
    """A run that is stopped again and again, by these ranks at these steps of its sittings."""
    resume = False
    for rank, step in stops:
        try:
            with stopping(rank, step):
                return train(plan, folder=folder, resume=resume)
        except Interrupted:
            resume = True
    return train(plan, folder=folder, resume=True)


@pytest.mark.timeout(900)
@given(data=st.data())
@effort.examples(4, 100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stopping_changes_no_bit(config: Make, train_in_threads: Train, data: st.DataObject) -> None:
    """Stopped at any steps, twice in one epoch too, a run ends with the bits, the losses and the counts of
    one that was not: weights, buffers, optimisers, compression's memory, averages and schedules included."""
    name, topology = data.draw(st.sampled_from(MEETING), "strategy")
    ranks = 1 if name == "single" else 3
    sends = strategies.STRATEGIES[name].strategy.sends_gradients
    compresses = ranks > 1 and strategies.STRATEGIES[name].takes("compress")
    options = {
        "strategy": name,
        "topology": topology,
        "ranks": ranks,
        "optimizer_state": data.draw(st.sampled_from(["keep", "average", "reset"])) if not sends else "keep",
        "optimizer": data.draw(st.sampled_from(["sgd", "adam"]), "optimiser"),
        "model": data.draw(st.sampled_from([tiny.MODEL, f"{__name__}:normed"]), "model"),
        "schedule": "cosine",
        "sync_every": data.draw(st.sampled_from([None, 2]), "sync every") if compresses else None,
        "averaged_weights": "ema" if name in ("allreduce", "local-sgd") else "none",
        "flip": "random",
        "epochs": 2,
    }
    if compresses and options["optimizer_state"] != "average":
        options["compress"] = data.draw(st.sampled_from(["none", "int8", "powersgd:2"]), "compress")
    if not strategies.STRATEGIES[name].takes("optimizer_state"):
        options.pop("optimizer_state")
    first_worker = int(topology == "master")
    stops = data.draw(
        st.lists(st.tuples(st.integers(first_worker, ranks - 1), st.integers(1, 6)), min_size=1, max_size=3),
        "stops",
    )
    place = f"{next(FOLDERS)}"
    whole, _, weights = train_in_threads(config(**options), folder=f"whole-{place}")
    parts, _, its = in_sittings(train_in_threads, config(**options), stops, f"parts-{place}")
    assert same(weights, its)
    assert told(parts) == told(whole)
    assert parts.samples == whole.samples


def test_an_epoch_whose_steps_were_all_made_has_their_rate(config: Make, train_in_threads: Train) -> None:
    """A run that was stopped behind the last step of an epoch tells that step's rate of it, though no step
    was left for the sitting that closed it."""
    options = {
        "ranks": 3,
        "strategy": "two-level",
        "topology": "allreduce",
        "epochs": 2,
        "schedule": "cosine",
    }
    whole, _, weights = train_in_threads(config(**options), folder="whole")
    parts, _, its = in_sittings(train_in_threads, config(**options), [(0, 1)], "parts")
    assert parts.resumed_from_epoch == 0
    assert same(weights, its)
    assert told(parts) == told(whole)


@pytest.mark.parametrize(
    "strategy", effort.daily(["allreduce", "local-sgd", "parameter-averaging"], ["allreduce", "local-sgd"])
)
def test_every_step_of_an_epoch(config: Make, train_in_threads: Train, strategy: str) -> None:
    """A run that is stopped at each of its steps, the first and the last of an epoch among them, makes every
    epoch once, and ends with the bits of one that was not. Checkpoints go by numbers that only grow."""
    options = {"ranks": 2, "strategy": strategy, "topology": "allreduce", "epochs": 2, "batch_size": 50}
    whole, _, weights = train_in_threads(config(**options), folder="whole")
    # One that is stopped while it learns of the last stop's step makes none: it goes on by one each time.
    parts, folder, its = in_sittings(train_in_threads, config(**options), [(1, 1)] * 4, "parts")
    assert same(weights, its)
    assert told(parts) == told(whole)
    assert parts.samples == whole.samples
    assert parts.resumed_from_epoch == 1
    names = [path.name for path in checkpoint.finished(folder.checkpoints)]
    assert names == ["epoch-0002", "epoch-0001-part-0002"]


@pytest.mark.parametrize(
    ("strategy", "before", "after"),
    effort.daily(
        [
            (name, before, after)
            for name in ("easgd", "local-sgd", "allreduce", "replication", "gossip", "two-level", "slowmo")
            for before, after in [(3, 2), (2, 3), (3, 1), (1, 3), (3, 3)]
        ],
        [("easgd", 3, 3), ("local-sgd", 3, 2), ("allreduce", 1, 3), ("gossip", 2, 3), ("replication", 3, 1)],
    ),
)
def test_going_on_with_other_ranks(
    config: Make, train_in_threads: Train, strategy: str, before: int, after: int
) -> None:
    """What is left of an epoch is dealt to the ranks that are there, by whatever strategy: each sample is
    trained once, in this epoch and in the next."""

    def plan(ranks: int) -> RunPlan:
        return config(ranks=ranks, lr=0.005, **({"strategy": strategy} if ranks > 1 else {}))

    with pytest.raises(Interrupted), stopping(before - 1, 2):
        train_in_threads(plan(before))
    record, _, _ = train_in_threads(plan(after), resume=True)
    assert [row.epoch for row in record.epochs] == [1, 2]
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert record.samples.trained == record.samples.expected
    if strategy != "replication":
        assert [row.train_samples for row in record.epochs] == [tiny.TRAIN, tiny.TRAIN]


def test_checkpoints_inside_an_epoch(
    config: Make, train_in_threads: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `--checkpoint-every 2steps` one is written behind every second step, from which a run that ended
    without a word goes on, to the bit."""
    options = {
        "ranks": 2,
        "strategy": "allreduce",
        "epochs": 2,
        "checkpoint_every": "2steps",
        "checkpoint_keep": 99,
    }
    whole, folder, weights = train_in_threads(config(**options), folder="whole")
    names = [path.name for path in reversed(checkpoint.finished(folder.checkpoints))]
    # Seven steps an epoch: after 2, 4 and 6 of the first, and 1, 3 and 5 of the second.
    assert names == [
        "epoch-0000",
        *(f"epoch-0000-part-000{n}" for n in (1, 2, 3)),
        *(f"epoch-0001-part-000{n}" for n in (1, 2, 3)),
        "epoch-0002",
    ]
    real, made = Synchroniser.step, []

    def fails(self: Synchroniser) -> None:
        made.append(1)
        if len(made) > 2 * 5:
            raise MemoryError("on purpose")
        real(self)

    monkeypatch.setattr(Synchroniser, "step", fails)
    with pytest.raises(MemoryError):
        train_in_threads(config(**options), folder="parts")
    monkeypatch.setattr(Synchroniser, "step", real)
    parts, _, its = train_in_threads(config(**options), folder="parts", resume=True)
    assert same(weights, its)
    assert told(parts) == told(whole)
    assert parts.samples == whole.samples


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_lost_ranks_samples_stay_dealt(
    config: Make, train_in_threads: Train, tmp_path: Path, ranks: int
) -> None:
    """A run that has lost a rank, and is stopped in the same epoch, goes on with those that are left, or with
    as many as it had: each sample once, those that the lost rank had brought in too."""
    options = {
        "strategy": "local-sgd",
        "topology": "allreduce",
        "on_failure": "continue",
        "sync_every": 2,
        "batch_size": 8,
    }
    with pytest.raises(Interrupted), stopping(0, 6):
        train_in_threads(config(ranks=3, **options, fault=("kill:rank=2,epoch=1,step=4",)))
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints", print)
    assert saved.inside is not None
    assert saved.inside["ranks"] == 2
    record, _, _ = train_in_threads(config(ranks=ranks, **options), resume=True)
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert record.samples.trained == record.samples.expected == 2 * tiny.TRAIN


def test_other_samples_are_refused(
    config: Make, train_in_threads: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of a dataset that has other images under its name now is refused, and so is one from
    inside an epoch of other samples of it, in one line that says what to do."""
    with pytest.raises(Interrupted), stopping(0, 2):
        train_in_threads(config())
    with pytest.raises(
        ResumeError, match="200 training samples, and these are 100 or others: leave --train-limit"
    ):
        train_in_threads(config(train_limit=100), resume=True)
    monkeypatch.setattr("rankwise.training.rank.fingerprint", lambda split: "another")
    with pytest.raises(ResumeError, match=r"trained on other samples than tests\.tiny:images has now"):
        train_in_threads(config(), resume=True)


def test_a_place_that_is_damaged_or_does_not_fit_is_refused(
    config: Make, train_in_threads: Train, tmp_path: Path
) -> None:
    """If what a rank had of its own does not fit, one line says so; nothing goes on from half of it."""
    with pytest.raises(Interrupted), stopping(1, 2):
        train_in_threads(config(ranks=2, topology="allreduce"))
    saved = checkpoint.newest(tmp_path / "run" / "checkpoints", print)
    place = saved.path / checkpoint.place_file(1)
    place.write_bytes(place.read_bytes()[:-8])
    said: list[str] = []
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", said.append).inside is None
    assert place.name in said[0]
    with pytest.raises(ResumeError, match=f"{place.name} cannot be read"):
        saved.place_of(1)


@given(samples=st.lists(st.integers(0, 6), max_size=12), data=st.data())
@effort.examples(20, 200)
def test_what_is_left(samples: list[int], data: st.DataObject) -> None:
    """What is taken out of samples is taken as often as it is given, from the front, and the rest keeps its
    order."""
    taken = data.draw(st.lists(st.sampled_from(samples), max_size=3)) if samples else []
    expected, budget = [], {its: taken.count(its) for its in taken}
    for its in samples:
        if budget.get(its, 0):
            budget[its] -= 1
        else:
            expected.append(its)
    found = without(np.array(samples, np.int64), np.array(taken, np.int64))
    assert found.tolist() == expected


def test_how_often() -> None:
    """A bare number counts epochs, and units are epochs, steps and seconds; whatever else is given is refused
    in one line that says what is expected, and so are units where ranks do not meet."""
    given = {"2": (2, "epochs"), "1epoch": (1, "epochs"), "500steps": (500, "steps"), "60s": (60, "s")}
    assert {text: (its.count, its.unit) for text in given for its in [parse_every(text)]} == given
    assert resolve(TrainConfig(checkpoint_every="3")).checkpoint_every == 3
    for wrong in ("0", "0steps", "-1", "2.5", "60sec", "5min", "s", "", "steps", "1e3", "²"):
        with pytest.raises(ConfigError, match=r"--checkpoint-every .* was given, expected"):
            resolve(TrainConfig(checkpoint_every=wrong))
    with pytest.raises(ConfigError, match="easgd meet at the end of epochs only: give a number of epochs"):
        resolve(TrainConfig(ranks=3, strategy="easgd", checkpoint_every="5s"))


@given(paces=st.lists(st.floats(0.01, 3.0), min_size=40, max_size=40))
@effort.examples(20, 200)
def test_seconds_by_one_clock(paces: list[float]) -> None:
    """Ranks agree on the commit behind which a checkpoint is due, though only rank 0 has the time, and none
    is due early."""
    now, heard = [0.0], [0]

    class Two:
        """Of two ranks, which ask one after the other."""

        size = 2

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def broadcast(self, numbers: Any) -> None:
            if self.rank == 0:
                heard[0] = int(numbers[0])
            numbers[0] = heard[0]

    ranks = [Cadence(Every(10, "s"), cast(World, Two(rank)), lambda: now[0]) for rank in range(2)]
    ranks[1]._clock = lambda: 0.0
    first, second = [], []
    for number, pace in enumerate(paces):
        now[0] += pace
        for due, cadence in zip((first, second), ranks, strict=True):
            if cadence.is_due(1, number):
                due.append(number)
    assert first == second
    times = np.concatenate([[0.0], np.cumsum(paces)[first]])
    assert (np.diff(times) >= 10).all()


class Drawing(nn.Module):
    """Draws from all generators as it trains, and asks its rank to stop at the forward pass that STOP_AT
    says."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(image_shape), classes), nn.Dropout(0.3))
        self.register_buffer("passes", torch.zeros(1, dtype=torch.int64))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.body(images)
        if not self.training:
            return scores
        me = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK", "0"))
        if not self.passes:
            random.seed(int(me))
            np.random.seed(int(me))  # noqa: NPY002
        self.passes += 1
        rank, passes, name = os.environ.get("STOP_AT", "-1,0,SIGTERM").split(",")
        if (me, int(self.passes)) == (rank, int(passes)):
            signal.raise_signal(getattr(signal, name))
        return scores * (1 + random.random() + np.random.rand())  # noqa: NPY002


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("strategy", "name"),
    effort.daily(
        [("local-sgd", "SIGHUP"), ("allreduce", "SIGTERM"), ("ddp", "SIGINT")], [("local-sgd", "SIGHUP")]
    ),
)
def test_generators_go_on(command: Command, tmp_path: Path, strategy: str, name: str) -> None:
    """Dropout, numpy and Python's random draw on where they were: a run of processes that a signal to one
    rank stops in an epoch ends with the bits of one that was not stopped."""
    words = [*tiny.WORDS[:2], "--model", f"{__name__}:Drawing", "--ranks", "2", "--strategy", strategy]
    whole = command.rankwise("train", *words, "--epochs", "3", "--out", "whole")
    assert whole.code == 0, whole
    stop = command.rankwise("train", *words, "--epochs", "3", "--out", "run", STOP_AT=f"1,9,{name}")
    assert stop.code == 130, stop
    assert len(stop.told) == 1, stop
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", print).inside is not None
    done = command.rankwise("train", "--resume", "run")
    assert done.code == 0, done
    assert same(*(read_weights(RunFolder(tmp_path / name)) for name in ("whole", "run")))
    assert told(RunFolder(tmp_path / "run").read()) == told(RunFolder(tmp_path / "whole").read())
