"""Sums in the memory that ranks of one host share."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.comm import shared_memory
from rankwise.comm.shared_memory import CAPACITY, SharedMemory, Spot, Sum
from rankwise.comm.transport import COMBINE, Op
from rankwise.errors import OutOfStepError, RankLost

from .conftest import Command, mpiexec_words

if shared_memory.why_not():
    pytest.skip(shared_memory.why_not(), allow_module_level=True)

Program = Callable[[SharedMemory, int], Any]


def on_ranks(ranks: int, program: Program) -> list[Any]:
    """What a program returns on ranks that are threads, each with a map of the same memory of its own."""
    first, offer = shared_memory.make(ranks)
    maps = [first, *(shared_memory.find(offer, ranks) for _ in range(ranks - 1))]
    shared_memory.close(offer)
    results: list[Any] = [None] * ranks

    def work(rank: int) -> None:
        try:
            results[rank] = program(maps[rank], rank)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def meet(spot: Spot) -> None:
    """Wait as long as it takes."""
    while not spot():
        time.sleep(0)


def part_of(rank: int, size: int, dtype: str, turn: int) -> np.ndarray[Any, Any]:
    """What a rank brings: numbers whose sum hangs on the order in which they are added."""
    random = np.random.default_rng([rank, size, turn])
    if dtype in ("float32", "float64"):
        return (random.standard_normal(size) * 10.0 ** random.integers(-6, 6, size)).astype(dtype)
    return random.integers(0, 1 << 15, size).astype(dtype)


def in_order(parts: Sequence[np.ndarray[Any, Any]], op: Op) -> np.ndarray[Any, Any]:
    """The sum in rank order, by numpy."""
    total = parts[0].copy()
    for part in parts[1:]:
        COMBINE[op](total, part, out=total)
    return total


KINDS: list[tuple[Op, str]] = [
    ("sum", "float32"),
    ("sum", "float64"),
    ("sum", "int64"),
    ("sum", "uint8"),
    ("max", "float64"),
    ("sum-bf16", "uint16"),
]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_all_ranks_get_the_sum_in_rank_order(ranks: int) -> None:
    """Each rank gets the bits of the sum in rank order, of any size, type and operation, one after the other
    in the same memory; other buffers stay as they were brought until then."""
    cases = [(op, dtype, size) for op, dtype in KINDS for size in (0, 1, 7, 1001, 40_003)]

    def program(memory: SharedMemory, rank: int) -> list[bytes]:
        found = []
        for turn, (op, dtype, size) in enumerate(cases):
            buffer = part_of(rank, size, dtype, turn)
            Sum(memory, range(ranks), rank, buffer, op).add_up(meet)
            found.append(buffer.tobytes())
        return found

    results = on_ranks(ranks, program)
    for turn, (op, dtype, size) in enumerate(cases):
        expected = in_order([part_of(rank, size, dtype, turn) for rank in range(ranks)], op)
        for rank in range(ranks):
            assert results[rank][turn] == expected.tobytes(), (op, dtype, size, rank)


def test_other_sums_are_refused() -> None:
    """Ranks that bring arrays of different lengths or types to one sum all get one line that says so."""

    def program(memory: SharedMemory, rank: int) -> None:
        Sum(memory, range(2), rank, np.zeros(3 + rank), "sum").add_up(meet)

    for error in on_ranks(2, program):
        assert isinstance(error, OutOfStepError)
        assert "brings another kind or number of numbers" in str(error)


@pytest.mark.parametrize("size", [7, 40_003])
@pytest.mark.parametrize("meetings", [0, 1, 2])
def test_the_others_go_on_without_a_lost_rank(size: int, meetings: int) -> None:
    """A rank that is lost before it brings its part, or at its first or second meeting, is missed by those
    that wait for it; after a repair the others get the right sums, whatever each of them had come to."""
    repaired = threading.Barrier(2)

    def program(memory: SharedMemory, rank: int) -> tuple[str, bytes]:
        left = meetings

        def lost(spot: Spot) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise RankLost("this is the one")
            meet(spot)

        def waiting(spot: Spot) -> None:
            end = time.monotonic() + 0.3
            while not spot():
                time.sleep(0)
                if time.monotonic() > end:
                    raise RankLost("a rank was lost")

        for turn in range(3):
            Sum(memory, range(3), rank, part_of(rank, size, "float32", turn), "sum").add_up(meet)
        outcome = "whole"
        buffer = part_of(rank, size, "float32", 3)
        try:
            if rank == 1 and not meetings:
                return "lost", b""
            part = Sum(memory, range(3), rank, buffer, "sum")
            part.add_up(lost if rank == 1 else waiting)
        except RankLost:
            outcome = "failed"
        if rank == 1:
            return "lost", b""
        repaired.wait(30)
        memory.begin_again(1)
        for turn in range(4, 7):
            buffer = part_of(rank, size, "float32", turn)
            Sum(memory, [0, 2], rank // 2, buffer, "sum").add_up(meet)
        return outcome, buffer.tobytes()

    results = on_ranks(3, program)
    expected = in_order([part_of(rank, size, "float32", 6) for rank in (0, 2)], "sum").tobytes()
    assert results[1][0] == "lost"
    assert results[0][1] == results[2][1] == expected
    if not meetings:
        assert results[0][0] == results[2][0] == "failed"


def test_memory_of_another_process_is_not_taken() -> None:
    """Where the number of a process or file means another one, as in a container, nothing is mapped."""
    _, offer = shared_memory.make(2)
    shared_memory.close(offer)
    other = os.memfd_create("another")
    with pytest.raises(OSError, match="is another one"):
        shared_memory.find(offer._replace(file=other), 2)
    assert os.fstat(other).st_size == 0
    os.close(other)


def test_what_is_too_large_goes_by_messages() -> None:
    """What does not fit into a slot, or is no number, is left to the library."""
    assert shared_memory.takes(np.empty(CAPACITY, np.uint8))
    assert not shared_memory.takes(np.empty(CAPACITY + 1, np.uint8))
    assert not shared_memory.takes(np.empty((4, 4))[:, :2])
    assert not shared_memory.takes(np.empty(3, bool))


KILLED = """
import os, sys, time
import numpy as np
from rankwise.comm import shared_memory
from rankwise.comm.mpi import mpi_world
from rankwise.errors import RankLost
from rankwise.system.machine import kill_self

