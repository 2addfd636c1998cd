"""Short runs from which a prediction can be made: steps with as many threads and samples as are needed, and
messages between two ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankwise import machine
from rankwise.config import TrainConfig
from rankwise.errors import UsageError
from rankwise.launch import Order, launch
from rankwise.prediction.source import Source, read_source
from rankwise.prediction.wishes import Wishes

STEPS = 240
"""Of a rank in each epoch of a short run: enough for a distribution, and over in seconds."""

EPOCHS = 3
"""The first of them warms up."""


def measure(config: TrainConfig, wishes: Wishes, folders: Sequence[Path] = ()) -> Source:
    """Run shortly what `wishes` need to know, beside the finished runs in `folders`.

    One rank alone, on one core and on all, and two ranks that meet in every step. All train with the batch
    that is wished for. Raises UsageError.
    """
    options = config.given()
    batch = wishes.batch_size or config.batch_size
    for name in ("ranks", "strategy", "topology", "hosts", "hostfile", "spares", "fault", "out", "compress"):
        options.pop(name, None)
    with tempfile.TemporaryDirectory(prefix="rankwise-predict-") as scratch:

        def run(name: str, ranks: int, strategy: str, threads: int) -> Path:
            samples = min(config.train_limit or STEPS * batch * ranks, STEPS * batch * ranks)
            short = {**options, "epochs": EPOCHS, "batch_size": batch, "train_limit": samples}
            short |= {"ranks": ranks, "strategy": strategy, "threads": threads, "out": Path(scratch) / name}
            return launch(Order(TrainConfig(**short))).folder

        cores = machine.usable_cores()
        places = [run("alone", 1, "single", threads) for threads in sorted({1, cores})][:2]
        pair = run("pair", 2, "allreduce", 1)
        source = read_source([pair, *places])
        whole = _whole(config, source)
        source = replace(source, name="short runs here", samples=whole)
        for folder in folders:
            other = read_source([folder])
            if other.network != source.network:
                raise UsageError(f"{folder} trained another network than --measure does")
            source = replace(source.with_compute_of(other), samples=other.samples)
        return source


def _whole(config: TrainConfig, source: Source) -> int:
    """Samples of an epoch of the run that is predicted."""
    from rankwise import data
    from rankwise.data.selection import select

    dataset = data.prepare(config.dataset, data_dir=config.data_dir, cache_dir=config.cache_dir)
    return len(select(config, dataset).train_pool)
