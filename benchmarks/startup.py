"""How long a run takes to start and to end, and how much memory its ranks have together.

    python benchmarks/startup.py [--base TREE] [--ranks 1 3 8 16] [--turns 5]

Runs of one step by a network of 2,000 parameters are started in turn with this tree and, with `--base`, with
another checkout of it. *Start*: from the launch to the moment at which the first epoch, of one step, stands
in metrics.jsonl. *End*: from there to the launcher's return. Memory is the proportional set size (pages that
several processes have count once) of all processes of a run of `--memory-ranks` ranks but its launcher and
mpiexec, while it trains. Seconds are medians, with the least and the most.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import spread
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parents[1]


def words(ranks: int, epochs: int, out: Path) -> list[str]:
    samples = 16 * ranks
    data = ["--dataset", "tests.tiny:images", "--model", "tests.tiny:net", "--lr", "0.02"]
    size = ["--train-limit", str(samples), "--val-limit", "50", "--batch-size", "16"]
    strategy = ["--strategy", "allreduce"] if ranks > 1 else []
    return [
        *(sys.executable, "-m", "rankwise", "train", *data, *size, *strategy),
        *("--ranks", str(ranks), "--epochs", str(epochs), "--out", str(out)),
    ]


def begin(tree: Path, ranks: int, epochs: int, out: Path) -> subprocess.Popen[bytes]:
    """Start a run."""
    # The network and its images are this tree's for both.
    path = os.pathsep.join([str(tree / "src"), str(HERE)])
    environment = os.environ | {"PYTHONPATH": path}
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words(ranks, epochs, out), env=environment, stdout=quiet, stderr=quiet)


def start_and_end_s(tree: Path, ranks: int, scratch: Path) -> tuple[float, float]:
    out = scratch / "run"
    began_ns = time.time_ns()
    process = begin(tree, ranks, 1, out)
    code = process.wait()
    ended_ns = time.time_ns()
    if code:
        sys.exit(f"a run of {tree} failed with code {code}")
    first_ns = (out / "metrics.jsonl").stat().st_mtime_ns
    return (first_ns - began_ns) / 1e9, (ended_ns - first_ns) / 1e9


def memory_mb(tree: Path, ranks: int, scratch: Path) -> float:
    out = scratch / "run"
    process = begin(tree, ranks, 1_000_000, out)
    lines = out / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
        time.sleep(0.1)
    its = psutil.Process(process.pid).children(recursive=True)
    found = [one.memory_full_info().pss for one in its if "python" in one.name()]
    process.send_signal(signal.SIGINT)
    process.wait()
    return sum(found) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, help="another checkout, measured in turn with this one")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 3, 8, 16])
    parser.add_argument("--memory-ranks", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args()
    trees = {"this tree": HERE} | ({"base": arguments.base.resolve()} if arguments.base else {})
    table = Table(title=f"{arguments.turns} turns, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name in ("", *trees, "ratio"):
        table.add_column(name, justify="right")

    def tell(what: str, values: dict[str, list[float]], digits: int = 2) -> None:
        middle = [statistics.median(its) for its in values.values()]
        ratio = f"{middle[0] / middle[1]:.2f}" if len(middle) > 1 else "-"
        table.add_row(what, *(spread(its, digits) for its in values.values()), ratio)

    for ranks in arguments.ranks:
        starts: dict[str, list[float]] = {name: [] for name in trees}
        ends: dict[str, list[float]] = {name: [] for name in trees}
        for turn in range(arguments.turns):
            for name in sorted(trees, reverse=bool(turn % 2)):
                with tempfile.TemporaryDirectory() as scratch:
                    start_s, end_s = start_and_end_s(trees[name], ranks, Path(scratch))
                starts[name].append(start_s)
                ends[name].append(end_s)
        tell(f"{ranks} ranks: start, s", starts)
        tell(f"{ranks} ranks: end, s", ends)
    memory: dict[str, list[float]] = {name: [] for name in trees}
    for name, tree in trees.items():
        with tempfile.TemporaryDirectory() as scratch:
            memory[name].append(memory_mb(tree, arguments.memory_ranks, Path(scratch)))
    tell(f"{arguments.memory_ranks} ranks: memory, MB", memory, 0)
    Console().print(table)


if __name__ == "__main__":
    main()
