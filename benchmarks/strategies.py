"""How fast two ranks on two cores keep in step, as ratios of things measured in turn in one run.

    python benchmarks/strategies.py [--samples 20000] [--repeats 5] [--data-dir DIR]

1. Images a second of two ranks under each strategy, against two single ranks side by side that never
   talk, and against PyTorch's DistributedDataParallel over gloo under the same loop.
2. What a synchronised step adds to a bare Allreduce of the same bytes.
3. Gradients in one piece against pieces that go out during the backward pass, for a large network.

Nothing else may run beside it. Without --data-dir it trains on made images of CIFAR-10's shape.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import command, finish, images_per_s, record_of, spread, start, turns_of

TEAMS = {
    "ddp": ["--strategy", "ddp"],
    "allreduce": ["--strategy", "allreduce"],
    "allreduce bf16": ["--strategy", "allreduce", "--compress", "bf16"],
    "local-sgd 16": ["--strategy", "local-sgd", "--sync-every", 16],
    "gossip": ["--strategy", "gossip"],
}


def two_ranks(arguments: argparse.Namespace, scratch: Path) -> None:
    for batch in (16, 32, 128):
        base = ["--batch-size", batch, "--threads", 1, "--epochs", 3]

        def singles(place: Path, base: list[object] = base) -> float:
            options = [*base, "--train-limit", arguments.samples]
            paths = [place / str(seed) for seed in (0, 1)]
            finish(*(start(command(arguments, *options, "--seed", s, out=p)) for s, p in enumerate(paths)))
            return sum(images_per_s(record_of(path)) for path in paths)

        def team(place: Path, words: list[object], base: list[object] = base) -> float:
            options = [*base, "--train-limit", 2 * arguments.samples, "--ranks", 2, *words]
            finish(start(command(arguments, *options, out=place)))
            return images_per_s(record_of(place))

        takers: dict[str, Callable[[Path], float]] = {"never talk": singles}
        takers |= {name: lambda place, w=words: team(place, w) for name, words in TEAMS.items()}
        turns = turns_of(takers, arguments.repeats, scratch / f"batch-{batch}")
        print(f"\nTwo ranks, batch {batch}: images/s; against two that never talk; against ddp")
        for name in takers:
            print(
                f"{name:>15} {spread([row[name] for row in turns], 0):>24}"
                f"  {spread([row[name] / row['never talk'] for row in turns], 3):>24}"
                f"  {spread([row[name] / row['ddp'] for row in turns], 3):>24}"
            )


EXCHANGES = """
import json, statistics, sys, time
import numpy as np
import torch
from mpi4py import MPI
import rankwise
from rankwise.models.paper_cnn import PaperCNN
from rankwise.models.replica import Replica
from rankwise.strategies.buckets import Buckets

torch.set_num_threads(1)
world = rankwise.join()
model = PaperCNN((3, 32, 32), 10)
replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.001))
model(torch.zeros(2, 3, 32, 32)).sum().backward()
buckets = Buckets(replica.parameters, float("inf"), world)
bare = np.zeros(replica.size + 1, np.float32)

def ours():
    buckets.expect(0.5, sends=True)
    buckets.add()
    buckets.reduce()
    buckets.give()

def plain():
    MPI.COMM_WORLD.Allreduce(MPI.IN_PLACE, bare)

ratios = []
for turn in range(int(sys.argv[1])):
    times = {}
    for call in (ours, plain) if turn % 2 else (plain, ours):
        MPI.COMM_WORLD.Barrier()
        started = time.perf_counter()
        for _ in range(2000):
            call()
        times[call] = (time.perf_counter() - started) / 2000
    ratios.append((times[ours] * 1e6, times[plain] * 1e6))
if world.rank == 0:
    print(json.dumps(ratios))
world.close()
"""


def bare_exchange(arguments: argparse.Namespace, scratch: Path) -> None:
    from rankwise.comm.mpi_environment import find_mpiexec, mpi_environment

    scratch.mkdir(parents=True)
    program = scratch / "exchanges.py"
    program.write_text(EXCHANGES)
    words = [str(find_mpiexec().path), "-n", "2", sys.executable, str(program), str(arguments.repeats)]
    done = subprocess.run(words, env=mpi_environment(), stdout=subprocess.PIPE, check=True, text=True)
    rows = json.loads(done.stdout.splitlines()[-1])
    print("\nAn exchange of the gradients of paper-cnn on 2 ranks, microseconds")
    print(f"{'Allreduce alone':>30} {spread([plain for _, plain in rows], 0)}")
    print(f"{'with packing and ledger':>30} {spread([ours for ours, _ in rows], 0)}")
    print(f"{'ratio':>30} {spread([ours / plain for ours, plain in rows], 3)}")


def in_pieces(arguments: argparse.Namespace, scratch: Path) -> None:
    base = ["--model", "resnet9", "--batch-size", 32, "--threads", 1, "--epochs", 3, "--ranks", 2]
    base += ["--train-limit", 1280, "--strategy", "allreduce"]

    def run(place: Path, megabytes: float) -> float:
        finish(start(command(arguments, *base, "--bucket-mb", megabytes, out=place)))
        return images_per_s(record_of(place))

    sizes = {"one piece": 1000.0, "25 MB": 25.0, "4 MB": 4.0, "1 MB": 1.0}
    takers = {name: lambda place, mb=mb: run(place, mb) for name, mb in sizes.items()}
    turns = turns_of(takers, arguments.repeats, scratch)
    print("\nresnet9 (26 MB of gradients), 2 ranks, batch 32: images/s; against one piece")
    for name in takers:
        ratios = [row[name] / row["one piece"] for row in turns]
        print(f"{name:>15} {spread([row[name] for row in turns], 1):>24}  {spread(ratios, 3):>24}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", choices=("ranks", "exchange", "pieces"))
    arguments = parser.parse_args()
    arguments.dataset = "cifar10" if arguments.data_dir else "synthetic:50000"
    parts = {"ranks": two_ranks, "exchange": bare_exchange, "pieces": in_pieces}
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in parts.items():
            if arguments.only in (None, name):
                part(arguments, Path(scratch) / name)


if __name__ == "__main__":
    main()
