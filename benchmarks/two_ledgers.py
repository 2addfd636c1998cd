"""One training, seen by both ledgers: `rankwise train`, and a loop of its own that uses mpi4py alone.

    python benchmarks/two_ledgers.py [--ranks 2] [--repeats 5] [--late-ms 10]

Both train the same network on the digits, in batches of 16, with an allreduce a step, and the last rank works
for some milliseconds more in each step. Told are waiting and transfer in the exchange of the gradients, in
ms: the median over the steps of rank 0, so that a rank that loses its core now and then says little; of these
the median and range over repeats in turn. Two agree if their medians are nearer to each other than the wider
of their ranges, or than a twentieth; if the own loop and `rankwise train` with sums by MPI do not, this ends
with code 1. Run it with nothing beside: MPI's own calls spin, so where other programs want the cores the own
loop takes them from the very rank that it waits for.

`rankwise train` as it is adds up in shared memory, which is another exchange: it stands beside. Ranks that
wait for more than 20 ms nap for up to 1 ms at a time, where MPI's own calls spin, and are so much later to
see that the others have come: with `--late-ms 40` that shows as transfer in both columns of `rankwise train`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from common import spread, turns_of
from rich.console import Console
from rich.table import Table

from rankwise.ledger.call_log import read_logs
from rankwise.ledger.program_waits import find_waits
from rankwise.ledger.timeline import read_timeline

MODEL = """
import os, time
import torch
from torch import nn
from rankwise.comm.mpi_environment import placement

class Slow(nn.Module):
    '''The last rank works a little more in each step.'''
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(3072, 128), nn.ReLU(), nn.Linear(128, 10))
    def forward(self, x):
        me = placement()
        if self.training and torch.is_grad_enabled() and me.rank == me.size - 1:
            time.sleep(float(os.environ["LATE_S"]))
        return self.layers(x)

def slow():
    return Slow()
"""

LOOP = """
import sys, numpy as np, torch
from mpi4py import MPI
from sklearn.datasets import load_digits
from torch.nn import functional as F
sys.path.insert(0, ".")
from slow_model import Slow
torch.set_num_threads(1)
comm = MPI.COMM_WORLD
digits = load_digits()
x = torch.tensor(digits.images[:STEPS * 16 * comm.size] / 16, dtype=torch.float32)
x = F.interpolate(x[:, None], 32).expand(-1, 3, -1, -1).contiguous()
y = torch.tensor(digits.target[: len(x)])
torch.manual_seed(0)
model = Slow()
optimizer = torch.optim.SGD(model.parameters(), 0.01)
flat = np.zeros(sum(p.numel() for p in model.parameters()), np.float32)
for epoch in range(EPOCHS):
    for step in range(STEPS):
        mine = slice((step * comm.size + comm.rank) * 16, (step * comm.size + comm.rank + 1) * 16)
        optimizer.zero_grad()
        F.cross_entropy(model(x[mine]), y[mine]).backward()
        flat[:] = np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])
        comm.Allreduce(MPI.IN_PLACE, flat)
        at = 0
        for p in model.parameters():
            p.grad.copy_(torch.from_numpy(flat[at : at + p.numel()] / comm.size).view_as(p))
            at += p.numel()
        optimizer.step()
"""

BY_MPI = """
import rankwise.comm.shared_memory
rankwise.comm.shared_memory.why_not = lambda: "sums are to be MPI's own"
from rankwise.cli import main
main()
"""

STEPS, EPOCHS = 20, 3

LARGE = 1_000_000
"""Bytes: all gradients are more, and all else is less."""

OWN, TRAIN_BY_MPI, TRAIN = "own loop", "rankwise train, sums by MPI", "rankwise train"


def of_steps(folder: Path) -> dict[str, float]:
    """Waiting and transfer in the sum of the gradients, ms, median over the steps of rank 0."""
    if (folder / "calls").exists():
        logs = read_logs(folder / "calls")
        rows = logs[0].rows
        its = rows["bytes"] > LARGE
        inside_ns, wait_ns = rows["inside_ns"][its], find_waits(logs)[0].wait_ns[its]
    else:
        exchanges = read_timeline(folder / "timeline" / "rank-0000.npz").exchanges
        exchanges = exchanges[exchanges["bytes"] > LARGE]
        inside_ns, wait_ns = exchanges["left_ns"] - exchanges["entered_ns"], exchanges["wait_ns"]
    assert len(wait_ns) == STEPS * EPOCHS
    return {
        "wait": float(np.median(wait_ns)) / 1e6,
        "transfer": float(np.median(inside_ns - wait_ns)) / 1e6,
    }


def run(words: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    folder.mkdir(parents=True)
    (folder / "slow_model.py").write_text(MODEL)
    (folder / "loop.py").write_text(LOOP.replace("STEPS", str(STEPS)).replace("EPOCHS", str(EPOCHS)))
    (folder / "by_mpi.py").write_text(BY_MPI)
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"LATE_S": str(arguments.late_ms / 1e3)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"failed: {' '.join(words)}\n{done.stderr}")
    return of_steps(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--late-ms", type=float, default=10)
    arguments = parser.parse_args()
    samples = STEPS * 16 * arguments.ranks
    ranks = str(arguments.ranks)
    words = f"train --out run --ranks {ranks} --dataset digits --model slow_model:slow --strategy allreduce"
    words += f" --epochs {EPOCHS} --train-limit {samples} --val-limit 16 --threads 1 --lr 0.01"
    rankwise = [sys.executable, "-m", "rankwise"]
    mpiexec = [
        str(Path(sys.executable).with_name("mpiexec")),
        "--bind-to",
        "none",
        "-n",
        ranks,
        sys.executable,
    ]
    found: dict[str, list[dict[str, float]]] = {}

    def taker(name: str, command: list[str]) -> Any:
        found[name] = []

        def take(folder: Path) -> float:
            found[name].append(run(command, folder, arguments))
            return 0.0

        return take

    takers = {
        OWN: taker(OWN, [*rankwise, "run", "--out", "run", "--ranks", ranks, "loop.py"]),
        TRAIN_BY_MPI: taker(TRAIN_BY_MPI, [*mpiexec, "by_mpi.py", *words.split()]),
        TRAIN: taker(TRAIN, [*rankwise, *words.split()]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        turns_of(takers, arguments.repeats, Path(scratch))
    table = Table(
        title=f"ms a step of the rank that waits, {STEPS * EPOCHS} steps, {arguments.late_ms:g} ms late"
    )
    for name in ("", OWN, TRAIN_BY_MPI, "these two agree", TRAIN):
        table.add_column(name)
    agree_all = True
    for phase in ("wait", "transfer"):
        values = {name: [one[phase] for one in its] for name, its in found.items()}
        one, other = values[OWN], values[TRAIN_BY_MPI]
        widest = max(max(its) - min(its) for its in (one, other))
        apart = abs(statistics.median(one) - statistics.median(other))
        agree = apart <= max(widest, 0.05 * statistics.median(one))
        agree_all &= agree
        shown = [spread(values[name], 3) for name in (OWN, TRAIN_BY_MPI, TRAIN)]
        table.add_row(phase, *shown[:2], "yes" if agree else "no", shown[2])
    Console().print(table)
    sys.exit(0 if agree_all else 1)


if __name__ == "__main__":
    main()
