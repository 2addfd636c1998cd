"""Who trains on which sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.data.partition import apportion, deal, parse_shards, replicate
from rankwise.data.sampler import Sampler
from rankwise.errors import ConfigError

modes = st.sampled_from(["redealt", "fixed", "dirichlet:0.05", "dirichlet:1", "dirichlet:100"])
seeds = st.integers(0, 2**63 - 1)


@st.composite
def labels_and_workers(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    workers = draw(st.integers(1, 9))
    samples = draw(st.integers(workers, 200))
    classes = draw(st.integers(1, 10))
    return np.random.default_rng(draw(st.integers(0, 99))).integers(0, classes, samples), workers


@given(labels_and_workers(), modes, seeds, st.integers(1, 50), st.integers(1, 2))
def test_every_sample_once(
    case: tuple[np.ndarray, int], mode: str, seed: int, epoch: int, least: int
) -> None:
    """In every epoch each sample stands in exactly one shard, once, and every worker has one, or as many as
    are needed, if there are enough."""
    labels, workers = case
    shards = deal(
        parse_shards(mode), labels=labels, shares=[1] * workers, epoch=epoch, seed=seed, least=least
    )
    assert len(shards) == workers
    assert sorted(np.concatenate(shards).tolist()) == list(range(len(labels)))
    assert all(len(shard) >= (least if len(labels) >= least * workers else 1) for shard in shards)
    if not mode.startswith("dirichlet"):
        sizes = [len(shard) for shard in shards]
        assert max(sizes) - min(sizes) <= 1


@given(labels_and_workers(), modes, seeds)
def test_shards_over_epochs(case: tuple[np.ndarray, int], mode: str, seed: int) -> None:
    """Fixed and uneven shards hold the same samples in every epoch, and a call twice gives the same."""
    labels, workers = case
    first = deal(parse_shards(mode), labels=labels, shares=[1] * workers, epoch=1, seed=seed)
    again = deal(parse_shards(mode), labels=labels, shares=[1] * workers, epoch=1, seed=seed)
    later = deal(parse_shards(mode), labels=labels, shares=[1] * workers, epoch=2, seed=seed)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    if mode != "redealt":
        assert all(set(a) == set(b) for a, b in zip(first, later, strict=True))


def test_redealt_shards_change_and_fixed_ones_are_reshuffled() -> None:
    """Redealt shards hold other samples in the next epoch; fixed ones the same in another order."""
    labels = np.arange(100) % 10
    for mode, same in (("redealt", False), ("fixed", True)):
        one, two = (
            deal(parse_shards(mode), labels=labels, shares=[1] * 4, epoch=e, seed=0)[0] for e in (1, 2)
        )
        assert (set(one) == set(two)) is same
        assert not np.array_equal(one, two)


def test_fixed_shards_are_never_one_class() -> None:
    """Also where the samples lie sorted by class, a fixed shard is a random share of all classes."""
    labels = np.repeat(np.arange(10), 100)
    for shard in deal(parse_shards("fixed"), labels=labels, shares=[1] * 10, epoch=1, seed=3):
        assert len(np.unique(labels[shard])) >= 8


def test_dirichlet_is_more_uneven_the_smaller_alpha() -> None:
    """A small ALPHA gives a worker few classes, a large one all in nearly equal parts."""
    labels = np.repeat(np.arange(10), 500)

    def largest_share(alpha: float) -> float:
        shards = deal(parse_shards(f"dirichlet:{alpha}"), labels=labels, shares=[1] * 5, epoch=1, seed=0)
        counts = [np.bincount(labels[shard], minlength=10) for shard in shards]
        return float(np.mean([count.max() / count.sum() for count in counts]))

    assert largest_share(0.05) > 2 * largest_share(1000)
    assert largest_share(1000) < 0.13


@given(st.integers(1, 100), st.integers(1, 5), seeds)
def test_replication_gives_all_to_all(samples: int, workers: int, seed: int) -> None:
    """Under replication each worker has every sample once."""
    orders = replicate(samples=samples, workers=workers, epoch=1, seed=seed)
    assert [sorted(order) for order in orders] == [list(range(samples))] * workers


@pytest.mark.parametrize(
    "mode", ["", "rediel", "dirichlet", "dirichlet:", "dirichlet:0", "dirichlet:x", "dirichlet:inf"]
)
def test_unknown_shards_are_refused(mode: str) -> None:
    """A wrong --shards is one clear ConfigError."""
    with pytest.raises(ConfigError):
        parse_shards(mode)


@given(
    labels_and_workers(),
    st.lists(st.integers(1, 70), min_size=9, max_size=9),
    st.booleans(),
    st.one_of(st.none(), st.integers(1, 9)),
    st.booleans(),
    st.booleans(),
    modes,
)
def test_rounds_agree_over_ranks(
    case: tuple[np.ndarray, int],
    sizes: list[int],
    alike: bool,
    sync_every: int | None,
    master: bool,
    pairs: bool,
    mode: str,
) -> None:
    """All ranks have the same number of rounds with the same weights, whatever their batches; batches cover
    the shard in order; a master, or a worker with nothing left, joins with an empty batch. Where a model
    needs pairs a last batch of one sample joins the one before it, and all others are as they were."""
    labels, workers = case
    batch_sizes = [sizes[0]] * workers if alike else sizes[:workers]

    def shards_of(epoch: int, shares: Sequence[int]) -> list[np.ndarray]:
        return deal(parse_shards(mode), labels=labels, shares=shares, epoch=epoch, seed=1)

    samplers = [
        Sampler(
            shards_of,
            rank=rank,
            first_worker=int(master),
            batch_sizes=batch_sizes,
            sync_every=lambda epoch: sync_every,
            needs_pairs=pairs,
        )
        for rank in range(workers + master)
    ]
    epochs = [list(sampler.batches(1)) for sampler in samplers]
    rounds = [[batch for batch in batches if batch.ends_round] for batches in epochs]
    assert len({len(ends) for ends in rounds}) == 1
    for together in zip(*rounds, strict=True):
        assert all(np.array_equal(batch.weights, together[0].weights) for batch in together)
        assert together[0].weights.sum() == pytest.approx(1)
    assert [batch.rounds_left for batch in rounds[0]] == list(range(len(rounds[0])))[::-1]
    for number in range(len(rounds[0])):
        parts = [b for batches in epochs for b in batches if b.rounds_left == len(rounds[0]) - 1 - number]
        assert sum(batch.share for batch in parts) == pytest.approx(1)
    for rank, batches in enumerate(epochs):
        positions = [batch.position for batch in batches]
        assert positions == sorted(positions)
        assert positions[0] > 0
        assert positions[-1] < 1
        assert batches[-1].ends_round
        mine = np.concatenate([batch.indices for batch in batches])
        assert np.array_equal(mine, samplers[rank].shard(1))
        size = batch_sizes[max(rank - master, 0)]
        full, rest = divmod(len(mine), size)
        expected = [size] * full + [rest] * (rest > 0)
        if pairs and rest == 1 and full:
            expected[-2:] = [size + 1]
        assert [len(batch) for batch in batches if len(batch)] == expected
        assert all(len(batch) for batch in batches if not batch.ends_round)
        if sync_every:
            runs = np.diff([-1, *np.flatnonzero([batch.ends_round for batch in batches])])
            assert max(runs) <= sync_every
    if master:
        assert not any(len(batch) for batch in epochs[0])
    turns = [sum(len(batch) > 0 for batch in batches) for batches in epochs[int(master) :]]
    assert samplers[0].steps(1) == max(turns)
    assert samplers[0].least_batch(1) == min(
        min(len(batch), size)
        for batches, size in zip(epochs[int(master) :], batch_sizes, strict=True)
        for batch in batches
        if len(batch)
    )
    if not mode.startswith("dirichlet") and len(labels) > workers * max(batch_sizes):
        assert max(turns) - min(turns) <= 1


@given(st.integers(0, 500), st.lists(st.integers(1, 100), min_size=1, max_size=9))
def test_a_number_is_split_by_shares(total: int, shares: list[int]) -> None:
    """Everybody gets the exact share, but for less than one; where asked for one at least, nobody gets
    nothing; equal shares are as numpy splits an array."""
    parts = apportion(total, shares)
    assert parts.sum() == total
    assert np.abs(parts - total * np.array(shares) / sum(shares)).max() < 1
    if total >= len(shares):
        some = apportion(total, shares, least=1)
        assert some.sum() == total
        assert some.min() >= 1
    equal = [len(part) for part in np.array_split(np.arange(total), len(shares))]
    assert apportion(total, [7] * len(shares)).tolist() == equal


@given(
    st.integers(0, 60),
    st.lists(st.one_of(st.floats(0, 2), st.floats(50, 100)), min_size=1, max_size=9).filter(any),
    st.integers(0, 4),
)
def test_a_least_part_is_paid_by_those_who_have_most_too_much(
    more: int, shares: list[float], least: int
) -> None:
    """However small a share, nobody is under the least; what that takes, those give who are furthest above
    their exact shares, so that moving one more from anybody to anybody else would make nothing more exact."""
    total = least * len(shares) + more
    parts = apportion(total, shares, least=least)
    assert parts.sum() == total
    assert parts.min() >= least
    above = parts - total * np.array(shares) / sum(shares)
    givers = above[parts > least]
    assert not len(givers) or givers.max() <= above.min() + 1 + 1e-9


def test_small_shares_take_from_large_ones() -> None:
    """Two large shares pay for the least parts of five small ones, each as much of it as the other."""
    assert apportion(20, [100, 100, 1, 1, 1, 1, 1], least=2).tolist() == [5, 5, 2, 2, 2, 2, 2]
    assert apportion(19, [100, 60, 1, 1, 1, 1, 1], least=1).tolist() == [9, 5, 1, 1, 1, 1, 1]


@given(
    labels_and_workers(),
    st.lists(st.integers(1, 9), min_size=9, max_size=9),
    st.one_of(st.none(), st.integers(1, 9)),
    st.booleans(),
    st.booleans(),
    modes,
)
def test_steps_are_numbered_by_who_makes_the_most(
    case: tuple[np.ndarray, int],
    sizes: list[int],
    sync_every: int | None,
    lockstep: bool,
    pairs: bool,
    mode: str,
) -> None:
    """A rank counts its steps from 1 on, one by one; at the end of a round all are at the number of whoever
    has made the most."""
    labels, workers = case
    ranks = [
        Sampler(
            lambda epoch, shares: deal(parse_shards(mode), labels=labels, shares=shares, epoch=epoch, seed=1),
            rank=rank,
            first_worker=0,
            batch_sizes=sizes[:workers],
            sync_every=lambda epoch: sync_every,
            syncs_every_step=lockstep,
            needs_pairs=pairs,
        )
        for rank in range(workers)
    ]
    steps: list[list[list[int]]] = [[[]] for _ in ranks]  # of each rank in each round
    for sampler, mine in zip(ranks, steps, strict=True):
        for batch in sampler.batches(3):
            mine[-1].append(batch.step)
            if batch.ends_round:
                mine.append([])
    before = 0
    for together in zip(*steps, strict=True):
        most = max(map(len, together))
        for mine in together:
            assert mine[:-1] == list(range(before + 1, before + len(mine)))
            assert mine[-1:] == [before + most] * bool(mine)
        before += most
    assert before == ranks[0].steps(3)


@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=5),
    st.lists(st.integers(2, 9), min_size=5, max_size=5),
    st.one_of(st.none(), st.integers(1, 4)),
    st.booleans(),
    st.data(),
)
def test_what_a_lost_rank_had_makes_no_single_samples(
    shard_sizes: list[int], sizes: list[int], sync_every: int | None, keeps_work: bool, data: st.DataObject
) -> None:
    """Where a model needs pairs, what a lost rank had is dealt so that no batch of one sample comes of it,
    and all of it is trained."""
    ranks = len(shard_sizes)
    starts = np.cumsum([0, *shard_sizes])
    shards = [np.arange(start, start + size) for start, size in zip(starts, shard_sizes, strict=False)]
    samplers = [
        Sampler(
            lambda epoch, shares: shards,
            rank=rank,
            first_worker=0,
            batch_sizes=sizes[:ranks],
            sync_every=lambda epoch: sync_every,
            needs_pairs=True,
        )
        for rank in range(ranks)
    ]
    lost = data.draw(st.integers(0, ranks - 1), "lost")
    number = data.draw(st.integers(0, len(samplers[0].rounds(1)) - 1), "rounds")
    here = [rank for rank in range(ranks) if rank != lost]
    done = []
    for rank in here:
        made = [
            len(batch)
            for batch in samplers[rank].batches(1)
            if batch.rounds_left == left_after(number, samplers)
        ]
        done.append(sum(made[: data.draw(st.integers(0, len(made)), "batches")]) if keeps_work else 0)
    kept = [
        samplers[rank].rounds(1)[number].parts[rank][:over] for rank, over in zip(here, done, strict=True)
    ]
    committed = [its.parts for its in samplers[0].rounds(1)[:number]]
    trained = [*(part for parts in committed for part in parts), *kept]
    for rank in here:
        samplers[rank].redistribute(1, number, here, done)
        batches = list(samplers[rank].batches(1, number))
        assert all(len(batch) != 1 for batch in batches)
        trained += [batch.indices for batch in batches]
    assert sorted(np.concatenate(trained)) == list(range(sum(shard_sizes)))


def left_after(number: int, samplers: list[Sampler]) -> int:
    """The rounds of an epoch after this one."""
    return len(samplers[0].rounds(1)) - 1 - number
