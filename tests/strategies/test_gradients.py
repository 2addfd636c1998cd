"""Synchronous SGD against one process with the large batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.errors import Interrupted
from rankwise.strategies.buckets import Buckets, cut

from .. import effort
from .loops import (
    BATCH,
    FEATURES,
    LABELS,
    RATE,
    SAMPLES,
    assert_alike,
    gradients,
    make,
    train_all,
    weights_of,
)

TEAMS = [("allreduce", n) for n in (1, 2, 3, 5)] + [("gradient-server", n) for n in (2, 3, 5)]


@pytest.mark.parametrize(("strategy", "ranks", "sync_every"), effort.rotating(TEAMS, [1, 3]))
def test_ranks_are_one_process_with_the_large_batch(strategy: str, ranks: int, sync_every: int) -> None:
    """N ranks with batch b hold, after more than 50 steps, the weights of one process with the samples of all
    of them in one batch: momentum, ragged last batches and accumulated gradients included."""
    batches = -(-SAMPLES // (BATCH * (ranks - (strategy == "gradient-server"))))
    epochs = -(-50 // (batches // sync_every))
    results = train_all(ranks, epochs, strategy=strategy, sync_every=sync_every)
    assert_alike(results)
    model, optimizer = make()
    steps = 0
    per_epoch = [
        [
            result.seen[e * len(result.seen) // epochs : (e + 1) * len(result.seen) // epochs]
            for result in results
        ]
        for e in range(epochs)
    ]
    for batches in per_epoch:
        rounds = max(-(-len(mine) // sync_every) for mine in batches)
        for number in range(rounds):
            span = slice(number * sync_every, (number + 1) * sync_every)
            together = np.concatenate([batch for mine in batches for batch in mine[span]])
            gradients(model, optimizer, together)
            optimizer.step()
            steps += 1
    assert steps >= 50
    assert np.allclose(results[0].weights, weights_of(model), atol=1e-5)
    states = [result.ranks.state for result in results]
    assert sum(state.committed for state in states) == epochs * SAMPLES
    assert all(state.pending == 0 for state in states)


@pytest.mark.parametrize("strategy", ["local-sgd", "gossip"])
def test_one_step_a_round_of_plain_sgd_is_allreduce(strategy: str) -> None:
    """Averaging weights after every plain SGD step is averaging gradients; so is gossip on a complete graph
    where all batches are of one size."""
    samples = 4 * BATCH * 3
    options: dict[str, Any] = {"momentum": 0.0, "samples": samples}
    topology = {"topology": "complete"} if strategy == "gossip" else {}
    one = train_all(3, 5, strategy=strategy, sync_every=1, **topology, **options)
    two = train_all(3, 5, strategy="allreduce", **options)
    assert np.allclose(one[0].weights, two[0].weights, atol=1e-5)


@pytest.mark.parametrize("strategy", ["allreduce", "gradient-server"])
def test_what_has_few_directions_is_sent_whole(strategy: str) -> None:
    """One sample a rank makes gradients of rank 1, so powersgd with a direction for each worker loses only
    what float32 does of any matrix, however the network's tensors lie in memory."""

    torch.manual_seed(0)
    prototype = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.Flatten(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 9)
    )

    def trained(world: World, compress: str) -> np.ndarray:
        model = copy.deepcopy(prototype).to(memory_format=torch.channels_last)
        model[0].requires_grad_(requires_grad=False)  # what is frozen is not sent at all
        optimizer = torch.optim.SGD(model[2:].parameters(), lr=RATE / 10)
        ranks = synchronise(
            model, optimizer, world, samples=8, batch_size=1, strategy=strategy, compress=compress
        )
        images = torch.randn(8, 2, 4, 4, generator=torch.Generator().manual_seed(2))
        for batch in ranks.batches(1):
            optimizer.zero_grad()
            model(images[batch.indices]).square().sum().backward()
            ranks.step()
        return weights_of(model)

    ranks = 2 if strategy == "allreduce" else 3
    plain, compressed = (
        run_in_threads(ranks, lambda w, c=c: trained(w, c))[0] for c in ("none", "powersgd:2")
    )
    way = np.linalg.norm(plain - weights_of(prototype))
    assert np.linalg.norm(plain - compressed) < 0.01 * way
    assert not np.array_equal(plain, compressed)


@pytest.mark.parametrize("bucket_mb", [1e-6, 1e-4, 1.0])
def test_buckets_change_nothing(bucket_mb: float, ranks: int) -> None:
    """Gradients in many small pieces, sent during the backward pass, give what one piece gives."""
    whole = train_all(ranks, strategy="allreduce")
    pieces = train_all(ranks, strategy="allreduce", bucket_mb=bucket_mb)
    assert_alike(pieces)
    assert np.allclose(whole[0].weights, pieces[0].weights, atol=1e-6)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=20), st.integers(0, 100))
