"""Local SGD and what stands between its rounds, against references of a few lines of numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rankwise import synchronise
from rankwise.comm import World, run_in_threads

from .loops import FEATURES, RATE, assert_alike, make, set_weights, step_on, train_all, weights_of


def rounds_of(results: list[Any], epochs: int, steps: int) -> list[list[list[np.ndarray]]]:
    """The batches [round][rank][step] that the ranks trained."""
    rounds = []
    for epoch in range(epochs):
        per_rank = [
            result.seen[epoch * len(result.seen) // epochs : (epoch + 1) * len(result.seen) // epochs]
            for result in results
        ]
        starts = range(0, max(map(len, per_rank)), steps)
        rounds += [[mine[start : start + steps] for mine in per_rank] for start in starts]
    return rounds


def reference(
    rounds: list[list[list[np.ndarray]]], *, rate: float, momentum: float, nesterov: bool, by_rate: bool
) -> np.ndarray:
    """Plain SGD on each rank, and an outer step between rounds, written out."""
    model, _ = make()
    x = weights_of(model).astype(np.float64)
    u = np.zeros_like(x)
    scale = RATE if by_rate else 1.0
    for together in rounds:
        ends, sizes = [], []
        for batches in together:
            model, optimizer = make(momentum=0.0)
            set_weights(model, x.astype(np.float32))
            for batch in batches:
                step_on(model, optimizer, batch)
            ends.append(weights_of(model).astype(np.float64))
            sizes.append(sum(len(batch) for batch in batches))
        d = (x - np.average(ends, axis=0, weights=sizes)) / scale
        u = momentum * u + d
        x = x - rate * scale * (d + momentum * u if nesterov else u)
    return x


CASES = [
    ("local-sgd", {}, {"rate": 1.0, "momentum": 0.0, "nesterov": False, "by_rate": False}),
    ("slowmo", {}, {"rate": 1.0, "momentum": 0.7, "nesterov": False, "by_rate": True}),
    (
        "slowmo",
        {"outer_lr": 0.5, "outer_momentum": 0.3},
        {"rate": 0.5, "momentum": 0.3, "nesterov": False, "by_rate": True},
    ),
    ("diloco", {}, {"rate": 0.7, "momentum": 0.9, "nesterov": True, "by_rate": False}),
    (
        "diloco",
        {"outer_lr": 1.0, "outer_momentum": 0.5},
        {"rate": 1.0, "momentum": 0.5, "nesterov": True, "by_rate": False},
    ),
]


@pytest.mark.parametrize(("strategy", "options", "outer"), CASES)
@pytest.mark.parametrize(
    ("topology", "ranks"),  # a master alone has nobody to train
    [("allreduce", 1), *((topology, n) for topology in ("master", "allreduce") for n in (2, 3, 5))],
)
def test_outer_steps_are_numpys(
    strategy: str, topology: str, options: dict[str, float], outer: dict[str, Any], ranks: int
) -> None:
    """After six epochs of two or three rounds all ranks hold what the reference holds."""
    results = train_all(ranks, 6, strategy=strategy, topology=topology, momentum=0.0, sync_every=3, **options)
    assert_alike(results)
    expected = reference(rounds_of(results[topology == "master" :], 6, 3), **outer)
    assert np.allclose(results[0].weights, expected, atol=1e-5)


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
