"""A master that serves whoever comes: against references, and whether it ends."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.errors import Interrupted
from rankwise.strategies.asynchronous import EASGD, Asynchronous, CentreState, Downpour

from .. import effort
from ..matrix.cells import Cell, run
from ..test_survival import loop
from .loops import BATCH, SAMPLES, gradients, make, train_all, weights_of


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
    mine, known = easgd.take(x, reply, workers=4)
    assert np.allclose(mine, x - 0.2 * (x - before), atol=1e-6)
    assert np.array_equal(known, centre)  # to the bit
    downpour, before = Downpour(), centre.copy()
    reply = downpour.serve(centre, downpour.message(x, fetched), workers=4)
    assert np.allclose(centre, before + x - fetched, atol=1e-6)
    assert all(np.array_equal(its, centre) for its in downpour.take(x, reply, workers=4))


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


def survives_its_master(
    world: World, strategy: str, spares: int, step: Any
) -> tuple[np.ndarray, list[Any]] | None:
    """Two epochs of plain SGD whose batches `step` gives gradients."""

    def made() -> tuple[Any, Any]:
        model, _ = make()
        return model, torch.optim.SGD(model.parameters(), lr=0.01)

    options = {"strategy": strategy, "sync_every": 2}
    return loop(world, options, spares=spares, epochs=2, step=step, made=made)


def constant(model: Any, optimizer: Any, indices: np.ndarray) -> None:
    """Gradients that no weight changes: one for each sample."""
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(len(indices)))


@given(call=st.integers(8, 90), spares=st.integers(0, 1))
@effort.examples(6, 100)
def test_what_workers_brought_is_not_lost_with_the_master(call: int, spares: int) -> None:
    """Whenever Downpour's master is killed, its centre holds the steps of all samples in the end, those that
    workers had brought before as well. Each worker may have brought one exchange twice."""
    start = weights_of(make()[0])
    results = run_in_threads(
        3 + spares, lambda world: survives_its_master(world, "downpour", spares, constant), kill_at={0: call}
    )
    left = [its for its in results if its is not Killed and its is not None]
    assert all((its == 1).all() for _, counts in left for its in counts)
    moved = start - left[0][0]
    least, exchange = 0.01 * 2 * SAMPLES, 0.01 * 2 * BATCH
    assert (moved > least - 0.005).all()
    assert (moved < least + 2 * exchange + 0.005).all()


@given(call=st.integers(8, 90))
@effort.examples(6, 100)
def test_the_next_master_begins_with_the_newest_centre(call: int) -> None:
    """Whenever EASGD's master is killed, the one in its place begins with the bits of a centre that it held,
    none older than any that a worker had been given."""
    held: list[np.ndarray] = []
    taken: list[tuple[int, np.ndarray]] = []
    real, follow = EASGD.serve, Asynchronous.follow_rank_0

    def serve(self: EASGD, centre: np.ndarray, message: np.ndarray, workers: int) -> np.ndarray:
        reply = real(self, centre, message, workers)
        if not taken:
            held.append(centre.copy())
        return reply

    def note(
        self: Asynchronous, state: CentreState, replica: Any, world: World, newest: int, copy: Any
    ) -> CentreState:
        if copy is not None:
            taken.append((newest, copy.copy()))
        return follow(self, state, replica, world, newest, copy)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EASGD, "serve", serve)
        patch.setattr(Asynchronous, "follow_rank_0", note)
        results = run_in_threads(
            3, lambda world: survives_its_master(world, "easgd", 0, gradients), kill_at={0: call}
        )
    assert taken or results[0] is not Killed
    for newest, centre in taken[:1]:
        assert len(held) - 2 <= newest <= len(held)
        expected = held[newest - 1] if newest else weights_of(make()[0])
        np.testing.assert_array_equal(centre, expected)