world = mpi_world()
number, size = world.number, int(sys.argv[1])
assert world._transport._sums is not None, world._transport.why_no_sharing
for lost, moment in ((1, sys.argv[2]), (0, sys.argv[3])):
    real = shared_memory.Sum.add_up
    for turn in range(20):
        flat = np.full(size, float(number + turn), np.float32)
        try:
            if turn == 10 and number == lost:
                if moment == "before":
                    kill_self()
                def killed(self, meet):
                    count = [0]
                    def dies(spot):
                        count[0] += 1
                        if moment == f"meeting {count[0]}":
                            kill_self()
                        meet(spot)
                    real(self, dies)
                    kill_self()
                shared_memory.Sum.add_up = killed
            world.allreduce(flat)
            assert (flat == sum(world.members) + turn * world.size).all(), (number, turn, flat[:3])
        except RankLost:
            world.repair()
    assert lost not in world.members
assert len(world.members) == 2
flat = np.full(size, float(number), np.float32)
world.allreduce(flat)
assert (flat == sum(world.members)).all()
world.reconcile()
totals = world.ledger.close()
assert sum(totals.phases_ns.values()) == totals.wall_ns and totals.phases_ns["recovery"] > 0
print("whole", flush=True)
world.close()
"""


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.cold
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("size", "first", "second"), [(40_003, "before", "meeting 2"), (40_003, "meeting 1", "after")]
)
def test_real_ranks_are_killed_in_a_sum(
    command: Command, tmp_path: Path, size: int, first: str, second: str
) -> None:
    """Of four real ranks two are killed one after the other, before their part of a sum, where they meet, or
    after it: the others find out, go on with right sums, close their ledgers, and leave no memory behind."""
    before = set(os.listdir("/dev/shm"))
    (tmp_path / "killed.py").write_text(KILLED)
    mpiexec = mpiexec_words(4)
    words = [sys.executable, "killed.py", str(size), first, second]
    done = command(mpiexec[0], "--with-ft", "ulfm", *mpiexec[1:], *words)
    assert done.out.split() == ["whole", "whole"], done
    assert {name for name in os.listdir("/dev/shm") if "rankwise" in name} <= before


UNSHARED = """
import numpy as np
from rankwise.comm import shared_memory
from rankwise.comm.mpi import mpi_world

def find(offer, ranks):
    raise OSError("not allowed")

shared_memory.find = find
world = mpi_world()
flat = np.arange(7.0) + world.rank
world.allreduce(flat)
assert (flat == 2 * np.arange(7.0) + 1).all()
print(world.why_no_sharing, flush=True)
world.close()
"""


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_ranks_that_cannot_map_it_go_by_messages(command: Command, tmp_path: Path) -> None:
    """Where one rank cannot map the memory of another all of them add up by messages, and know why."""
    (tmp_path / "unshared.py").write_text(UNSHARED)
    done = command.mpiexec(2, "unshared.py")
    assert done.code == 0, done
    assert done.out.count("memory of another rank cannot be mapped (not allowed)") == 2
