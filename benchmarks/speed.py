"""How far an epoch of the paper's network is from the machine's arithmetic, and two ranks from two threads.

    python benchmarks/speed.py [--samples 20000] [--repeats 5] [--data-dir DIR]

1. An epoch of 50,000 images on one thread against its arithmetic floor: 195 GFLOP at the peak of a float32
   matrix product, which is measured right before each run.
2. Two ranks of one thread under `allreduce` against one process of two threads, 64 images a step together.
3. Steps of cifar10-94's network in bfloat16 while the process keeps the memory that it frees, as ranks do,
   and while it gives it back.
4. What a step of the first kind is made of, by torch.profiler.

Nothing else may run beside it. Without --data-dir it trains on made images of CIFAR-10's shape.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from common import command, finish, images_per_s, record_of, spread, start, turns_of

from rankwise.config import TrainConfig
from rankwise.doctor.speed import limits_of
from rankwise.models.airbench import Airbench
from rankwise.models.blank import blank_batch, make_gradients, seconds_of
from rankwise.models.optimizers import make_optimizer
from rankwise.models.paper_cnn import PaperCNN
from rankwise.models.replica import Replica
from rankwise.system import machine

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


def step_in_memory(*, kept: bool) -> tuple[float, int]:
    """Seconds of a step of 1,024 images on all cores, and the pages that it has to ask the kernel for."""
    if kept:
        machine.keep_freed_memory()
    torch.set_num_threads(machine.usable_cores())
    model = Airbench().to(memory_format=torch.channels_last)
    model.whitening.requires_grad_(False)
    optimizer = make_optimizer(TrainConfig(), model)
    images = blank_batch((3, 32, 32), 10, 1024)
    asked: list[int] = []

    def step() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        make_gradients(model, optimizer, images, "bf16")
        asked.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

    seconds = seconds_of(step, repeats=9)
    return statistics.median(seconds), round(statistics.median(asked))


def memory(repeats: int) -> None:
    """Each in a process of its own, as what a process has asked of the allocator is not taken back."""
    asked: dict[bool, list[int]] = {True: [], False: []}

    def taker(kept: bool) -> Callable[[Path], float]:
        def take(_: Path) -> float:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                seconds, pages = process.submit(step_in_memory, kept=kept).result()
            asked[kept].append(pages)
            return seconds

        return take

    turns = turns_of({"kept": taker(True), "given back": taker(False)}, repeats, Path())
    print("\nA step of cifar10-94's network, with freed memory kept or given back")
    for name, kept in (("kept", True), ("given back", False)):
        seconds = spread([row[name] for row in turns])
        print(f"{name:>12} {seconds:>22} s, {spread(asked[kept], 0)} new pages")
    print(f"kept against given back: {spread([row['kept'] / row['given back'] for row in turns])}")


def profile(batch: int, most: int = 12) -> None:
    """Operations by their own time, in a step of one thread without its data, the profiler's included."""
    torch.set_num_threads(1)
    model = PaperCNN().to(memory_format=torch.channels_last)
    replica = Replica(model, make_optimizer(TrainConfig(), model))
    images = blank_batch((3, 32, 32), 10, batch)

    def step() -> None:
        make_gradients(model, replica.optimizer, images, "fp32")
        replica.step()

    times_s = seconds_of(step, at_least_s=2.0)
    steps = 200
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            step()
    rows = sorted(found.key_averages(), key=lambda row: row.self_cpu_time_total, reverse=True)
    whole_us = sum(row.self_cpu_time_total for row in rows)
    print(
        f"\nA step of {batch} images: {spread([1e3 * s for s in times_s])} ms; of its time under the profiler"
    )
    for row in rows[:most]:
        share = row.self_cpu_time_total / whole_us
        print(
            f"  {share:6.1%} {row.self_cpu_time_total / steps:6.0f} us {row.count / steps:5.1f} x  {row.key}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", choices=("floor", "ranks", "memory", "profile"))
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
    if arguments.only in (None, "memory"):
        memory(arguments.repeats)
    if arguments.only in (None, "profile"):
        for batch in (4, 32):
            profile(batch)


if __name__ == "__main__":
    main()
