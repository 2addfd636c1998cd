"""Means with intervals, and differences that are told apart from chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # type: ignore[import-untyped]  # scipy.stats takes a second to import

CONFIDENCE = 0.95

TIME_SPREAD = 1.15
"""By what factor two times must differ to count, where each was measured once: what single runs of the
same thing spread by on a shared machine."""


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` seeds, with the half width of its interval (None for a single one)."""

    mean: float
    half_width: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's t-interval at 95%."""
    mean = float(np.mean(values))
    return Estimate(mean, _half_width(values) if len(values) > 1 else None, len(values))


def _half_width(values: Sequence[float]) -> float:
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return float(special.stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2)) * standard_error


@dataclass(frozen=True)
class Contrast:
    """A difference or a ratio, and between which bounds it lies."""

    value: float
    low: float
    high: float

    def above(self, limit: float) -> bool:
        """Whether it is above the limit for sure."""
        return self.low > limit

    def below(self, limit: float) -> bool:
        """Whether it is below the limit for sure."""
        return self.high < limit


def accuracy_difference(ours: Sequence[float], others: Sequence[float], val_samples: int) -> Contrast:
    """How much more accurate `ours` are (fractions), paired by seed.

    From two seeds on the interval is Student's t of the differences. One seed says nothing about the
    spread over seeds: its bounds are those of measuring two accuracies on `val_samples` samples, by
    the normal approximation of the binomial distribution.
    """
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    if len(differences) > 1:
        half_width = _half_width(differences)
    else:
        variance = sum(p * (1 - p) / val_samples for p in (ours[0], others[0]))
        half_width = float(special.ndtri((1 + CONFIDENCE) / 2)) * math.sqrt(variance)
    mean = float(np.mean(differences))
    return Contrast(mean, mean - half_width, mean + half_width)


def loss_difference(ours: Sequence[float], others: Sequence[float]) -> Contrast:
    """How much higher the losses of `ours` are, paired by seed.

    From two seeds on the interval is Student's t of the differences. One seed says nothing about the
    spread: its interval has no bounds.
    """
    differences = [one - other for one, other in zip(ours, others, strict=True)]
    half_width = _half_width(differences) if len(differences) > 1 else math.inf
    mean = float(np.mean(differences))
    return Contrast(mean, mean - half_width, mean + half_width)


def time_ratio(ours: Sequence[float], others: Sequence[float]) -> Contrast:
    """How many times as long `ours` took, paired by seed and turn.

    From two pairs on the interval is Student's t of the logarithms. For one the bounds are a factor of
    TIME_SPREAD.
    """
    logarithms = [math.log(one / other) for one, other in zip(ours, others, strict=True)]
    half_width = _half_width(logarithms) if len(logarithms) > 1 else math.log(TIME_SPREAD)
    mean = float(np.mean(logarithms))
    return Contrast(math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width))
