"""The learning rate over a run, as a function of how far it has come."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError

PEAKS = {"one-cycle": 0.3, "triangular": 0.23}
"""The part of a run after which its rate is highest (Smith and Topin 2018, arXiv:1708.07120; Jordan 2024,
arXiv:2404.00498)."""

STARTS = {"one-cycle": 1 / 25, "triangular": 0.2}
"""Where a run starts, as a part of its highest rate."""

ENDS = {"cosine": 0.0, "one-cycle": 0.0, "triangular": 0.07}
"""Where a run ends, as a part of its highest rate."""

MILESTONES = (0.5, 0.75)
"""Parts of a run after which `step` divides the rate by 10."""


def scheduler(config: TrainConfig) -> Callable[[float, int], float] | None:
    """`rate_factor` of a configuration; None if the rate never changes, and is left alone."""
    if (config.schedule, config.lr_scaling, config.warmup) == ("constant", "none", 0):
        return None
    return functools.partial(rate_factor, config)


def rate_factor(config: TrainConfig, epochs_over: float, workers: int) -> float:
    """The factor of the learning rate once `epochs_over` epochs are over and `workers` are left.

    Scaling with the number of workers k, by k (`linear`: Goyal et al. 2017, arXiv:1706.02677) or its
    root, makes up for the larger batch of all workers together; `warmup` epochs lead up to it from 0.
    """
    k = float(workers if config.on_shrink == "keep-local-batch" else config.workers)
    scale = {"none": 1.0, "linear": k, "sqrt": math.sqrt(k)}
    warm = min(1.0, epochs_over / config.warmup) if config.warmup else 1.0
    return scale[config.lr_scaling] * warm * _shape(config, min(1.0, epochs_over / config.epochs))


def check(config: TrainConfig) -> None:
    """Raises ConfigError for an option that the schedule does not take."""
    for option, value, takers in (
        ("--peak-at", config.peak_at, PEAKS),
        ("--final-lr-fraction", config.final_lr_fraction, ENDS),
    ):
        if value is not None and config.schedule not in takers:
            raise ConfigError(
                f"{option} {value} was given, but --schedule {config.schedule} does not take it; these do: "
                f"{', '.join(takers)}"
            )


def _shape(config: TrainConfig, done: float) -> float:
    """The schedule's own factor when the part `done` of the run is over."""
    schedule = config.schedule
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(10.0 ** -sum(done > milestone for milestone in MILESTONES))
    peak = config.peak_at if config.peak_at is not None else PEAKS.get(schedule, 0.0)
    end = config.final_lr_fraction if config.final_lr_fraction is not None else ENDS[schedule]
    fall = _straight if schedule == "triangular" else _half_cosine
    if done < peak:
        return STARTS[schedule] + (1 - STARTS[schedule]) * (1 - fall(done / peak))
    return end + (1 - end) * fall((done - peak) / (1 - peak))


def _straight(done: float) -> float:
    """From 1 to 0 along a line."""
    return 1 - done


def _half_cosine(done: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * done)) / 2
