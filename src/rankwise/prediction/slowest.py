"""How long the slowest of N takes, from samples of what one takes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Seconds = NDArray[np.float64]

SEED = 0
"""Of all draws, so that the same source gives the same prediction."""

DRAWS = 4096
"""Samples of a sum; the slowest of more ranks than this is the largest draw."""


def expected_maximum(samples: Seconds, count: int) -> float:
    """The mean of the largest of `count` independent draws from the empirical distribution of `samples` [n].

    It has the distribution function F**count, so that the i-th smallest sample is the largest draw with
    probability (i / n)**count - ((i - 1) / n)**count.
    """
    return float(np.sort(samples) @ chances_of_largest(len(samples), count))


def chances_of_largest(samples: int, count: int) -> NDArray[np.float64]:
    """With what probability each of the sorted samples [samples] is the largest of `count` draws."""
    return np.diff(np.linspace(0, 1, samples + 1) ** count)


def sums(samples: Seconds, terms: float, seed: int) -> Seconds:
    """Draws [DRAWS] of the sum of `terms` independent samples; a fraction of a term is one that much shorter.

    Above 64 terms a normal distribution stands for the sum of the whole ones.
    """
    random = np.random.default_rng(seed)
    whole, part = int(terms), terms - int(terms)
    if whole > 64:
        total = random.normal(whole * samples.mean(), np.sqrt(whole) * samples.std(), DRAWS)
        total = np.maximum(total, whole * samples.min())
    elif whole:
        total = random.choice(samples, (whole, DRAWS)).sum(axis=0)
    else:
        total = np.zeros(DRAWS)
    return np.asarray(total + part * random.choice(samples, DRAWS))
