"""Strategies against oracles, on ranks that are threads."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankwise import synchronise
from rankwise.comm import World, run_in_threads, solo_world
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, Interrupted, OutOfStepError, RankLost
from rankwise.strategies.base import State
from rankwise.strategies.exchange import PlainSum
from rankwise.training.options import LoopOptions

from .. import effort
from ..matrix.cells import Cell, run
from ..matrix.ways import WAYS, averaging
from .loops import FEATURES, LABELS, SAMPLES, assert_alike, make, step_on, train, train_all

TEAMS = [("allreduce", 1), *((topology, n) for topology in ("master", "allreduce") for n in (2, 3, 5))]
"""A master alone has nobody to train and is refused: see test_config."""


@pytest.mark.parametrize(
    ("topology", "ranks", "optimizer_state", "strategy"),
    effort.rotating(TEAMS, ["keep", "average", "reset"], ["parameter-averaging", "replication"]),
)
def test_averaging_is_written_out(
    monkeypatch: pytest.MonkeyPatch, topology: str, optimizer_state: str, strategy: str, ranks: int
) -> None:
    """After six epochs of ragged shards all ranks hold the mean, by samples, of plain loops on each shard,
    whatever becomes of the momentum."""
    way = averaging(strategy, None, master=topology == "master", state=optimizer_state)
    monkeypatch.setitem(WAYS, "this", way)
    found = run(Cell("mlp", "SGD with momentum", "this", "ragged", ranks))
    assert found.verdict == "equal", found


@pytest.mark.parametrize("topology", ["master", "allreduce"])
def test_averaging_over_one_worker_is_single(topology: str) -> None:
    """One worker's average is itself: the same bits as training alone."""
    alone = train(solo_world(), strategy="single")
    size = 2 if topology == "master" else 1
    options = {"strategy": "parameter-averaging", "topology": topology}
    together = train_all(size, **options)[-1]
    assert np.array_equal(alone.weights, together.weights)
    assert np.array_equal(alone.momentum, together.momentum)


@pytest.mark.parametrize("optimizer_state", ["keep", "average", "reset"])
@pytest.mark.parametrize("ranks", [2, 3, 5])  # a master alone has nobody to train
def test_the_stopwatch_changes_nothing(optimizer_state: str, ranks: int) -> None:
    """The paper's exchange with its author's stopwatch ends with the bits of the master's average, and each
    rank's stopwatch has run, for less than the rank was there."""
    options = {"topology": "master", "optimizer_state": optimizer_state}
    plain = train_all(ranks, strategy="parameter-averaging", **options)
    timed = train_all(ranks, strategy="paper-stopwatch", **options)
    for one, other in zip(timed, plain, strict=True):
        assert np.array_equal(one.weights, other.weights)
        assert np.array_equal(one.momentum, other.momentum)
        wall_s = one.ranks.world.ledger.close().wall_ns / 1e9
        assert 0 < one.ranks.state.measured["author_communication_s"] < wall_s


@pytest.mark.parametrize("sync_every", [1, 3, 7, 100])
@pytest.mark.parametrize(("topology", "ranks"), TEAMS)
def test_rounds_commit_every_sample(sync_every: int, topology: str, ranks: int) -> None:
    """However long a round, all ranks take part in all, and each sample is committed once an epoch."""
    options = {"topology": topology, "sync_every": sync_every, "strategy": "parameter-averaging"}
    results = train_all(ranks, epochs=3, **options)
    states = [result.ranks.state for result in results]
    assert sum(state.committed for state in states) == 3 * SAMPLES
    assert all(state.pending == 0 for state in states)
    assert len({state.rounds for state in states}) == 1
    assert_alike(results)


