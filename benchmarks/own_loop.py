"""How fast a user's loop in a `Run` is, as ratios of things measured in turn in one run.

    python benchmarks/own_loop.py [--samples 10000] [--epochs 3] [--repeats 5]

1. The paper's network in a loop of its own against `rankwise train`: 2 ranks, `allreduce`, batch 16, in the
   form that `train` has (channels last, a fused optimiser).
2. A transformer of about a million parameters in a `Run` against the same loop in DDP over gloo, both
   started as two ranks by `rankwise run`, with one thread each.
3. What `run.log` costs: microseconds of a call, of a float and of a tensor.

The best epoch after the first counts. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import record_of, spread, turns_of
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import rankwise
from rankwise import data
from rankwise.comm import solo_world
from rankwise.data.feed import as_input
from rankwise.ledger.phases import Ledger
from rankwise.models.paper_cnn import PaperCNN
from rankwise.program_plan import of_world, program_plan
from rankwise.training.run import Run

BLOCK, LAYERS, HEADS, WIDTH, LETTERS = 64, 5, 4, 128, 64


class Images(Dataset):
    """Batches of images, taken out of one array as `rankwise train` takes them."""

    def __init__(self, samples: int) -> None:
        split = data.prepare(f"synthetic:{samples}").train
        self._images, self._labels = np.array(split.images), np.array(split.labels, np.int64)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = (np.take(its, indices, axis=0) for its in (self._images, self._labels))
        return as_input(images), torch.from_numpy(labels)


class Windows(Dataset):
    """Rows of made-up letters."""

    def __init__(self, samples: int) -> None:
        letters = torch.Generator().manual_seed(0)
        self._rows = torch.randint(LETTERS, (samples, BLOCK + 1), generator=letters)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        rows = self._rows[indices]
        return rows[:, :-1], rows[:, 1:]


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letters, self.places = nn.Embedding(LETTERS, WIDTH), nn.Embedding(BLOCK, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, F.gelu, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, LETTERS)
        self.mask = nn.Transformer.generate_square_subsequent_mask(BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        x = self.letters(x) + self.places.weight
        return self.head(self.layers(x, mask=self.mask, is_causal=True)).transpose(1, 2)


def whole(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def loop_in_run(name: str, samples: int, epochs: int) -> list[float]:
    """Seconds of each epoch of this rank's."""
    torch.manual_seed(0)
    model, dataset = (PaperCNN(), Images(samples)) if name == "paper-cnn" else (GPT(), Windows(samples))
    if name == "paper-cnn":
        model = model.to(memory_format=torch.channels_last)
    run = rankwise.Run(threads=1)
    model = run.model(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    run.keep(optimizer=optimizer)
    loader = run.loader(DataLoader(dataset, batch_size=16, shuffle=True, collate_fn=whole))
    seconds = []
    for _ in run.epochs(epochs):
        started = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            run.log(loss=loss)
        seconds.append(time.perf_counter() - started)
    return seconds


def loop_in_ddp(samples: int, epochs: int) -> list[float]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    model = DistributedDataParallel(GPT())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, fused=True)
    dataset = Windows(samples)
    loader = DataLoader(dataset, batch_size=16, sampler=DistributedSampler(dataset), collate_fn=whole)
    seconds = []
    for epoch in range(epochs):
        loader.sampler.set_epoch(epoch)
        started = time.perf_counter()
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            loss.item()
        seconds.append(time.perf_counter() - started)
    torch.distributed.destroy_process_group()
    return seconds


def by_program(name: str, samples: int, epochs: int, out: Path) -> float:
    """Seconds of the best epoch of a program with these words on two ranks."""
    words = [sys.executable, "-m", "rankwise", "run", "--ranks", "2", "--out", out]
    times = out.with_suffix(".txt")
    words += [__file__, "--loop", name, "--samples", samples, "--epochs", epochs, "--times", times]
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(list(map(str, words)), check=True, capture_output=True)
    return min(float(line) for line in times.read_text().split()[1:])


def by_train(samples: int, epochs: int, out: Path) -> float:
    words = [
        "--dataset",
        f"synthetic:{samples}",
        "--model",
        "paper-cnn",
        "--batch-size",
        "16",
        "--threads",
        "1",
    ]
    words += ["--strategy", "allreduce", "--epochs", epochs, "--evaluate-every", epochs, "--ranks", "2"]
    command = [sys.executable, "-m", "rankwise", "train", *words, "--out", out]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return min(row["train_s"] for row in record_of(out)["epochs"][1:])


def cost_of_log(value: float | Tensor, calls: int = 100_000) -> float:
    """Microseconds of a call."""
    world = solo_world(Ledger(start_ns=time.monotonic_ns()))
    run = Run(program_plan(of_world({}, 1), ("",)), world)
    started = time.perf_counter()
    for _ in range(calls):
        run.log(loss=value)
    return (time.perf_counter() - started) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop", help=argparse.SUPPRESS)
    parser.add_argument("--times", type=Path, help=argparse.SUPPRESS)
    its = parser.parse_args()
    if its.loop:
        if its.loop == "gpt in ddp":
            times = loop_in_ddp(its.samples, its.epochs)
        else:
            times = loop_in_run(its.loop, its.samples, its.epochs)
        its.times.write_text("\n".join(map(str, times)))  # of whichever rank is last: they end together
        return
    for name, value in (("float", 0.5), ("tensor", torch.tensor(0.5))):
        costs = [cost_of_log(value) for _ in range(its.repeats)]
        print(f"run.log of a {name}: {spread(costs)} us", flush=True)
    few = max(its.samples // 10, 64)
    pairs = {
        "paper-cnn in a Run, of rankwise train": {
            "train": lambda out: by_train(its.samples, its.epochs, out),
            "run": lambda out: by_program("paper-cnn", its.samples, its.epochs, out),
        },
        "transformer in a Run, of DDP over gloo": {
            "ddp": lambda out: by_program("gpt in ddp", few, its.epochs, out),
            "run": lambda out: by_program("gpt", few, its.epochs, out),
        },
    }
    with tempfile.TemporaryDirectory() as scratch:
        for name, takers in pairs.items():
            turns = turns_of(takers, its.repeats, Path(scratch) / name.split()[0])
            other = next(iter(takers))
            ratios = [turn[other] / turn["run"] for turn in turns]
            times = ", ".join(f"{its} {spread([turn[its] for turn in turns])} s" for its in takers)
            print(f"speed of the {name}: {spread(ratios, 3)}   ({times})", flush=True)


if __name__ == "__main__":
    main()
