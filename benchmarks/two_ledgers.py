"""One training, seen by both ledgers: `rankwise train`, and a loop of its own that uses mpi4py alone.

    python benchmarks/two_ledgers.py [--ranks 2] [--repeats 5] [--late-ms 40]

Both train the same network on the digits, in batches of 16, with an allreduce a step, and the last rank works
for some milliseconds more in each step. Waiting and transfer are seconds of a rank, mean over the ranks but
the late one, median and range over repeats in turn. The two agree if their medians are nearer to each other
than the wider of the two ranges, or than a twentieth; otherwise this ends with code 1.
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

from common import record_of, spread, turns_of
from rich.console import Console
from rich.table import Table

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

STEPS, EPOCHS = 20, 3


def seconds(record: dict[str, Any], phase: str, ranks: int) -> float:
    rows = [row for row in record["ranks"] if row["rank"] != ranks - 1]
    return statistics.mean(row["phases_ns"][phase] for row in rows) / 1e9


def run(words: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    folder.mkdir(parents=True)
    (folder / "slow_model.py").write_text(MODEL)
    (folder / "loop.py").write_text(LOOP.replace("STEPS", str(STEPS)).replace("EPOCHS", str(EPOCHS)))
    command, *rest = words
    done = subprocess.run(
        [sys.executable, "-m", "rankwise", command, "--out", "run", *rest],
        cwd=folder,
        env=os.environ | {"LATE_S": str(arguments.late_ms / 1e3)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"failed: {' '.join(words)}\n{done.stderr}")
    return record_of(folder / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--late-ms", type=float, default=40)
    arguments = parser.parse_args()
    samples = STEPS * 16 * arguments.ranks
    words = f"train --ranks {arguments.ranks} --dataset digits --model slow_model:slow --strategy allreduce"
    words += f" --epochs {EPOCHS} --train-limit {samples} --val-limit 16 --threads 1 --lr 0.01"
    records: dict[str, list[dict[str, Any]]] = {"rankwise train": [], "own loop": []}

    def taker(name: str, command: list[str]) -> Any:
        def take(folder: Path) -> float:
            records[name].append(run(command, folder, arguments))
            return 0.0

        return take

    takers = {
        "rankwise train": taker("rankwise train", words.split()),
        "own loop": taker("own loop", ["run", "--ranks", str(arguments.ranks), "loop.py"]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        turns_of(takers, arguments.repeats, Path(scratch))
    table = Table(
        title=f"seconds of a rank that waits, {STEPS * EPOCHS} steps, {arguments.late_ms:g} ms late"
    )
    for name in ("", *records, "they agree"):
        table.add_column(name)
    agree_all = True
    for phase in ("wait", "transfer"):
        values = {
            name: [seconds(one, phase, arguments.ranks) for one in its] for name, its in records.items()
        }
        one, other = values.values()
        widest = max(max(its) - min(its) for its in values.values())
        apart = abs(statistics.median(one) - statistics.median(other))
        agree = apart <= max(widest, 0.05 * statistics.median(one))
        agree_all &= agree
        table.add_row(phase, *(spread(its, 3) for its in values.values()), "yes" if agree else "no")
    Console().print(table)
    sys.exit(0 if agree_all else 1)


if __name__ == "__main__":
    main()
