"""One rank of a real training into which delays are built; prints what its ledger says of each.

    delays.py TOPOLOGY KIND:RANK:LENGTH_S ...

Each case is an epoch in which RANK is held up by LENGTH_S: in each round in KIND data, forward, pack or
optimizer (a master's work); or it is stopped from outside once, in KIND stop-training at any moment, in
KIND stop-exchange in a loop that does nothing but exchange. In KIND barriers it is held up in forward,
and there is a barrier before each exchange.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch

import rankwise.training.loop
from rankwise.comm import World, join
from rankwise.config import TrainConfig
from rankwise.data import prepare
from rankwise.data.feed import Feed
from rankwise.data.selection import select
from rankwise.ledger.phases import PHASES
from rankwise.models.replica import Replica
from rankwise.plan import resolve
from rankwise.strategies import exchange
from rankwise.training.book import Book
from rankwise.training.loop import ImageJob, train_epoch
from rankwise.training.rank import _make_job, _make_replica

ROUNDS = 3
LATEST_STOP_S = 0.4


def late(function: Callable[..., Any], length_s: float) -> Callable[..., Any]:
    """The function, held up each time."""

    def held_up(*arguments: Any, **options: Any) -> Any:
        time.sleep(length_s)
        return function(*arguments, **options)

    return held_up


def held_up(kind: str, length_s: float) -> contextlib.AbstractContextManager[Any]:
    """While inside, this rank is held up."""
    if kind == "data":
        return mock.patch.object(Feed, "take", late(Feed.take, length_s))
    if kind in ("forward", "barriers"):
        loss = rankwise.training.loop.F.cross_entropy
        return mock.patch.object(rankwise.training.loop.F, "cross_entropy", late(loss, length_s))
    if kind == "pack":
        return mock.patch.object(Replica, "pack", late(Replica.pack, length_s))
    if kind == "optimizer":
        return mock.patch.object(exchange, "add_up_rows", late(exchange.add_up_rows, length_s))
    # Somebody else stops this process in a moment, for so long.
    me, moment_s = os.getpid(), random.uniform(0.05, LATEST_STOP_S)
    script = f"sleep {moment_s}; kill -STOP {me}; sleep {length_s}; kill -CONT {me}"
    return subprocess.Popen(["sh", "-c", script])


def told(world: World) -> dict[str, Any]:
    """What the ledger says so far, in seconds."""
    world.barrier()
    world.reconcile()
    totals = world.ledger.close()
    assert sum(totals.phases_ns.values()) == totals.wall_ns
    assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
    said = {phase: totals.phases_ns[phase] for phase in PHASES}
    said |= {f"wait_on_{rank}": world.exchange_log.wait_on_ns[rank] for rank in range(world.size)}
    said["barrier"] = world.barrier_wait_ns
    return {name: ns / 1e9 for name, ns in said.items()}


def main(topology: str, *cases: str) -> None:
    world = join()
    torch.set_num_threads(1)
    dataset = prepare("digits")
    config = resolve(
        TrainConfig(
            dataset="digits",
            model="mlp",
            ranks=world.size,
            strategy="parameter-averaging",
            topology=topology,
            batch_size=8,
            sync_every=1,
            threads=1,
            train_limit=8 * ROUNDS * (world.size - (topology == "master")),
        )
    )
    chosen = select(config, dataset)
    replica = _make_replica(config, dataset, chosen, begins=True)
    job = _make_job(config, dataset, chosen, replica, world, Book(), is_refilled=False)
    train_epoch(job, 1)  # warms up
    for case in cases:
        kind, rank, length_s = case.split(":")
        before, started_s = told(world), time.monotonic()
        mine = world.rank == int(rank)
        with held_up(kind, float(length_s)) if mine else contextlib.nullcontext():
            live(job, kind, float(length_s))
        said = {"case": case, "rank": world.rank, "elapsed": time.monotonic() - started_s}
        after = told(world)
        print(json.dumps(said | {name: after[name] - before[name] for name in after}), flush=True)


def live(job: ImageJob, kind: str, length_s: float) -> None:
    """What goes on while a rank is held up."""
    world, topology = job.synchroniser.world, job.config.topology
    started_s = time.monotonic()
    world.cross_check = kind == "barriers"
    if kind == "stop-exchange":
        weights = np.zeros(100_000)
        while not over(world, started_s, length_s):
            for _ in range(50):
                if topology == "allreduce":
                    world.allreduce(weights)
                else:
                    exchange.add_up_by_master(weights, np.eye(1, world.size)[0], world)
    elif kind == "stop-training":
        epoch = 1
        while not over(world, started_s, length_s):
            epoch += 1
            train_epoch(job, epoch)
    else:
        train_epoch(job, 2)
    world.cross_check = False


def over(world: World, started_s: float, length_s: float) -> bool:
    """Whether the stop is surely over; all ranks find the same."""
    latest_s = np.array([time.monotonic() - started_s])
    world.allreduce(latest_s, op="max")
    return bool(latest_s[0] > LATEST_STOP_S + length_s)


if __name__ == "__main__":
    main(*sys.argv[1:])
