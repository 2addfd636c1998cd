"""How fast rankwise trains the paper's network, as ratios of things measured in turn in one run.

    python benchmarks/throughput.py [--samples 20000] [--repeats 5] [--data-dir DIR]

1. One rank against two plain PyTorch loops without any accounting, on the same images in memory and
   one thread: the tutorial's form, and the best form known (channels-last, ReLU after pooling, fused
   SGD). Both are timed in turn with `rankwise`, so a drifting machine touches all alike.
2. Two workers under `parameter-averaging` against two single ranks that run side by side.
3. Launch to first step of 3 ranks, and the share of an epoch spent on data.
4. One rank with its ledger and timeline against one without any.

Nothing else may run beside it. Without --data-dir it trains on made images of CIFAR-10's shape.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import command, finish, images_per_s, record_of, spread, start, turns_of
from torch import nn
from torch.nn import functional as F

from rankwise import data
from rankwise.comm import World, solo_world
from rankwise.config import TrainConfig
from rankwise.data.dataset import Split
from rankwise.ledger.phases import PHASES, Ledger, Totals
from rankwise.models.paper_cnn import PaperCNN
from rankwise.plan import resolve
from rankwise.runs.folder import RunFolder
from rankwise.training.rank import run


class TutorialCNN(PaperCNN):
    """The same network with ReLU before pooling, as the tutorial has it."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc2(F.relu(self.fc1(torch.flatten(x, 1)))))
        return self.fc3(x)


def plain_loop(model: nn.Module, split: Split, order: np.ndarray, batch: int, *, tuned: bool) -> float:
    """Seconds of one epoch of a loop that a user would write: images in memory, nothing accounted."""
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=tuned or None)
    images = torch.from_numpy(np.array(split.images)).permute(0, 3, 1, 2)
    images = images if tuned else images.contiguous()
    labels = torch.from_numpy(np.array(split.labels))
    indices = torch.from_numpy(order)
    start = time.perf_counter()
    total = 0.0
    for chosen in indices.split(batch):
        pixels = (images[chosen].float() / 255 - 0.5) / 0.5
        optimizer.zero_grad()
        loss = F.cross_entropy(model(pixels), labels[chosen])
        loss.backward()
        optimizer.step()
        total += loss.item()
    return time.perf_counter() - start


class NoLedger(Ledger):
    """Reads no clock and keeps nothing."""

    def enter(self, phase: str) -> str:
        return phase

    def close(self) -> Totals:
        return Totals(1, dict.fromkeys(PHASES, 0), {})


def unmeasured_world() -> World:
    """The world of one rank, without ledger and timeline."""
    world = solo_world(NoLedger())
    world.timeline.step = lambda epoch, samples: None  # type: ignore[method-assign]
    return world


