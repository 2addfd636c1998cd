"""From a source and options to points: the configuration of each, and remarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.plan import RunPlan, resolve, strategy_anew
from rankwise.prediction.network import read_network
from rankwise.prediction.options import PredictionOptions
from rankwise.prediction.points import Place, Point, best_of, predict_point
from rankwise.prediction.source import Source
from rankwise.strategies import compression, entry_of

MOST_RANKS = 10_000
MOST_POINTS = 64
"""Of a range of more ranks this many are predicted, each a constant factor above the one before."""

UNKNOWN = (
    "other users' load on hosts and network, which the source did not see",
    "which hosts share a switch, and how ranks are placed on racks",
    "steps slower than the slowest one seen, of which more ranks meet more",
)
"""What no prediction knows."""


@dataclass(frozen=True)
class Prediction:
    """The points, what was predicted and from what, what was assumed, and which short runs would narrow the
    intervals, by the point for which most is not known."""

    source: str
    about: str
    network: str
    points: tuple[Point, ...]
    remarks: tuple[str, ...]
    narrower: tuple[str, ...]

    @property
    def best(self) -> Point:
        """The number of ranks beyond which an epoch does not get shorter by more than a hundredth."""
        return best_of(self.points)

    def to_json(self) -> dict[str, Any]:
        """As `--format json` prints it."""
        return {
            "points": [point.to_json() for point in self.points],
            "best_ranks": self.best.ranks,
            "source": self.source,
            "about": self.about,
            "network": self.network,
            "remarks": list(self.remarks),
            "narrower": list(self.narrower),
            "unknown": list(UNKNOWN),
        }


def predict(source: Source, wanted: PredictionOptions) -> Prediction:
    """Predict an epoch of each number of ranks. Raises ConfigError, one line, for options that do not fit."""
    network = read_network(wanted.network) if wanted.network else None
    source = replace(source, samples=wanted.samples or source.samples)
    counts = read_ranks(wanted.ranks, source.samples)
    cores = wanted.cores_per_host or source.cores
    here = wanted.ranks_per_host or (cores if network else None)
    place = Place(here, cores, network, wanted.threads or source.config.threads)
    configs = [_resolved(source, wanted, ranks) for ranks in counts]
    single = _resolved(source, wanted, 1)
    alone = predict_point(source, single, Place(1, place.cores_per_host, None, place.threads), None)
    points = tuple(predict_point(source, config, place, alone.images_per_s) for config in configs)
    last = configs[-1]
    about = f"{last.model} on {last.dataset}, {last.strategy}"
    about += f", {last.topology}" if last.topology else ""
    about += f", batches of {last.batch_size}"
    about += f", {last.compress}" if last.compress != "none" else ""
    return Prediction(
        source.name,
        about,
        network.name if network else "within a host",
        points,
        source.remarks,
        _narrower(points),
    )


def check(wanted: PredictionOptions) -> None:
    """What can be said of the options before there is a source. Raises ConfigError, one line."""
    if wanted.network:
        read_network(wanted.network)
    read_ranks(wanted.ranks, wanted.samples or MOST_RANKS)
    if wanted.strategy:
        entry_of(wanted.strategy)
    compression.parse(wanted.compress or "none")


def _resolved(source: Source, wanted: PredictionOptions, ranks: int) -> RunPlan:
    """The plan of a run of `ranks` ranks; one rank has no strategy to share."""
    config = _over(source.config, wanted, ranks)
    if ranks == 1:
        return resolve(TrainConfig(**strategy_anew(config.model_dump())))
    return resolve(config)


def _over(source: RunPlan, wanted: PredictionOptions, ranks: int) -> TrainConfig:
    """The source's options with what is `wanted` on top."""
    values = source.model_dump()
    values |= {"ranks": ranks, "hosts": None, "hostfile": None, "spares": 0, "fault": (), "min_ranks": 1}
    same = source.ranks > 1 and wanted.strategy in (None, source.strategy)
    if not same:
        values = strategy_anew(values)
    for name in ("batch_size", "strategy", "topology", "compress", "sync_every"):
        value = getattr(wanted, name)
        if value is not None:
            values[name] = value
    return TrainConfig(**values)


def read_ranks(text: str, samples: int) -> list[int]:
    """The numbers in ``1,2,4`` or ``1-8``, in ascending order. Raises ConfigError, one line."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not (low.isdecimal() and (high.isdecimal() if dash else True)):
            raise ConfigError(f"--ranks {text}: expected numbers and ranges such as 1,2,4 or 1-8")
        first, last = int(low), int(high or low)
        if not 1 <= first <= last <= MOST_RANKS:
            raise ConfigError(
                f"--ranks {text}: expected numbers from 1 to {MOST_RANKS:,}, in ascending order"
            )
        if last - first < MOST_POINTS:
            found.update(range(first, last + 1))
        else:
            found.update(round(count) for count in np.geomspace(first, last, MOST_POINTS))
    most = max(found)
    if most > samples:
        raise ConfigError(
            f"--ranks {text}: an epoch of {samples:,} samples has not one for each of {most:,} ranks"
        )
    return sorted(found)


def _narrower(points: Sequence[Point]) -> tuple[str, ...]:
    """For each kind of thing that was not measured a line about the point that it matters to most."""
    worst: dict[str, tuple[float, str]] = {}
    for point in points:
        for doubt in point.doubts:
            line = doubt.told(point.epoch_s)
            part = (doubt.below_s + doubt.above_s) / point.epoch_s
            if line and part > worst.get(doubt.name, (0.0, ""))[0]:
                worst[doubt.name] = part, line
    return tuple(line for _, line in sorted(worst.values(), reverse=True))
