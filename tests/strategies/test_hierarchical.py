"""Two levels of synchronisation: inside hosts and across them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.comm import Subgroup, World, run_in_threads
from rankwise.comm.threads import Killed

from .. import effort
from ..test_survival import loop
from .loops import assert_alike, train_all


@given(st.integers(1, 6), st.integers(0, 20), st.data())
def test_a_circle_exchanges_like_a_world(size: int, length: int, data: st.DataObject) -> None:
    """Whatever ranks form a circle, and however few numbers there are, its exchanges give what numpy does,
    the same bits on each of its ranks; the other ranks have nothing to do with it."""
    ranks = data.draw(st.lists(st.sampled_from(range(size)), min_size=1, unique=True))
    brought = np.random.default_rng(length).standard_normal((size, length))
    root = data.draw(st.integers(0, len(ranks) - 1))

    def program(world: World) -> list[np.ndarray] | None:
        if world.rank not in ranks:
            return None
        circle = Subgroup(world, ranks)
        mine = brought[world.rank]
        total, largest, from_root = mine.copy(), mine.copy(), mine.copy()
        circle.allreduce(total)
        circle.allreduce(largest, "max")
        circle.broadcast(from_root, root)
        gathered = circle.gather(mine, root)
        assert (gathered is not None) == (circle.rank == root)
        return [total, largest, from_root, circle.allgather(mine), gathered if gathered is not None else mine]

    results = run_in_threads(size, program)
    rows = brought[ranks]
    found = [results[rank] for rank in ranks]
    for total, largest, from_root, all_rows, _ in found:
        assert np.array_equal(total, found[0][0])
        np.testing.assert_allclose(total, rows.sum(axis=0), atol=1e-12)
        assert np.array_equal(largest, rows.max(axis=0))
        assert np.array_equal(from_root, rows[root])
        assert np.array_equal(all_rows, rows)
    assert np.array_equal(found[root][4], rows)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_one_host_is_allreduce(ranks: int) -> None:
    """On one host every step is synchronous SGD's, momentum and ragged last batches included."""
    levels = train_all(ranks, strategy="two-level")
    plain = train_all(ranks, strategy="allreduce", sync_every=1)
    assert_alike(levels)
    np.testing.assert_allclose(levels[0].weights, plain[0].weights, atol=1e-5)


@pytest.mark.parametrize("across", [1, 3])
def test_hosts_of_one_rank_are_local_sgd(across: int) -> None:
    """Where each host has one rank, nothing is synchronised but the weights every so many steps."""
    levels = train_all(3, hosts=[0, 1, 2], sync_across_hosts=across)
    local = train_all(3, strategy="local-sgd", sync_every=across)
    assert_alike(levels)
    np.testing.assert_allclose(levels[0].weights, local[0].weights, atol=1e-6)


def test_across_hosts_in_each_step_is_allreduce() -> None:
    """Averaged after each step, plain SGD of uneven hosts is synchronous SGD of all ranks."""
    levels = train_all(5, hosts=[0, 0, 0, 1, 1], momentum=0, sync_across_hosts=1)
    plain = train_all(5, strategy="allreduce", momentum=0)
    assert_alike(levels)
    np.testing.assert_allclose(levels[0].weights, plain[0].weights, atol=1e-5)


@pytest.mark.parametrize("compress", ["bf16", "topk:0.1", "sign", "powersgd:2"])
def test_only_leaders_compress(compress: str) -> None:
    """What goes between hosts is compressed, and what goes inside a host is not: a rank that leads nobody
    has no compression to tell of."""
    levels = train_all(4, hosts=[0, 0, 1, 1], sync_across_hosts=4, compress=compress)
    assert_alike(levels)
    leads = ["compression_ratio" in result.ranks.state.measured for result in levels]
    assert leads == [True, False, True, False]


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1, 1], [0, 1, 0, 1, 2]])
@effort.examples(8, 60)
@given(data=st.data())
def test_hosts_lose_ranks_at_any_call(hosts: list[int], data: st.DataObject) -> None:
    """Whichever ranks are killed, leaders and whole hosts included, those that are left end with the same
    weights, and every sample was trained once an epoch."""
    dead = data.draw(st.sets(st.integers(0, 4), max_size=4))
    kill_at = {rank: data.draw(st.integers(6, 250)) for rank in sorted(dead)}
    compress = data.draw(st.sampled_from(["none", "topk:0.5", "powersgd:1"]))
    options = {"strategy": "two-level", "sync_across_hosts": 3, "compress": compress}
    results = run_in_threads(5, lambda world: loop(world, options), kill_at=kill_at, hosts=hosts)
    left = [result for result in results if result is not Killed and result is not None]
    assert len(left) >= 5 - len(dead)
    for weights, counts in left:
        assert np.array_equal(weights, left[0][0])
        assert all((trained == 1).all() for trained in counts)
