"""What a synchronised step costs, as ratios of things measured in turn in one run.

    python benchmarks/steps.py [--samples 20000] [--repeats 15] [--batches 16,32,128] [--base TREE]

Images a second of the paper's network on two cores, one thread a rank: two single ranks that never talk (both
together), two ranks that only meet in each step and send nothing (what jitter leaves of the first),
`allreduce`, and DDP over gloo. `--base` adds `allreduce` of another checkout of rankwise.

The best epoch after the first counts, and the other one begins each turn. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from common import command, finish, record_of, spread, start, turns_of

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.strategies.base import State, Strategy, meet
from rankwise.strategies.recovery import Recovery


@dataclass(frozen=True)
class Meeting(Strategy[State]):
    """Ranks that wait for each other in each step, and are not kept the same."""

    recovery: ClassVar = Recovery.ASYNCHRONOUS

    topology: Literal["allreduce"] = "allreduce"

    def init(self, replica: Any, world: World) -> State:
        return State()

    def prepare(self, state: State, replica: Any, batch: Batch, world: World) -> None:
        meet(world, stops=world.stopping)

    def commit(self, state: State, replica: Any, prepared: None, world: World) -> State:
        return state.commit()


def best(path: Path) -> float:
    """Images a second of the best epoch after the first."""
    return max(row["train_samples"] / row["train_s"] for row in record_of(path)["epochs"][1:])


def takers(its: argparse.Namespace, batch: int) -> dict[str, Callable[[Path], float]]:
    base = ["--model", "paper-cnn", "--batch-size", batch, "--threads", 1, "--epochs", its.epochs]
    base += ["--evaluate-every", its.epochs, "--checkpoint-every", its.epochs]

    def silent(place: Path) -> float:
        paths = [place / str(seed) for seed in (0, 1)]
        options = [*base, "--train-limit", its.samples // 2]
        finish(*(start(command(its, *options, "--seed", seed, out=p)) for seed, p in enumerate(paths)))
        return sum(map(best, paths))

    def two(*options: object, tree: Path | None = None) -> Callable[[Path], float]:
        def take(place: Path) -> float:
            words = command(its, *base, "--train-limit", its.samples, "--ranks", 2, *options, out=place)
            environment = {**os.environ, **({"PYTHONPATH": str(tree / "src")} if tree else {})}
            subprocess.run(words, check=True, capture_output=True, env=environment)
            return best(place)

        return take

    meets = ("--strategy", f"{Path(__file__).stem}:Meeting", "--on-failure", "stop")
    summed = ("--strategy", "allreduce", "--topology", "allreduce")
    found = {
        "two that never talk": silent,
        "two that only meet": two(*meets),
        "allreduce": two(*summed),
        "ddp": two("--strategy", "ddp"),
    }
    return found | ({"allreduce of the base": two(*summed, tree=its.base)} if its.base else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--batches", default="16,32,128")
    parser.add_argument("--base", type=Path)
    its = parser.parse_args()
    its.dataset, its.data_dir = f"synthetic:{its.samples}", None
    here = Path(__file__).parent
    os.chdir(here)  # where a rank finds Meeting
    for batch in map(int, its.batches.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            turns = turns_of(takers(its, batch), its.repeats, Path(scratch))
        print(f"\nbatch {batch}: images/s, and allreduce in each turn over it, {len(turns)} turns")
        for name in turns[0]:
            ratios = [turn["allreduce"] / turn[name] for turn in turns]
            print(
                f"{name:>22} {spread([turn[name] for turn in turns], 0):>26}  {spread(ratios, 3)}", flush=True
            )


if __name__ == "__main__":
    main()
