"""A world of threads in one process: for one rank, and for tests and scripts without MPI."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from rankwise.errors import RankLost
from rankwise.ledger import Ledger
from rankwise.world.world import Buffer, Op, World

T = TypeVar("T")


class _Board:
    """Where the threads of one world meet: a slot a rank, and a barrier before and after reading."""

    def __init__(self, size: int) -> None:
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        try:
            self.slots[rank] = value
            self.barrier.wait()
            seen = list(self.slots)
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise RankLost(f"rank {rank} waited for a rank that has ended") from None
        return seen


class ThreadTransport:
    """One thread's place at the board."""

    one_clock = True

    def __init__(self, rank: int, size: int, board: _Board) -> None:
        self.rank = rank
        self.size = size
        self._board = board

    def allreduce(self, buffer: Buffer, op: Op) -> None:
        combine = np.add if op == "sum" else np.maximum
        parts = self._board.exchange(self.rank, buffer.copy())
        buffer[...] = parts[0]
        for part in parts[1:]:
            combine(buffer, part, out=buffer)

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> None:
        rows = self._board.exchange(self.rank, buffer.copy())
        if into is not None:
            into[...] = rows

    def broadcast(self, buffer: Buffer, root: int) -> None:
        buffer[...] = self._board.exchange(self.rank, buffer.copy() if self.rank == root else None)[root]

    def allgather_object(self, value: Any) -> list[Any]:
        return self._board.exchange(self.rank, value)

    def describe(self) -> str:
        return f"threads of Python {platform.python_version()}"

    def abort(self, code: int) -> None:
        self._board.barrier.abort()

    def close(self) -> None:
        """Nothing to leave: the threads end by themselves."""


def solo_world(ledger: Ledger | None = None) -> World:
    """The world of one rank; needs no MPI."""
    return World(ThreadTransport(0, 1, _Board(1)), ledger)


def run_in_threads(size: int, program: Callable[[World], T]) -> list[T]:
    """Run `program` on `size` ranks, each a thread of this process; results in rank order.

    If a rank raises, the others are released from whatever they wait for, and the error of the
    first rank that failed is raised here. The threads share torch's global random state.
    """
    board = _Board(size)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = program(World(ThreadTransport(rank, size, board)))
        except BaseException as error:  # handed to the caller below, whatever it is
            failures.append(error)
            board.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, RankLost)), failures[0])
    return results
