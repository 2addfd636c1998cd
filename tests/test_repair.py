"""A world that loses ranks: those that are left find out, meet, and go on with time accounted for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.comm import Traffic, World
from rankwise.comm.threads import Killed, run_in_threads
from rankwise.errors import RankLost

from . import effort
from .world_contract import check


def exchange(world: World, turns: int) -> None:
    """Some exchanges of each kind."""
    for _ in range(turns):
        flat = np.full(3, float(world.rank))
        world.allreduce(flat)
        assert (flat == sum(range(world.size))).all()
        world.gather(flat)
        world.broadcast(flat, world.size - 1)
        world.start_allreduce(flat).wait()
        if world.size > 1:
            receives = world.start_receive(np.empty(3), (world.rank - 1) % world.size)
            world.send(flat, (world.rank + 1) % world.size)
            receives.wait()


def survive(world: World, turns: int) -> list[int]:
    """Exchange, and go on without whoever is lost; returns the members at the end."""
    while True:
        try:
            exchange(world, turns)
            world.traffic = Traffic()  # what was sent and never came is of no interest here
            check(world)
            return world.members
        except RankLost:
            standings = world.repair(("rank", world.rank))
            assert len(standings) == world.size


@effort.examples(10, 100)
@given(st.integers(2, 6), st.data())
def test_ranks_go_on_without_those_that_are_lost(size: int, data: st.DataObject) -> None:
    """Whichever ranks are killed at whichever of their calls, also while others repair, those that are left
    agree who they are, keep the world's contract, and their ledgers close."""
    dead = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    last_calls = {rank: data.draw(st.integers(0, 40)) for rank in sorted(dead)}
    results = run_in_threads(size, lambda world: survive(world, 3), kill_at=last_calls)
    left = [rank for rank, result in enumerate(results) if result is not Killed]
    assert set(left) >= set(range(size)) - dead
    for rank in left:
        assert rank in results[rank]
        # Whoever is no member for this rank was killed, or had come to its end before.
        assert results[rank] == sorted(set(results[rank]))


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_waiting_is_charged_under_first_numbers(lost: int) -> None:
    """Waiting for a rank is booked under the number that it began with, before and after another is lost."""

    def program(world: World) -> dict[int, int]:
        try:
            exchange(world, 2)
            if world.rank == lost:
                raise Killed
            exchange(world, 1)
        except RankLost:
            world.repair()
        exchange(world, 2)
        world.reconcile()
        totals = world.ledger.close()
        assert sum(totals.phases_ns.values()) == totals.wall_ns
        assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
        assert totals.phases_ns["recovery"] > 0
        return dict(world.exchange_log.wait_on_ns)

    results = run_in_threads(3, program)
    assert results[lost] is Killed
    for rank in {0, 1, 2} - {lost}:
        assert set(results[rank]) <= {0, 1, 2} - {rank}
