"""How long torchft takes from the death of a process until the others have committed a step without it.

    pip install torchft
    python benchmarks/recovery_torchft.py [--processes 4] [--repeats 10]

The peer of recovery.py: the same network and batch, as many processes, each a replica group of its own over
gloo, with a lighthouse beside them. A process is killed in the middle of training, and each survivor's log of
committed steps shows the gap.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

STEPS_BEFORE = 60
WAIT_S = 60.0


def replica(number: int, lighthouse: str, log: Path) -> None:
    """One process: trains for ever, and writes down when each step was committed."""
    import torch
    import torch.nn.functional as F
    from torch.distributed import TCPStore
    from torchft import Manager, Optimizer, ProcessGroupGloo

    from rankwise import models

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = models.build("paper-cnn", (3, 32, 32), 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)

    def load(state: dict[str, dict[str, object]]) -> None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="localhost",
        store_port=store.port,
        lighthouse_addr=lighthouse,
        replica_id=f"replica-{number}",
        timeout=timedelta(seconds=10),
    )
    optimizer = Optimizer(manager, optimizer)
    images, labels = torch.randn(16, 3, 32, 32), torch.randint(0, 10, (16,))
    with log.open("w", buffering=1) as file:
        while True:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            # Not by its DistributedDataParallel, whose hook fails with torch 2.13.
            for work in [manager.allreduce(parameter.grad) for parameter in model.parameters()]:
                work.wait()
            before = manager.current_step()
            optimizer.step()
            if manager.current_step() > before:
                file.write(f"{time.time()} {manager.num_participants()}\n")


def commits(log: Path) -> list[tuple[float, int]]:
    """When steps were committed, and by how many."""
    lines = log.read_text().splitlines() if log.exists() else []
    return [(float(moment), int(n)) for moment, n in (line.split() for line in lines)]


def one_kill(processes: int, victim: int, scratch: Path, heartbeat_ms: int) -> float:
    """Seconds from a kill until the last survivor has committed a step with one process less."""
    from torchft.coordination import LighthouseServer

    lighthouse = LighthouseServer(
        bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=100, heartbeat_timeout_ms=heartbeat_ms
    )
    context = multiprocessing.get_context("spawn")
    logs = [scratch / f"{number}.log" for number in range(processes)]
    for log in logs:
        log.unlink(missing_ok=True)
    started = [
        context.Process(target=replica, args=(n, lighthouse.address(), log)) for n, log in enumerate(logs)
    ]
    for process in started:
        process.start()
    try:
        _until(lambda: all(sum(n == processes for _, n in commits(log)) > STEPS_BEFORE for log in logs))
        killed_s = time.time()
        os.kill(started[victim].pid or 0, signal.SIGKILL)
        left = [log for number, log in enumerate(logs) if number != victim]
        _until(lambda: all(_first_without(log, processes, killed_s) for log in left))
        return max(_first_without(log, processes, killed_s) for log in left) - killed_s
    finally:
        for process in started:
            process.kill()
            process.join()
        lighthouse.shutdown()


def _first_without(log: Path, processes: int, after_s: float) -> float:
    return next((moment for moment, n in commits(log) if moment > after_s and n == processes - 1), 0.0)


def _until(holds: Callable[[], object]) -> None:
    give_up = time.monotonic() + WAIT_S
    while not holds():
        if time.monotonic() > give_up:
            raise SystemExit("it did not come to it in time")
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument(
        "--heartbeat-ms", type=int, default=5000, help="when the lighthouse gives up; 5000 is its default"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found_ms = [
            1e3
            * one_kill(arguments.processes, turn % arguments.processes, Path(scratch), arguments.heartbeat_ms)
            for turn in range(arguments.repeats)
        ]
    print(
        f"torchft, {arguments.processes} processes, {arguments.repeats} kills: committed again after "
        f"{statistics.median(found_ms):.0f} ms (median; worst {max(found_ms):.0f})"
    )


if __name__ == "__main__":
    main()
