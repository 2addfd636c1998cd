"""A master that serves whoever comes: against references, and whether it ends."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.errors import Interrupted
from rankwise.strategies.asynchronous import EASGD, Downpour

from .. import effort
from ..matrix.cells import Cell, run
from .loops import BATCH, SAMPLES, gradients, make, train_all


@pytest.mark.parametrize(("strategy", "loop"), effort.rotating(["easgd", "downpour"], ["plain", "ragged"]))
def test_one_worker_and_its_centre(strategy: str, loop: str) -> None:
    """With one worker, whose exchanges have a known order, both hold what the rule says."""
    found = run(Cell("mlp", "SGD with momentum", f"{strategy}/1-worker", loop, 2))
    assert found.verdict == "equal", found


def test_rules_are_the_papers() -> None:
    """EASGD moves centre and worker towards each other by the same amount; Downpour adds what changed."""
    rng = np.random.default_rng(0)
    x, fetched, centre = (rng.normal(size=7).astype(np.float32) for _ in range(3))
    easgd, before = EASGD(elasticity=0.8), centre.copy()
    reply = easgd.serve(centre, easgd.message(x, fetched), workers=4)
    assert np.allclose(centre, before + 0.2 * (x - before), atol=1e-6)
    assert np.allclose(easgd.take(x, reply), x - 0.2 * (x - before), atol=1e-6)
    downpour, before = Downpour(), centre.copy()
    reply = downpour.serve(centre, downpour.message(x, fetched), workers=4)
    assert np.allclose(centre, before + x - fetched, atol=1e-6)
    assert np.array_equal(downpour.take(x, reply), centre)


@pytest.mark.parametrize(
    ("strategy", "ranks", "sync_every", "max_staleness"),  # a master alone has nobody to train
    effort.rotating(
        itertools.product(["easgd", "downpour"], [2, 3, 5]), [1, 4, "epoch"], [None, 0, 2], daily_each=3
    ),
)
def test_everybody_is_served(strategy: str, ranks: int, sync_every: Any, max_staleness: int | None) -> None:
    """Whatever the order, each sample is committed once an epoch, each worker exchanges as often as it has
    rounds, and staleness keeps its bound."""
    results = train_all(ranks, 3, strategy=strategy, sync_every=sync_every, max_staleness=max_staleness)
    states = [result.ranks.state for result in results]
    assert sum(state.committed for state in states) == 3 * SAMPLES
    assert len({state.rounds for state in states}) == 1
    measured = states[0].measured
    assert measured["exchanges"] == (ranks - 1) * states[0].rounds
    assert 0 <= measured["staleness_mean"] <= measured["staleness_max"]
    if max_staleness is not None:
        assert measured["staleness_max"] <= 2 * (ranks - 2) * (max_staleness + 1)


@pytest.mark.parametrize("stopper", [0, 1, 2])
def test_one_rank_that_stops_stops_all(stopper: int) -> None:
    """If one rank is told to stop, worker or master, all end in the same epoch, and none hangs."""

    def program(world: World) -> int:
        model, optimizer = make()
        ranks = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=BATCH, strategy="easgd", sync_every=1
        )
        epoch = 0
        try:
            for epoch in range(1, 10):
                if (world.rank, epoch) == (stopper, 3):
                    world.stopping = True
                for batch in ranks.batches(epoch):
                    gradients(model, optimizer, batch.indices)
                    ranks.step()
        except Interrupted:
            return epoch
        raise AssertionError("went on")

    assert run_in_threads(3, program) == [3, 3, 3]
