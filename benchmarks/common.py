"""What the benchmarks share: runs of the command line, in turn, and what came of them."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def command(arguments: argparse.Namespace, *options: object, out: Path, val_limit: int = 100) -> list[str]:
    """A run of the command line on the benchmark's dataset, with little evaluation."""
    words = ["--dataset", arguments.dataset, "--val-limit", val_limit, *options, "--out", out]
    words += ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    return [sys.executable, "-m", "rankwise", "train", *map(str, words)]


def finish(*processes: subprocess.Popen[bytes]) -> None:
    if any(process.wait() for process in processes):
        sys.exit("a run failed")


def start(words: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def record_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "record.json").read_bytes())


def images_per_s(record: dict[str, Any]) -> float:
    """Over the epochs after the first, which pays for warming up."""
    rows = record["epochs"][1:]
    return sum(row["train_samples"] for row in rows) / sum(row["train_s"] for row in rows)


def turns_of(
    takers: Mapping[str, Callable[[Path], float]], repeats: int, scratch: Path
) -> list[dict[str, float]]:
    """Measure all takers in turn; another one begins each turn, so that a drift favours nobody."""
    names, turns = list(takers), []
    for turn in range(repeats):
        first = turn % len(names)
        order = names[first:] + names[:first]
        turns.append(
            {name: takers[name](scratch / f"turn-{turn}" / name.replace(" ", "-")) for name in order}
        )
    return turns


def spread(values: Any, digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