def test_buckets_are_as_few_whole_parameters_as_fit(sizes: list[int], most: int) -> None:
    """Every parameter stands in one bucket, in order, and a bucket is as full as it may be: what comes next
    would be too much; only a parameter that is too large by itself may stand alone in more."""
    ends = np.cumsum(sizes)
    stop = place = 0
    for bucket in cut(sizes, most):
        assert (bucket.span.start, bucket.places.start) == (stop, place)
        stop, place = bucket.span.stop, bucket.places.stop
        assert stop == ends[place - 1]
        some = sizes[bucket.places]
        assert sum(some) <= most or np.count_nonzero(some) == 1
        assert place == len(sizes) or sum(some) + sizes[place] > most
    assert place == len(sizes)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=20),
    st.integers(1, 100),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_buckets_hold_as_many_bytes_as_was_said(sizes: list[int], most: int, dtype: torch.dtype) -> None:
    """However wide the numbers are, buckets are cut by bytes, the last parameters first."""
    parameters = [nn.Parameter(torch.zeros(size, dtype=dtype)) for size in sizes]
    item_bytes = 4 if dtype == torch.float32 else 8

    def program(world: World) -> Buckets:
        return Buckets(parameters, most * item_bytes + item_bytes / 2, world)

    (found,) = run_in_threads(1, program)
    assert [bucket.span for bucket in found._buckets] == [its.span for its in cut(sizes[::-1], most)]


@pytest.mark.parametrize(
    "options",
    [
        {"bucket_mb": 1e-6},
        {},
        {"compress": "topk:1"},
        {"strategy": "gradient-server"},
        {"strategy": "two-level"},
    ],
)
@pytest.mark.parametrize("place", [0, 2])
def test_parameters_without_gradients(options: dict[str, Any], place: int) -> None:
    """Frozen parameters stay; one that takes no part in a backward pass hinders nobody, wherever it stands:
    the others learn as they do without it."""

    def program(world: World, unused: bool) -> np.ndarray:
        model, _ = make()
        model[0].bias.requires_grad_(False)
        weights = list(model.parameters())
        before = model[0].bias.detach().clone()
        if unused:
            model[place].register_parameter("unused", nn.Parameter(torch.ones(5)))
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
        ranks = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=BATCH, **{"strategy": "allreduce", **options}
        )
        for batch in ranks.batches(1):
            gradients(model, optimizer, batch.indices)
            ranks.step()
        assert torch.equal(before, model[0].bias)
        assert not unused or torch.equal(model[place].unused, torch.ones(5))
        return nn.utils.parameters_to_vector(weights).detach().numpy().copy()

    with_it, without = (run_in_threads(3, lambda world, u=u: program(world, u)) for u in (True, False))
    for found in with_it:
        assert np.array_equal(found, with_it[0])
        assert np.allclose(found, without[0], atol=1e-6)
    assert not np.allclose(with_it[0], weights_of(make()[0]), atol=1e-3)


