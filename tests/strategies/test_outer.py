"""Local SGD and what stands between its rounds, against their rules written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise import synchronise
from rankwise.comm import World, run_in_threads

from .. import effort
from ..matrix.cells import Cell, run
from ..matrix.oracles import Outside
from ..matrix.ways import WAYS, averaging
from .loops import FEATURES, RATE, assert_alike, make, train_all

CASES = [
    ("local-sgd", {}, None),
    ("slowmo", {}, Outside(1.0, 0.7, by_rate=True)),
    ("slowmo", {"outer_lr": 0.5, "outer_momentum": 0.3}, Outside(0.5, 0.3, by_rate=True)),
    ("diloco", {}, Outside(0.7, 0.9, nesterov=True)),
    ("diloco", {"outer_lr": 1.0, "outer_momentum": 0.5}, Outside(1.0, 0.5, nesterov=True)),
]


TEAMS = [  # a master alone has nobody to train
    ("allreduce", 1),
    *((topology, ranks) for topology in ("master", "allreduce") for ranks in (2, 3, 5)),
]


@pytest.mark.parametrize(
    ("strategy", "options", "outside", "team"), effort.rotating(CASES, TEAMS, daily_each=3)
)
def test_outer_steps_are_written_out(
    monkeypatch: pytest.MonkeyPatch,
    strategy: str,
    options: dict[str, float],
    outside: Outside | None,
    team: tuple[str, int],
) -> None:
    """After six epochs of several rounds all ranks hold what the rule says."""
    topology, ranks = team
    way = averaging(strategy, 3, master=topology == "master", options=options, outside=outside)
    monkeypatch.setitem(WAYS, "this", way)
    found = run(Cell("mlp", "SGD", "this", "ragged", ranks))
    assert found.verdict == "equal", found


def test_slowmo_without_momentum_is_local_sgd() -> None:
    """With outer momentum 0 nothing is left of SlowMo, whatever the workers' own momentum."""
    one = train_all(3, 4, strategy="slowmo", outer_momentum=0.0)
    two = train_all(3, 4, strategy="local-sgd")
    assert np.array_equal(one[0].weights, two[0].weights)


def test_post_local_sgd_is_synchronous_first() -> None:
    """Every step is a round in the first half of the epochs, every eighth one after it."""
    state = train_all(3, 4, strategy="post-local-sgd")[0].ranks.state
    steps = -(-68 // 16)  # of the largest of three shards of 203 samples
    assert state.rounds == 2 * steps + 2 * 1
    early = train_all(3, 4, strategy="post-local-sgd", local_after=0.0)[0]
    assert early.ranks.state.rounds == 4
    assert np.array_equal(early.weights, train_all(3, 4, strategy="local-sgd")[0].weights)


def test_outer_steps_leave_the_optimisers_alone() -> None:
    """Of shared momentum the mean is taken, whatever the outer optimiser does to the weights."""
    results = train_all(3, 2, strategy="diloco", optimizer_state="average")
    assert_alike(results)
    for result in results[1:]:
        assert np.array_equal(result.momentum, results[0].momentum)
    assert np.isfinite(results[0].momentum).all()
    assert torch.is_tensor(results[0].ranks.replica.optimizer_tensors()[0])


@pytest.mark.parametrize("strategy", ["slowmo", "diloco"])
def test_an_outer_step_begins_from_the_weights_as_they_are(strategy: str) -> None:
    """Of weights in bfloat16 too, which a round ends with rounded: what they were before rounding is no part
    of the next round's change."""

    def program(world: World) -> tuple[np.ndarray, np.ndarray]:
        model, _ = make()
        model.to(torch.bfloat16)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        ranks = synchronise(
            model, optimizer, world, samples=48, batch_size=4, strategy=strategy, sync_every=2
        )
        for batch in ranks.batches(1):
            optimizer.zero_grad()
            model(FEATURES[batch.indices].to(torch.bfloat16)).float().square().mean().backward()
            ranks.step()
        return ranks.state.anchor, ranks.replica.pack()

    for anchor, weights in run_in_threads(2, program):
        assert np.array_equal(anchor, weights)
