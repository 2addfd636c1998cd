"""Waiting told apart from transfer, and charged to the rank that caused it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankwise.ledger import Ledger
from rankwise.world import World, run_in_threads
from rankwise.world.threads import ThreadTransport
from rankwise.world.waits import Pattern, split

TRANSFER_NS = 1_000


@st.composite
def logs(draw: st.DrawFn) -> np.ndarray:
    ranks, exchanges = draw(st.integers(2, 6)), draw(st.integers(0, 20))
    log = np.zeros((ranks, exchanges, 4), np.int64)
    log[:, :, 0] = draw(arrays(np.int64, exchanges, elements=st.integers(0, 2)))
    log[:, :, 1] = draw(arrays(np.int64, exchanges, elements=st.integers(0, ranks - 1)))
    log[:, :, 2] = draw(arrays(np.int64, (ranks, exchanges), elements=st.integers(0, 10**15)))
    log[:, :, 3] = log[:, :, 2] + draw(arrays(np.int64, (ranks, exchanges), elements=st.integers(0, 10**12)))
    return log


@given(logs())
def test_waiting_is_a_part_of_the_exchange_and_charged_to_others(log: np.ndarray) -> None:
    """Whatever the times, a rank waits no longer than it was in its exchanges, all of it is charged, and none
    to itself."""
    for rank in range(len(log)):
        found = split(log, rank)
        assert 0 <= found.wait_ns <= (log[rank, :, 3] - log[rank, :, 2]).sum()
        assert sum(found.wait_on_ns.values()) == found.wait_ns
        assert all(ns > 0 for ns in found.wait_on_ns.values())
        assert rank not in found.wait_on_ns


@given(logs())
def test_the_last_to_come_does_not_wait(log: np.ndarray) -> None:
    """In an exchange of all with all the rank that enters last waits for nobody."""
    log[:, :, 0] = Pattern.ALL_TO_ALL
    for exchange in range(log.shape[1]):
        last = int(log[:, exchange, 2].argmax())
        assert split(log[:, exchange : exchange + 1], last).wait_ns == 0


def test_clocks_that_contradict_each_other_are_counted() -> None:
    """If somebody left an exchange of all before somebody else had come, the clocks disagree."""
    log = np.array([[[0, 0, 0, 10]], [[0, 0, 20, 30]]], np.int64)
    assert split(log, 0).violations == 1
    log[0, 0, 3] = 25
    assert split(log, 0).violations == 0


class Clock:
    """A rank's clock in a simulation: it moves when the program works, or an exchange makes it wait."""

    def __init__(self) -> None:
        self.now_ns = 1_000_000

    def __call__(self) -> int:
        return self.now_ns


class SimulatedTransport(ThreadTransport):
    """Threads whose exchanges take simulated time: until the rank is there without whom it cannot go on, and
    then TRANSFER_NS."""

    def __init__(self, rank: int, size: int, board: Any, clock: Clock) -> None:
        super().__init__(rank, size, board)
        self.clock = clock

    def _pass(self, needed: Any) -> None:
        entries = super().allgather_object(self.clock.now_ns)
        self.clock.now_ns = max(self.clock.now_ns, *(entries[rank] for rank in needed)) + TRANSFER_NS

    def allreduce(self, buffer: Any, op: Any) -> None:
        self._pass(range(self.size))
        super().allreduce(buffer, op)

    def gather(self, buffer: Any, root: int, into: Any) -> None:
        self._pass(range(self.size) if self.rank == root else [root])
        super().gather(buffer, root, into)

    def broadcast(self, buffer: Any, root: int) -> None:
        self._pass([root])
        super().broadcast(buffer, root)

    def allgather_object(self, value: Any) -> list[Any]:
        self._pass(range(self.size))
        return super().allgather_object(value)


def simulate(size: int, program: Any) -> list[World]:
    """Run a program(world, clock) on ranks with simulated time."""

    def start(outer: World) -> World:
        clock = Clock()
        transport = SimulatedTransport(outer.rank, size, outer._transport._board, clock)  # type: ignore[attr-defined]
        world = World(transport, Ledger(clock))
        program(world, clock)
        world.settle()
        return world

    return run_in_threads(size, start)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("exchange", ["allreduce", "master", "broadcast"])
def test_an_injected_delay_is_charged_to_its_rank(size: int, exchange: str) -> None:
    """A delay of known length in rank k's work shows up as the others' wait for k, to the nanosecond, with a
    master and without."""
    delay_ns = 777_000_000
    for slow in range(size):

        def program(world: World, clock: Clock, slow: int = slow) -> None:
            for _ in range(3):
                world.ledger.enter("forward")
                clock.now_ns += delay_ns if world.rank == slow else 0
                world.ledger.enter("other")
                buffer = np.zeros(4)
                if exchange == "allreduce":
                    world.allreduce(buffer)
                elif exchange == "master":
                    world.gather(buffer, 0)
                    world.broadcast(buffer, 0)
                else:
                    world.broadcast(buffer, slow)

        worlds = simulate(size, program)
        for world in worlds:
            wall_ns, phases_ns = world.ledger.close()
            assert sum(phases_ns.values()) == wall_ns
            assert sum(world.wait_on_ns.values()) == phases_ns["wait"]
            assert phases_ns["forward"] == (3 * delay_ns if world.rank == slow else 0)
        for world in worlds:
            if world.rank != slow:
                waited_ns = world.ledger.close()[1]["wait"]
                assert waited_ns == pytest.approx(3 * delay_ns, abs=20 * TRANSFER_NS)
                assert world.wait_on_ns[slow] == pytest.approx(waited_ns, abs=20 * TRANSFER_NS)
            else:
                assert world.ledger.close()[1]["wait"] <= 20 * TRANSFER_NS


def test_a_long_log_is_settled_on_the_way() -> None:
    """However many exchanges, the log stays short, and the sums are right."""

    def program(world: World, clock: Clock) -> None:
        for _ in range(10_000):
            clock.now_ns += 500 * world.rank
            world.allreduce(np.zeros(1))
            assert len(world._log) <= 4097

    fast, slow = simulate(2, program)
    assert fast.ledger.close()[1]["wait"] == pytest.approx(10_000 * 500, rel=0.001)
    assert slow.ledger.close()[1]["wait"] == 0
