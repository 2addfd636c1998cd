"""One rank of a real training into which delays are built; prints what its ledger says of them.

    delays.py TOPOLOGY KIND RANK LENGTH_S

An epoch without any warms up. In the next, RANK is held up by LENGTH_S: in each round of KIND data, forward,
pack or optimizer (a master's work); or it is stopped from outside once, in KIND stop-training at any moment,
in KIND stop-exchange in a loop that does nothing but exchange. KIND none holds nobody up, with a
barrier before each exchange.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import rankwise.training
from rankwise import models
from rankwise.config import TrainConfig
from rankwise.data import prepare
from rankwise.ledger import PHASES
from rankwise.models.replica import Replica
from rankwise.record import RunFolder
from rankwise.run import _make_job
from rankwise.strategies import averaging, resolve
from rankwise.world import World, join

ROUNDS = 8


def late(function: Callable[..., Any], length_s: float) -> Callable[..., Any]:
    """The function, held up each time."""

    def held_up(*arguments: Any, **options: Any) -> Any:
        time.sleep(length_s)
        return function(*arguments, **options)

    return held_up


def hold_up(kind: str, length_s: float) -> None:
    """Build the delay into the code of this rank."""
    if kind == "data":
        feed = rankwise.training.feed

        def slow_feed(*arguments: Any, **options: Any) -> Any:
            for batch in feed(*arguments, **options):
                time.sleep(length_s)
                yield batch

        rankwise.training.feed = slow_feed  # type: ignore[assignment]
    elif kind == "forward":
        rankwise.training.F.cross_entropy = late(rankwise.training.F.cross_entropy, length_s)
    elif kind == "pack":
        Replica.pack = late(Replica.pack, length_s)  # type: ignore[method-assign]
    elif kind == "optimizer":
        averaging.mean_of_rows = late(averaging.mean_of_rows, length_s)


def stop_soon(length_s: float) -> None:
    """Let somebody else stop this process in a moment, for so long."""
    me, moment_s = os.getpid(), random.uniform(0.05, 0.4)
    script = f"sleep {moment_s}; kill -STOP {me}; sleep {length_s}; kill -CONT {me}"
    subprocess.Popen(["sh", "-c", script])


def told(world: World) -> dict[str, Any]:
    """What the ledger says so far, in seconds."""
    world.barrier()
    world.settle()
    totals = world.ledger.close()
    assert sum(totals.phases_ns.values()) == totals.wall_ns
    assert sum(world.wait_on_ns.values()) == totals.phases_ns["wait"]
    said = {phase: totals.phases_ns[phase] for phase in PHASES}
    said |= {f"wait_on_{rank}": world.wait_on_ns[rank] for rank in range(world.size)}
    said["barrier"] = world.barrier_wait_ns
    return {name: ns / 1e9 for name, ns in said.items()}


def main(topology: str, kind: str, rank: int, length_s: float) -> None:
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
    model = models.build("mlp", dataset.image_shape, len(dataset.classes))
    job = _make_job(config, dataset, model, world, RunFolder(Path("run")))
    rankwise.training.train_epoch(job, 1)
    before = told(world)
    if world.rank == rank and not kind.startswith("stop"):
        hold_up(kind, length_s)
    world.cross_check = kind == "none"
    if world.rank == rank and kind.startswith("stop"):
        stop_soon(length_s)
    if kind == "stop-exchange":
        # Until the stop is surely over: all ranks agree on it in the exchange itself.
        weights, started_s = np.zeros(100_000), time.monotonic()
        while weights[0] == 0:
            weights[0] = time.monotonic() - started_s > 1 + length_s
            if topology == "allreduce":
                world.allreduce(weights)
            else:
                averaging.average_by_master(weights, np.eye(1, world.size)[0], world)
    else:
        epochs = 60 if kind == "stop-training" else 20 if kind == "none" else 1
        for epoch in range(2, 2 + epochs):
            rankwise.training.train_epoch(job, epoch)
    world.cross_check = False
    after = told(world)
    said = {name: after[name] - before[name] for name in after}
    print(json.dumps({"rank": world.rank, **said}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4]))