def rankwise_epoch(
    batch: int, samples: int, dataset: str, data_dir: Path | None, world: Callable[[], World] = solo_world
) -> float:
    """Seconds of one epoch of a real run, evaluation and checkpoint left out."""
    config = resolve(
        TrainConfig(
            dataset=dataset,
            data_dir=data_dir,
            batch_size=batch,
            epochs=1,
            train_limit=samples,
            val_limit=100,
            threads=1,
        )
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        folder.create()
        record = run(config, world(), folder, say=print)
    return record.epochs[0].train_s


def one_rank(arguments: argparse.Namespace) -> None:
    print(f"\nOne rank, one thread, seconds for {arguments.samples} images: median (min to max)")
    names = ("tutorial", "best plain loop", "rankwise")
    print("batch " + " ".join(f"{name:>22}" for name in names) + f" {'tutorial/ours':>14} {'best/ours':>10}")
    split = data.prepare(arguments.dataset, data_dir=arguments.data_dir).train
    rng = np.random.default_rng(0)
    for batch in (4, 16, 32, 128):
        order = rng.permutation(len(split))[: arguments.samples]
        takers: list[Callable[[], float]] = [
            lambda b=batch, o=order: plain_loop(TutorialCNN(), split, o, b, tuned=False),
            lambda b=batch, o=order: plain_loop(PaperCNN(), split, o, b, tuned=True),
            lambda b=batch: rankwise_epoch(b, arguments.samples, arguments.dataset, arguments.data_dir),
        ]
        times = [[take() for take in takers] for _ in range(arguments.repeats)]
        columns = list(zip(*times, strict=True))
        ratios = [statistics.median(row[i] / row[2] for row in times) for i in (0, 1)]
        print(
            f"{batch:>5} "
            + " ".join(f"{spread(c):>22}" for c in columns)
            + f" {ratios[0]:>14.2f} {ratios[1]:>10.2f}"
        )


def ledger_cost(arguments: argparse.Namespace) -> None:
    print(f"\nWith the ledger against without, one rank, {arguments.samples} images a turn")
    for batch in (4, 16, 128):
        ratios, worlds = [], (solo_world, unmeasured_world)
        for turn in range(arguments.repeats):
            order = worlds if turn % 2 else worlds[::-1]  # the other one begins each turn
            times = {
                world: rankwise_epoch(batch, arguments.samples, arguments.dataset, arguments.data_dir, world)
                for world in order
            }
            ratios.append(times[solo_world] / times[unmeasured_world])
        print(f"{batch:>5} {spread(ratios, 4)}")


def two_workers(arguments: argparse.Namespace, scratch: Path) -> None:
    base = ["--batch-size", 16, "--threads", 1, "--epochs", 4]

    def singles(place: Path) -> float:
        paths = [place / f"single-{seed}" for seed in (0, 1)]
        options = [*base, "--train-limit", arguments.samples]
        finish(*(start(command(arguments, *options, "--seed", s, out=p)) for s, p in enumerate(paths)))
        return sum(images_per_s(record_of(path)) for path in paths)

    def team(place: Path, topology: str, ranks: int) -> float:
        options = [*base, "--train-limit", 2 * arguments.samples, "--strategy", "parameter-averaging"]
        path = place / topology
        words = command(arguments, *options, "--topology", topology, "--ranks", ranks, out=path)
        finish(start(words))
        return images_per_s(record_of(path))

    takers: dict[str, Callable[[Path], float]] = {
        "two singles, summed": singles,
        "allreduce, 2 ranks": lambda place: team(place, "allreduce", 2),
        "master, 3 ranks": lambda place: team(place, "master", 3),
    }
    print("\nTwo workers on two cores, batch 16, images/s; ratios to two single ranks side by side")
    names = list(takers)
    turns = turns_of(takers, arguments.repeats, scratch)
    for name in names:
        ratios = [row[name] / row[names[0]] for row in turns]
        print(f"{name:>20} {spread([row[name] for row in turns], 0):>26}  {spread(ratios, 3)}")


def start_up(arguments: argparse.Namespace, scratch: Path) -> None:
    seconds, shares = [], []
    for turn in range(arguments.repeats):
        path = scratch / f"start-{turn}"
        words = command(arguments, "--ranks", 3, "--train-limit", arguments.samples, "--epochs", 1, out=path)
        launched = time.time()
        process = start(words)
        while not (path / ".progress").exists() and process.poll() is None:
            time.sleep(0.01)
        while process.poll() is None and not np.fromfile(path / ".progress")[1::3].any():
            time.sleep(0.01)
        seconds.append(time.time() - launched)
        finish(process)
        record = record_of(path)
        # The phase also holds opening the dataset, once a run.
        shares += [
            100 * rank["phases_ns"]["data"] / 1e9 / record["epochs"][0]["wall_s"]
            for rank in record["ranks"]
            if rank["role"] == "worker"
        ]
    print(f"\nLaunch of 3 ranks to the first step: {spread(seconds)} s")
    print(f"Data phase in an epoch: {spread(shares)} %")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--only", choices=("rank", "workers", "start", "ledger"))
    arguments = parser.parse_args()
    arguments.dataset = "cifar10" if arguments.data_dir else "synthetic:50000"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only in (None, "rank"):
            one_rank(arguments)
        if arguments.only in (None, "ledger"):
            ledger_cost(arguments)
        if arguments.only in (None, "workers"):
            two_workers(arguments, Path(scratch))
        if arguments.only in (None, "start"):
            start_up(arguments, Path(scratch))


if __name__ == "__main__":
    main()
