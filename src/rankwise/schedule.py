"""The learning rate over a run, as a function of how far it has come."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from rankwise.config import TrainConfig

RISE = 0.3
"""Part of a one-cycle run in which the rate rises (Smith and Topin 2018, arXiv:1708.07120)."""

FLOOR = 1 / 25
"""Where a one-cycle run starts, as a part of its peak."""

MILESTONES = (0.5, 0.75)
"""Parts of a run after which `step` divides the rate by 10."""


def scheduler(config: TrainConfig) -> Callable[[float, int], float] | None:
    """`rate_factor` for a configuration, None if the rate never changes: then it is left alone."""
    if (config.schedule, config.lr_scaling, config.warmup) == ("constant", "none", 0):
        return None
    return functools.partial(rate_factor, config)


def rate_factor(config: TrainConfig, position: float, workers: int) -> float:
    """What the learning rate is multiplied by once `position` epochs are over and `workers` are left.

    Scaling with the number of workers k, by k (`linear`: Goyal et al. 2017, arXiv:1706.02677) or its
    root, makes up for the larger batch of all workers together; `warmup` epochs lead up to it from 0.
    """
    k = float(workers if config.on_shrink == "keep-local-batch" else config.workers)
    scale = {"none": 1.0, "linear": k, "sqrt": math.sqrt(k)}
    warm = min(1.0, position / config.warmup) if config.warmup else 1.0
    return scale[config.lr_scaling] * warm * _shape(config.schedule, min(1.0, position / config.epochs))


def _shape(schedule: str, done: float) -> float:
    """The schedule's own factor when the part `done` of the run is over."""
    if schedule == "cosine":
        return _fall(done)
    if schedule == "one-cycle":
        if done < RISE:
            return FLOOR + (1 - FLOOR) * (1 - _fall(done / RISE))
        return _fall((done - RISE) / (1 - RISE))
    if schedule == "step":
        return float(10.0 ** -sum(done > milestone for milestone in MILESTONES))
    return 1.0


def _fall(done: float) -> float:
    """From 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * done)) / 2
