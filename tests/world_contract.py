"""What any world must do, whatever its transport and size: run under mpiexec, and on threads."""

from __future__ import annotations

import numpy as np

from rankwise.comm import World
from rankwise.comm.half_precision import from_words, to_words
from rankwise.ledger.stalls import NO_STALLS


def check(world: World) -> None:
    """Raise AssertionError unless this rank sees what it should."""
    size, rank = world.size, world.rank
    for dtype in (np.float32, np.float64, np.int64, np.uint64):
        for length in (1, 7, 100_003):
            mine = (np.arange(length) + rank).astype(dtype)
            total = mine.copy()
            world.allreduce(total)
            assert np.array_equal(total, size * np.arange(length) + size * (size - 1) / 2)
            largest = mine.copy()
            world.allreduce(largest, op="max")
            assert np.array_equal(largest, np.arange(length) + size - 1)
            for root in {0, size - 1}:
                rows = world.gather(mine, root)
                assert (rows is not None) == (rank == root)
                if rows is not None:
                    assert np.array_equal(rows, np.arange(length) + np.arange(size)[:, None])
                copy = mine.copy()
                world.broadcast(copy, root)
                assert np.array_equal(copy, np.arange(length) + root)
    for kind, op in (("fp16", "sum-fp16"), ("bf16", "sum-bf16")):
        words = to_words(np.arange(1000, dtype=np.float32) / 8 % 16 + rank, kind)
        world.allreduce(words, op=op)
        exact = size * (np.arange(1000) / 8 % 16) + size * (size - 1) / 2
        assert np.allclose(from_words(words, kind), exact, rtol=size * 2.0**-7)
    assert world.allgather_object({"rank": rank}) == [{"rank": r} for r in range(size)]
    for length in (1, 7, 100_003):
        messages(world, length)
        started = [world.start_allreduce(np.full(length, rank + turn)) for turn in range(3)]
        for exchange in started:
            exchange.wait()
    counts, asked = np.arange(size) % 3 + rank % 2, rank % 3 + np.arange(size) % 2
    swapped = np.empty(asked.sum(), np.int64)
    world._transport.swap(np.repeat(100 * np.arange(size) + rank, counts), counts, swapped, asked).wait(
        NO_STALLS
    )
    assert np.array_equal(swapped, np.repeat(100 * rank + np.arange(size), asked))
    empty = np.empty(0)
    world.allreduce(empty)
    world.broadcast(empty)
    world.barrier()
    world.reconcile()
    totals = world.ledger.close()
    assert sum(totals.phases_ns.values()) == totals.wall_ns
    assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
    traffic = world.allgather(np.array([world.traffic.bytes_sent, world.traffic.bytes_received]))
    assert traffic[:, 0].sum() == traffic[:, 1].sum()
    assert size == 1 or traffic.all()


def messages(world: World, length: int) -> None:
    """Messages come to whom they were sent, in order, from one rank or from whoever is first."""
    size, rank = world.size, world.rank
    others = [other for other in range(size) if other != rank]
    sent = [world.start_send(np.full(length, 10 * rank + turn), other) for turn in (0, 1) for other in others]
    buffer = np.zeros(length, np.int64)
    for other in others:
        assert world.receive(buffer, other) == other
        assert (buffer == 10 * other).all()
    came = set()
    for _ in others:
        source = world.receive(buffer)
        assert (buffer == 10 * source + 1).all()
        came.add(source)
    assert came == set(others)
    for exchange in sent:
        exchange.wait()
    world.barrier()


if __name__ == "__main__":
    from rankwise.comm.mpi import mpi_world

    world = mpi_world()
    check(world)
    print(f"{world.rank}/{world.size}", flush=True)
    world.close()
