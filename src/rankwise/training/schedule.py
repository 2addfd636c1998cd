"""The learning rate over a run, as a function of how far it has come."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from rankwise.plan import RunPlan

STARTS = {"one-cycle": 1 / 25, "triangular": 0.2}
"""Where a run starts, as a part of its highest rate."""

MILESTONES = (0.5, 0.75)
"""Parts of a run after which `step` divides the rate by 10."""


def scheduler(plan: RunPlan) -> Callable[[float, int], float] | None:
    """`rate_factor` of a plan; None if the rate never changes, and is left alone."""
    if (plan.schedule, plan.lr_scaling, plan.warmup) == ("constant", "none", 0):
        return None
    return functools.partial(rate_factor, plan)


def rate_factor(plan: RunPlan, epochs_over: float, workers: int) -> float:
    """The factor of the learning rate once `epochs_over` epochs are over and `workers` are left.

    Scaling with the number of workers k, by k (`linear`: Goyal et al. 2017, arXiv:1706.02677) or its
    root, makes up for the larger batch of all workers together; `warmup` epochs lead up to it from 0.
    """
    k = float(workers if plan.on_shrink == "keep-local-batch" else plan.workers)
    scale = {"none": 1.0, "linear": k, "sqrt": math.sqrt(k)}
    warm = min(1.0, epochs_over / plan.warmup) if plan.warmup else 1.0
    return scale[plan.lr_scaling] * warm * _shape(plan, min(1.0, epochs_over / plan.epochs))


def _shape(plan: RunPlan, done: float) -> float:
    """The schedule's own factor when the part `done` of the run is over."""
    schedule = plan.schedule
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(10.0 ** -sum(done > milestone for milestone in MILESTONES))
    peak, end = plan.peak_at or 0.0, plan.final_lr_fraction or 0.0
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