@pytest.mark.parametrize("topology", ["master", "allreduce"])
def test_what_is_added_up(topology: str, ranks: int) -> None:
    """Both topologies add up; one whose weight is 0 has no say, not even NaN with a master; a raised flag
    reaches everybody."""
    rng = np.random.default_rng(ranks)
    rows = rng.normal(size=(ranks, 33)).astype(np.float32)
    weights = np.ones(ranks)
    if topology == "master" and ranks > 1:
        rows[0], weights[0] = np.nan, 0

    def program(world: World, flag: int) -> tuple[np.ndarray, bool]:
        flat = np.append(rows[world.rank], np.float32(flag and world.rank == world.size - 1))
        stops, _ = PlainSum(topology)(flat, weights, world, State())
        return flat, stops

    for flat, stops in run_in_threads(ranks, lambda world: program(world, 0)):
        assert np.allclose(flat[:-1], rows[weights > 0].sum(axis=0), atol=1e-5)
        assert not stops
    assert all(stops for _, stops in run_in_threads(ranks, lambda world: program(world, 1)))


def test_one_rank_that_stops_stops_all(ranks: int) -> None:
    """If one rank is told to stop, all raise Interrupted at the same synchronisation, none hangs."""

    def program(world: World) -> str:
        model, optimizer = make()
        together = synchronise(
            model, optimizer, world, samples=SAMPLES, strategy="parameter-averaging", topology="allreduce"
        )
        try:
            for epoch in range(1, 10):
                for count, batch in enumerate(together.batches(epoch)):
                    step_on(model, optimizer, batch.indices)
                    if (epoch, count, world.rank) == (2, 1, world.size - 1):
                        world.stopping = True
                    together.step()
        except Interrupted as stop:
            return str(stop)
        return "went on"

    assert set(run_in_threads(ranks, program)) == {"stopped in epoch 2"}


def test_a_rank_that_raises_releases_the_others() -> None:
    """In the world of threads an error in one rank is raised, and nobody waits for ever."""

    def program(world: World) -> None:
        if world.rank == 1:
            raise ValueError("on purpose")
        world.barrier()

    with pytest.raises(ValueError, match="on purpose"):
        run_in_threads(3, program)
    assert issubclass(RankLost, Exception)


def test_steps_out_of_turn_are_refused() -> None:
    """A loop that forgets step(), or calls it twice, is told so instead of falling out of step."""
    model, optimizer = make()
    ranks = synchronise(model, optimizer, solo_world(), samples=SAMPLES)
    with pytest.raises(OutOfStepError, match=r"no batch of epoch 1 was followed by step\(\)"):
        list(ranks.batches(1))
    for batch in ranks.batches(2):
        step_on(model, optimizer, batch.indices)
        ranks.step()
    with pytest.raises(OutOfStepError, match="stands alone"):
        ranks.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"stratgy": "single"}, "strategy"),
        ({"shards": "dirichlet:1"}, "labels"),
        ({"batch_size": 0}, "batch-size"),
    ],
)
def test_wrong_options_of_a_users_loop(options: dict[str, Any], words: str) -> None:
    """A user's loop gets the same one-line errors as the command line."""
    model, optimizer = make()
    with pytest.raises(ConfigError, match=words):
        synchronise(model, optimizer, solo_world(), samples=SAMPLES, **options)


def test_editors_complete_a_users_options() -> None:
    """Options that `synchronise` names are options of `rankwise train`, and take the same kinds of values."""
    command, loop = get_type_hints(TrainConfig), get_type_hints(LoopOptions)
    assert loop == {name: command.get(name) for name in loop}


def test_batchnorm_is_averaged_and_counts_stay_integers(ranks: int) -> None:
    """Running statistics are averaged like weights, batch counts agree on the largest, as integers."""

    def program(world: World) -> dict[str, torch.Tensor]:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        together = synchronise(
            model,
            optimizer,
            world,
            samples=SAMPLES,
            batch_size=16,
            strategy="parameter-averaging",
            topology="allreduce",
        )
        for batch in together.batches(1):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[batch.indices]), LABELS[batch.indices]).backward()
            together.step()
        return model.state_dict()

    states = run_in_threads(ranks, program)
    for name, value in states[0].items():
        assert all(torch.equal(value, state[name]) for state in states)
    assert states[0]["1.num_batches_tracked"].dtype == torch.int64
    assert int(states[0]["1.num_batches_tracked"]) == math.ceil(math.ceil(SAMPLES / ranks) / 16)
