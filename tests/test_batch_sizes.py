"""Batches by the speed of workers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankwise.training.batch_sizes as balancing
from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.data import prepare
from rankwise.errors import ConfigError
from rankwise.launch.hosts import fit
from rankwise.models.optimizers import make_optimizer
from rankwise.models.replica import Replica
from rankwise.plan import make_plan, resolve
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system.hosts import Host
from rankwise.training.batch_sizes import choose_batch_sizes, sizes_by_speed
from rankwise.training.build import synchronise
from rankwise.training.rank import run

from . import tiny

NORMS = "tests.test_training:BatchNormNet"
"""A network that has buffers too."""

PAIRS = "tests.test_modules:rows"
"""A network that cannot train on one sample."""


@given(st.integers(1, 100), st.lists(st.floats(1e-4, 10), min_size=1, max_size=8))
def test_batches_are_in_proportion_to_speed(batch_size: int, step_s: list[float]) -> None:
    """Their sum is that of equal ones, nobody has none, and a faster worker never has less."""
    sizes = sizes_by_speed(batch_size, step_s)
    assert sum(sizes) == batch_size * len(step_s)
    assert min(sizes) >= 1
    for one, other in zip(range(len(sizes)), range(1, len(sizes)), strict=False):
        if step_s[one] < step_s[other]:
            assert sizes[one] >= sizes[other] - (sizes[other] == 1)


@given(st.integers(2, 100), st.lists(st.floats(1e-4, 10), min_size=1, max_size=8))
def test_no_speed_makes_a_batch_of_one_where_pairs_are_needed(batch_size: int, step_s: list[float]) -> None:
    """The slowest worker has two samples then, and the sum is that of equal batches."""
    sizes = sizes_by_speed(batch_size, step_s, least=2)
    assert sum(sizes) == batch_size * len(step_s)
    assert min(sizes) >= 2


def test_noise_does_not_unbalance() -> None:
    """Workers that are nearly equally fast get equal batches; one that is three times as slow a third."""
    assert sizes_by_speed(16, [0.010, 0.0105]) == [16, 16]
    assert sizes_by_speed(16, [0.010, 0.030]) == [24, 8]


@given(st.integers(50, 200), st.integers(2, 5), st.data())
def test_what_is_noise_and_what_is_not(batch_size: int, workers: int, data: st.DataObject) -> None:
    """Up to a tenth apart workers get equal batches, however large; from more than that on each gets
    its exact part by speed, but for less than one sample."""
    near = data.draw(st.lists(st.floats(1, 1.0999), min_size=workers, max_size=workers))
    assert sizes_by_speed(batch_size, near) == [batch_size] * workers
    step_s = [1.0, data.draw(st.floats(1.1001, 4)), *near[2:]]
    speeds = 1 / np.array(step_s)
    exact = batch_size * workers * speeds / speeds.sum()
    assert np.abs(sizes_by_speed(batch_size, step_s) - exact).max() < 1
    assert sizes_by_speed(3 * batch_size, [1, 2]) == [4 * batch_size, 2 * batch_size]


@pytest.mark.parametrize("master", [False, True])
def test_one_line_tells_what_was_measured(monkeypatch: pytest.MonkeyPatch, master: bool) -> None:
    """The steps of the fastest and the slowest worker in milliseconds, and the batches that come of them; a
    master measures nothing."""
    plan = resolve(
        TrainConfig(
            dataset=tiny.DATASET,
            balance="measured",
            batch_size=30,
            ranks=3 if master else 2,
            strategy="easgd" if master else "allreduce",
        )
    )
    speeds = iter([0.0125, 0.025])
    monkeypatch.setattr(balancing, "_step_s", lambda *_: next(speeds))
    lines: list[str] = []

    def program(world: World) -> tuple[int, ...]:
        replica: Any = SimpleNamespace(needs_pairs=False)
        return choose_batch_sizes(plan, replica, world, image_shape=(1, 8, 8), classes=10, say=lines.append)

    for sizes in run_in_threads(plan.ranks, program):
        assert sorted(sizes) == [20, 40]
        batches = ", ".join(map(str, sizes))
        assert lines[0] == f"a step of 30 samples takes 12.5 to 25 ms: batches of {batches}"
    assert len({*lines}) == 1


def test_a_loop_of_ones_own_says_its_batches() -> None:
    """It takes batches, but nobody can measure for it."""

    def program(world: World) -> list[int]:
        import torch

        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loop = synchronise(model, optimizer, world, samples=32, balance="6,2", strategy="allreduce")
        with pytest.raises(ConfigError, match="give your loop the batches"):
            synchronise(model, optimizer, world, samples=32, balance="measured", strategy="allreduce")
        return [len(batch) for batch in loop.sampler.batches(1)]

    assert run_in_threads(2, program) == [[6] * 4, [2] * 4]


def trained(tmp_path: Path, ranks: int, **options: object) -> Record:
    always = {"dataset": tiny.DATASET, "model": tiny.MODEL, "ranks": ranks, "epochs": 2, "lr": 0.02}
    plan = make_plan(TrainConfig(**always | options))
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.begin()

    def program(world: World) -> Record:
        return run(plan, world, folder, say=lambda line: None)

    return run_in_threads(ranks, program)[0]


@pytest.mark.parametrize("strategy", ["parameter-averaging", "local-sgd", "allreduce", "easgd"])
def test_workers_that_are_not_equally_fast(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, strategy: str
) -> None:
    """With measured speeds of three to one the batches are so, all samples are trained once, and the record
    says what was in force, so that a resumed run does the same."""
    speeds = iter([0.03, 0.01, 0.02])
    monkeypatch.setattr(balancing, "_step_s", lambda *_: next(speeds))
    topology = "master" if strategy == "easgd" else "allreduce"
    ranks = 4 if topology == "master" else 3
    record = trained(tmp_path, ranks, strategy=strategy, topology=topology, balance="measured")
    sizes = [int(word) for word in record.config["balance"].split(",")]
    assert sorted(sizes) == sorted(sizes_by_speed(16, [0.03, 0.01, 0.02]))
    assert resolve(TrainConfig(**record.config)).batch_sizes == tuple(sizes)
    assert record.samples.trained == record.samples.expected > 0
    assert record.samples.lost == record.samples.duplicated == 0


@pytest.mark.parametrize("samples", [200, 20])
def test_a_slow_worker_gets_no_batch_of_one_where_pairs_are_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, samples: int
) -> None:
    """However slow a worker is: a network that cannot train on one sample is trained with measured batches,
    few samples as well."""
    speeds = iter([0.001, 1.0])
    monkeypatch.setattr(balancing, "_step_s", lambda *_: next(speeds))
    options = {"model": PAIRS, "strategy": "allreduce", "train_limit": samples}
    record = trained(tmp_path, 2, balance="measured", **options)
    assert sorted(record.config["balance"].split(",")) == ["2", "30"]
    assert record.samples.trained == record.samples.expected == 2 * samples


def test_batches_of_one_that_are_given_are_refused_where_pairs_are_needed(tmp_path: Path) -> None:
    """The line names the option that asks for them, before training."""
    told = (
        "^--balance 31,1 makes a batch of one of the 200 training samples, .* give each worker a batch of 2"
    )
    with pytest.raises(ConfigError, match=told):
        trained(tmp_path, 2, model=PAIRS, strategy="allreduce", balance="31,1")


def test_batches_that_shrink_stay_pairs(tmp_path: Path) -> None:
    """A batch of two does not become one of one where newcomers take places and the global batch stays."""
    from rankwise.data.sampler import Sampler

    sampler = Sampler(
        lambda epoch, shares: [np.arange(96) for _ in shares],
        rank=2,
        first_worker=0,
        batch_sizes=[2, 2, 2, 90],
        sync_every=lambda epoch: 1,
        keeps_global_batch=True,
        needs_pairs=True,
    )
    sampler.redistribute(1, 0, [None, None, 2, 3], [0] * 4)
    assert min(sampler.plan(1).batch_sizes) == 2


def test_measuring_leaves_the_replica_as_it_is() -> None:
    """Weights, buffers and gradients; and workers that are alike get equal batches or the sum of them."""
    options: dict[str, Any] = {"ranks": 2, "strategy": "allreduce", "balance": "measured"}
    plan = resolve(TrainConfig(dataset=tiny.DATASET, model=NORMS, **options))
    dataset = prepare(tiny.DATASET)

    def program(world: World) -> tuple[int, ...]:
        import torch

        from rankwise import models

        model = models.build(NORMS, dataset.image_shape, len(dataset.classes))
        replica = Replica(model, make_optimizer(plan, model))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        settled = choose_batch_sizes(
            plan, replica, world, image_shape=dataset.image_shape, classes=10, say=lambda line: None
        )
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        return settled

    settled = run_in_threads(2, program)
    assert settled[0] == settled[1]
    assert sum(settled[0]) == 2 * plan.batch_size


def test_fewer_hosts_are_measured_anew() -> None:
    """Batches for ranks that are gone mean nothing to those that are left."""
    options: dict[str, Any] = {"hosts": "a:1,b:1,c:1", "topology": "allreduce"}
    plan = resolve(TrainConfig(**options, balance="8,4,4"))
    assert fit(plan, [Host("a", 1), Host("b", 1)]).balance == "measured"
    assert fit(resolve(TrainConfig(**options)), [Host("a", 1)]).balance == "none"


@given(st.lists(st.integers(1, 40), min_size=2, max_size=5), st.integers(0, 9))
def test_what_lost_workers_had_is_dealt_by_speed(sizes: list[int], number: int) -> None:
    """The others have as equal numbers of batches as before, and every sample is there once."""
    from rankwise.data.partition import Shards, deal
    from rankwise.data.sampler import Sampler

    samples = 60 * len(sizes)
    labels = np.zeros(samples, np.int64)
    sampler = Sampler(
        lambda epoch, shares: deal(Shards("redealt"), labels=labels, shares=shares, epoch=epoch, seed=1),
        rank=0,
        first_worker=0,
        batch_sizes=sizes,
        sync_every=lambda epoch: None,
    )
    left = [rank for rank in range(len(sizes)) if rank != 1 + number % (len(sizes) - 1)]
    sampler.redistribute(1, 0, left, [0] * len(left))
    (round_,) = sampler.rounds(1)
    assert sorted(np.concatenate(round_.parts).tolist()) == list(range(samples))
    turns = [len(part) / sizes[rank] for part, rank in zip(round_.parts, left, strict=True)]
    slack = sum(1 / sizes[rank] for rank in left)
    assert max(turns) - min(turns) <= slack + 1e-9