class Routed(nn.Module):
    """A layer for few samples, one for none, and one for all, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.common, self.rare, self.unused = (nn.Linear(6, 3).double() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rare = x[:, 0] > 1.2
        out = self.common(x)
        return out.index_put((rare,), out[rare] + self.rare(x[rare])) if rare.any() else out


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sync_every": 3},
        {"bucket_mb": 1e-5},
        {"strategy": "gradient-server"},
        {"strategy": "two-level"},
    ],
    ids=str,
)
def test_what_has_no_gradient_on_any_rank_is_left_alone(options: dict[str, Any], ranks: int) -> None:
    """By weight decay and momentum too: a layer that takes part in the batches of some ranks is trained, and
    one that takes no part in any stays, as in one process."""
    torch.manual_seed(4)
    first = Routed()

    def program(world: World) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        model = copy.deepcopy(first)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=0.1)
        its = synchronise(
            model, optimizer, world, samples=60, batch_size=2, **{"strategy": "allreduce", **options}
        )
        seen = []
        for batch in its.batches(1):
            optimizer.zero_grad()
            F.cross_entropy(model(FEATURES[batch.indices].double()), LABELS[batch.indices]).backward()
            its.step()
            seen.append(batch.indices)
        return [p.detach() for p in model.parameters()], seen

    found = run_in_threads(ranks, program)
    model, every = copy.deepcopy(first), options.get("sync_every", 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=0.1)
    turns = [np.concatenate(turn) for turn in zip(*(seen for _, seen in found if seen), strict=True)]
    without = 0
    for start in range(0, len(turns), every):
        together = np.concatenate(turns[start : start + every])
        optimizer.zero_grad()
        F.cross_entropy(model(FEATURES[together].double()), LABELS[together]).backward()
        without += model.rare.weight.grad is None
        optimizer.step()
    assert 0 < without < len(turns)
    assert torch.equal(model.unused.weight, first.unused.weight)
    for weights, _ in found:
        for value, expected in zip(weights, model.parameters(), strict=True):
            torch.testing.assert_close(value, expected.detach(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("strategy", ["allreduce", "gradient-server", "local-sgd", "two-level"])
def test_sparse_gradients_are_dense_ones(strategy: str) -> None:
    """An embedding with sparse gradients ends where one with dense gradients does, to the bit, momentum and
    clipping included."""

    def program(world: World, sparse: bool) -> np.ndarray:
        torch.manual_seed(0)
        model = nn.Embedding(20, 3, sparse=sparse)
        model.load_state_dict({"weight": torch.linspace(-1, 1, 60).view(20, 3)})
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, nesterov=True)
        options = {"strategy": strategy, "batch_size": 4, "clip_norm": 0.1}
        ranks = synchronise(model, optimizer, world, samples=60, **options)
        for epoch in (1, 2):
            for batch in ranks.batches(epoch):
                optimizer.zero_grad()
                F.cross_entropy(model(torch.as_tensor(batch.indices % 20)), LABELS[batch.indices]).backward()
                ranks.step()
        return weights_of(model)

    sparse, dense = (run_in_threads(3, lambda world, s=s: program(world, s)) for s in (True, False))
    for one, other in zip(sparse, dense, strict=True):
        assert np.array_equal(one, other)
    assert not np.array_equal(dense[0], np.linspace(-1, 1, 60, dtype=np.float32))


def assert_moved_by_the_limit(
    strategy: str, made: Callable[[], tuple[nn.Module, torch.optim.Optimizer]]
) -> None:
    """A clipped step of plain SGD moves all weights together by rate times limit."""
    size = {"allreduce": 2, "gradient-server": 2}.get(strategy, 1)

    def program(world: World) -> np.ndarray:
        model, optimizer = made()
        options = {"samples": BATCH, "batch_size": BATCH, "strategy": strategy, "clip_norm": 1e-3}
        if strategy != "single":
            options["sync_every"] = 1
        ranks = synchronise(model, optimizer, world, **options)
        before = weights_of(model)
        for batch in ranks.batches(1):
            gradients(model, optimizer, batch.indices)
            ranks.step()
        return weights_of(model) - before

    for moved in run_in_threads(size, program):
        assert np.linalg.norm(moved) == pytest.approx(RATE * 1e-3, rel=1e-2)


@pytest.mark.parametrize("strategy", ["single", "allreduce", "gradient-server", "local-sgd"])
def test_gradients_are_clipped_on_their_global_norm(strategy: str) -> None:
    """With a tiny limit a step of plain SGD moves all weights together by rate times limit."""
    assert_moved_by_the_limit(strategy, lambda: make(momentum=0.0))


@pytest.mark.parametrize("strategy", ["single", "allreduce", "gradient-server", "local-sgd"])
def test_what_the_optimiser_leaves_alone_is_not_clipped_with_the_rest(strategy: str) -> None:
    """Parameters that it does not hold have gradients too, which nobody resets: they do not count."""

    def last_layer_alone() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = make()
        return model, torch.optim.SGD(model[2].parameters(), lr=RATE)

    assert_moved_by_the_limit(strategy, last_layer_alone)


@pytest.mark.parametrize(
    "options", [{}, {"bucket_mb": 1e-6}, {"compress": "int8"}, {"strategy": "gradient-server"}]
)
def test_one_rank_that_stops_stops_all(options: dict[str, Any]) -> None:
    """If one rank is told to stop, before or after a backward pass, all raise Interrupted behind this step,
    which is committed, and none hangs."""

    def program(world: World, before: bool) -> int:
        model, optimizer = make()
        ranks = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=BATCH, **{"strategy": "allreduce", **options}
        )
        try:
            for epoch in range(1, 10):
                for batch in ranks.batches(epoch):
                    stops = ranks.state.rounds == 7 and world.rank == 1
                    world.stopping = world.stopping or (stops and before)
                    gradients(model, optimizer, batch.indices)
                    world.stopping = world.stopping or stops
                    ranks.step()
        except Interrupted:
            return ranks.state.rounds
        raise AssertionError("went on")

    assert run_in_threads(3, lambda world: program(world, True)) == [8] * 3
    assert run_in_threads(3, lambda world: program(world, False)) == [8] * 3


def test_the_loss_goes_down() -> None:
    """The problem can be learnt, so that the comparisons above compare something."""
    result = train_all(3, 30, strategy="allreduce")[0]
    model, _ = make()
    nn.utils.vector_to_parameters(torch.from_numpy(result.weights), model.parameters())
    trained = nn.functional.cross_entropy(model(FEATURES), LABELS)
    model, _ = make()
    assert trained < 0.9 * nn.functional.cross_entropy(model(FEATURES), LABELS)
