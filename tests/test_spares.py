"""Ranks that stand by: one takes the place of a rank that is lost, and nothing is lost with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.comm import World
from rankwise.comm.threads import Killed, run_in_threads
from rankwise.config import TrainConfig
from rankwise.data.partition import even_shares
from rankwise.errors import RankLost
from rankwise.runs.record import Record
from rankwise.training import synchroniser

from . import effort
from .test_survival import SYNCHRONOUS, loop
from .world_contract import check

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, Any, Any]]


@pytest.fixture(autouse=True)
def _logs_are_compared_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks are lost, and come in, between and in these exchanges too."""
    monkeypatch.setattr(synchroniser, "RECONCILE_ROUNDS", 2)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(0, 100), st.integers(1, 40))
def test_shares_are_even(sizes: list[int], extra: int, batch_size: int) -> None:
    """What is dealt out is all dealt out, and nobody gets any who then has two more than somebody else."""
    shares = even_shares(np.array(sizes), extra, np.full(len(sizes), float(batch_size)))
    assert shares.sum() == extra
    assert (shares >= 0).all()
    sums = np.array(sizes) + shares
    assert all(its <= sums.min() + 1 for its, share in zip(sums, shares, strict=True) if share)


def test_a_spare_comes_in() -> None:
    """A rank that stands by takes the place of a lost one, behind the others, and the world keeps its
    contract; one that is not needed learns that the others are done."""

    def program(world: World) -> tuple[list[int], list[Any]] | None:
        world.set_aside(3)
        if world.rank < 0:
            standings = world.stand_by()
            if standings is None:
                return None
            world.arrive(world.broadcast_object(None, 0))
        else:
            try:
                if world.rank == 1:
                    raise Killed
                world.allreduce(np.zeros(1))
                raise AssertionError
            except RankLost:
                standings = world.repair(world.rank)
            world.broadcast_object(world.exchange_log.ideal_time, 0)
        check(world)
        world.reconcile()
        totals = world.ledger.close()
        assert sum(totals.phases_ns.values()) == totals.wall_ns
        assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
        return world.members, standings

    results = run_in_threads(5, program)
    assert results[1] is Killed
    assert results[0] == results[2] == results[3] == ([0, 2, 3], [0, 2, None])
    assert results[4] is None


@pytest.mark.parametrize(
    ("strategy", "compress"),
    effort.rotating(
        ["parameter-averaging", "local-sgd", "allreduce", "gradient-server", "slowmo", "diloco"],
        ["none", "powersgd:2"],
    ),
)
@effort.examples(4, 60)
@given(size=st.integers(2, 4), spares=st.integers(1, 2), data=st.data())
def test_spares_come_in_at_any_call(
    strategy: str, compress: str, size: int, spares: int, data: st.DataObject
) -> None:
    """Whichever ranks are killed at whichever calls, spares and ranks that come in among them: those that are
    left end with the same weights, and every sample was trained once an epoch."""
    everybody = range(size + spares)
    dead = data.draw(st.sets(st.sampled_from(everybody), max_size=size + spares - 1))
    kill_at = {rank: data.draw(st.integers(12, 90)) for rank in sorted(dead)}
    options = {"strategy": strategy}
    if strategy != "gradient-server" or compress == "none":
        options["compress"] = compress
    if strategy == "parameter-averaging":
        options["sync_every"] = 3
    try:
        results = run_in_threads(
            size + spares, lambda world: loop(world, options, spares=spares), kill_at=kill_at
        )
    except RankLost:
        assert len(dead) >= size  # nobody was left who knew where the run was
        return
    left = [result for result in results if result is not Killed and result is not None]
    assert left or len(dead) >= size
    for weights, counts in left:
        assert np.array_equal(weights, left[0][0])
        assert all((trained == 1).all() for trained in counts)


@pytest.mark.parametrize(("first", "second"), [(16, 32), (16, 33), (32, 16)])
def test_a_newcomer_lets_in_the_next(first: int, second: int) -> None:
    """A spare that gets its start from another newcomer, in the same round, begins at the last commit too,
    and not with what that one has trained since."""
    options = {"strategy": "local-sgd", "compress": "powersgd:2"}
    kill_at = {0: first, 1: second}
    results = run_in_threads(4, lambda world: loop(world, options, spares=2), kill_at=kill_at)
    (one, counts), (two, _) = results[2], results[3]
    assert np.array_equal(one, two)
    assert all((trained == 1).all() for trained in counts)


@pytest.mark.parametrize(("strategy", "topology", "lost"), effort.rotating(SYNCHRONOUS, [0, 1], one_in=2))
def test_back_to_full_strength(
    config: Make, train_in_threads: Train, strategy: str, topology: str, lost: int
) -> None:
    """A run with a spare that loses a rank ends with as many as it began with, all samples trained, and both
    ranks in the record."""
    options = {"strategy": strategy, "topology": topology, "train_limit": 200, "val_limit": 50}
    made = config(
        ranks=3,
        spares=1,
        epochs=3,
        batch_size=16,
        on_failure="continue",
        fault=[f"kill:rank={lost},epoch=2"],
        **options,
    )
    record, _, _ = train_in_threads(made)
    assert record.outcome == "completed"
    assert [row.epoch for row in record.epochs] == [1, 2, 3]
    assert record.samples.trained == record.samples.expected
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert [row.rank for row in record.ranks] == [0, 1, 2, 3]
    assert [row.rank for row in record.ranks if row.died_at_s is not None] == [lost]
    assert "spare" not in {row.role for row in record.ranks}
    for row in record.ranks:
        assert sum(row.phases_ns.values()) == row.wall_ns


def test_a_spare_that_is_not_needed(config: Make, train_in_threads: Train) -> None:
    """A spare sleeps through a run without faults, and stands in the record as one."""
    record, _, _ = train_in_threads(config(ranks=2, spares=2, on_failure="continue"))
    assert record.outcome == "completed"
    assert [row.role for row in record.ranks][2:] == ["spare", "spare"]
    assert record.samples.trained == record.samples.expected
