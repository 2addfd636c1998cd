"""How far an epoch of the paper's network is from the machine's arithmetic, and two ranks from two threads.

    python benchmarks/speed.py [--samples 20000] [--repeats 5] [--data-dir DIR]

1. An epoch of 50,000 images on one thread against its arithmetic floor: 195 GFLOP at the peak of a float32 matrix
   product, which is measured right before each run. A convolution's gradient with respect to the images, which
   nobody needs and nobody computes, is part of the 195.
2. Two ranks of one thread under `allreduce` against one process of two threads, 64 images a step together.

Nothing else may run beside it. Without --data-dir it trains on made images of CIFAR-10's shape.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import command, finish, images_per_s, record_of, spread, start, turns_of

from rankwise.speed import limits_of

EPOCH_FLOPS = 195e9
EPOCH_IMAGES = 50_000


def pace(arguments: argparse.Namespace, place: Path, *options: object) -> float:
    """Images a second of a run of three epochs, the first one left out."""
    words = ["--epochs", 3, "--train-limit", arguments.samples, *options]
    finish(start(command(arguments, *words, out=place)))
    return images_per_s(record_of(place))


def floor(arguments: argparse.Namespace, scratch: Path) -> None:
    print("\nAn epoch of 50,000 images on one thread: times its arithmetic floor, and seconds")
    for batch in (4, 32):
        ratios, seconds, peaks = [], [], []
        for turn in range(arguments.repeats):
            peaks.append(limits_of(1)["fp32_flops_per_s"])
            options = ["--batch-size", batch, "--threads", 1, *arguments.option]
            seconds.append(EPOCH_IMAGES / pace(arguments, scratch / f"floor-{batch}-{turn}", *options))
            ratios.append(seconds[-1] * peaks[-1] / EPOCH_FLOPS)
        peak = spread([value / 1e9 for value in peaks], 0)
        print(f"batch {batch:>3} {spread(ratios):>22} {spread(seconds):>24} s, peak {peak} GFLOP/s")


def ranks(arguments: argparse.Namespace, scratch: Path) -> None:
    takers: dict[str, Callable[[Path], float]] = {
        "one process, two threads": lambda place: pace(
            arguments, place, "--batch-size", 64, "--threads", 2, *arguments.option
        ),
        "two ranks, one thread": lambda place: pace(
            arguments, place, "--batch-size", 32, "--threads", 1, "--ranks", 2, "--strategy", "allreduce",
            *arguments.option,
        ),
    }  # fmt: skip
    one, two = takers
    turns = turns_of(takers, arguments.repeats, scratch)
    print("\n64 images a step, images a second")
    for name in takers:
        print(f"{name:>25} {spread([row[name] for row in turns], 0):>26}")
    print(f"two ranks against one process: {spread([row[two] / row[one] for row in turns])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", choices=("floor", "ranks"))
    parser.add_argument(
        "--option", action="append", default=[], help="of every run, e.g. --option=--no-onednn"
    )
    arguments = parser.parse_args()
    arguments.dataset = "cifar10" if arguments.data_dir else "synthetic:50000"
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only in (None, "floor"):
            floor(arguments, Path(scratch))
        if arguments.only in (None, "ranks"):
            ranks(arguments, Path(scratch))


if __name__ == "__main__":
    main()
