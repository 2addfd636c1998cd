"""Short runs from which a prediction can be made: steps with as many threads and samples as are needed, and
messages between two ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rankwise import strategies
from rankwise.config import TrainConfig
from rankwise.errors import UsageError
from rankwise.launch import Order, launch, preflight
from rankwise.plan import make_plan
from rankwise.prediction.options import PredictionOptions
from rankwise.prediction.points import Place
from rankwise.prediction.predict import read_ranks
from rankwise.prediction.source import Source, read_source
from rankwise.system import machine

_PLACES = ("ranks", "strategy", "topology", "sync_every", "hosts", "hostfile", "spares", "fault", "min_ranks")
NOT_OF_SHORT_RUNS = {*_PLACES, "out", *strategies.OPTIONS}
"""Options that short runs do not take over."""

STEPS = 240
"""Of a rank in each epoch of a short run: enough for a distribution, and over in seconds."""

EPOCHS = 3
"""The first of them warms up."""


def measure(config: TrainConfig, wishes: PredictionOptions, folders: Sequence[Path] = ()) -> Source:
    """Run shortly what `wishes` need to know, beside the finished runs in `folders`.

    Two ranks meet in every step, on one thread each, and one rank alone trains on each number of threads that
    the ranks will have. Where ranks will share cores, two for each core of this machine meet in every step
    too. All train with the batch that is wished for. Raises UsageError.
    """
    batch = wishes.batch_size or config.batch_size
    options = {name: value for name, value in config.given().items() if name not in NOT_OF_SHORT_RUNS}
    one = make_plan(TrainConfig(**{**options, "batch_size": batch}))
    prepared = preflight.prepare(one)
    with tempfile.TemporaryDirectory(prefix="rankwise-predict-") as scratch:

        def run(ranks: int, strategy: str, threads: int) -> Source:
            samples = min(prepared.samples_per_epoch, STEPS * batch * ranks)
            short = {"ranks": ranks, "strategy": strategy, "threads": threads, "train_limit": samples}
            out = Path(scratch) / f"{strategy}-{ranks}-{threads}"
            order = TrainConfig(**{**options, **short, "epochs": EPOCHS, "batch_size": batch, "out": out})
            return read_source([launch(Order(order)).folder])

        source = run(2, "allreduce", 1)
        cores = machine.usable_cores()
        places = _places(wishes, prepared.samples_per_epoch)
        for threads in sorted({its for _, its in places if its <= cores}):
            source = source.with_compute_of(run(1, "single", threads))
        crowded = any(here * threads > (wishes.cores_per_host or cores) for here, threads in places)
        if crowded and not source.crowds:  # on a single core the first run has told that already
            source = source.with_compute_of(run(2 * cores, "allreduce", 1))
    source = replace(source, name="short runs here", samples=prepared.samples_per_epoch, config=one)
    for folder in folders:
        other = read_source([folder])
        if other.model != source.model:
            raise UsageError(f"{folder} trained another network than --measure does")
        source = source.with_compute_of(other)
    return source


def _places(wishes: PredictionOptions, samples: int) -> set[tuple[int, int]]:
    """Ranks of a host, and threads of each, for all numbers of ranks that are wished for."""
    cores = wishes.cores_per_host or machine.usable_cores()
    place = Place(wishes.ranks_per_host, cores, None, wishes.threads or "auto")
    here = [min(ranks, wishes.ranks_per_host or ranks) for ranks in read_ranks(wishes.ranks, samples)]
    return {(ranks, place.threads_of(ranks)) for ranks in here}
