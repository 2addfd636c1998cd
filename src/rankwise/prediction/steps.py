"""What steps take that no run has made: with other batches and threads, and on cores that ranks share."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from rankwise.config import TrainConfig
from rankwise.prediction.network import Cluster
from rankwise.prediction.slowest import SEED, Seconds, chances_of_largest, sums
from rankwise.prediction.source import Compute, Source

SLICE_S = 0.003
"""Linux lets a task run for about so long before another takes its core."""


def compute_at(source: Source, threads: int, batch: int) -> tuple[Compute, Seconds]:
    """What is known that is nearest to so many threads and this batch, and times [n] of steps there.

    Between two batch sizes the mean goes along a line; with one alone forward and backward grow with the
    batch, and the rest of a step does not.
    """
    nearest = min(abs(math.log(its.threads / threads)) for its in source.compute)
    these = [its for its in source.compute if abs(math.log(its.threads / threads)) == nearest]
    these.sort(key=lambda its: abs(math.log(its.batch / batch)))
    best = these[0]
    if best.batch == batch:
        return best, best.steps_s
    if len(these) > 1:
        slope = (these[1].mean_s - best.mean_s) / (these[1].batch - best.batch)
    else:
        slope = best.per_sample_s
    mean_s = max(best.mean_s + slope * (batch - best.batch), 0.1 * best.mean_s)
    factor = mean_s / best.mean_s
    return replace(best, backward_s=best.backward_s * batch / best.batch), best.steps_s * factor


def rounds_s(
    step_s: Seconds, terms: float, config: TrainConfig, crowd: float, here: int, cluster: Cluster
) -> tuple[Seconds, Seconds, int]:
    """Draws of the time that a rank alone would compute in a round, of what it takes beside the others of its
    host, and how many such times are independent."""
    if config.strategy == "two-level" and here > 1:  # those of a host meet in every step
        step_s = np.sort(sums(step_s, 1, SEED))
        random = np.random.default_rng(SEED)
        slowest = random.choice(step_s, len(step_s), p=chances_of_largest(len(step_s), here))
        return sums(step_s, terms, SEED), sums(slowest * max(crowd, 1), terms, SEED), len(cluster.hosts)
    alone = sums(step_s, terms, SEED)
    if crowd <= 1:
        return alone, alone, config.workers
    # The cores of a host are shared out: all its work, a time slice more or less, or one rank after the
    # other.
    work = sums(step_s, terms * here, SEED + 1) * crowd / here
    return alone, np.maximum(alone, np.minimum(alone * math.ceil(crowd), work + SLICE_S)), len(cluster.hosts)


def spread_of_mean(steps_s: Seconds, block: int = 16, draws: int = 200) -> float:
    """By which part the mean of steps may be off: half of what 90% of the means of resampled blocks span.

    Neighbouring steps are alike, so blocks of them are drawn (Künsch 1989, doi:10.1214/aos/1176347265).
    """
    block = min(block, max(1, len(steps_s) // 4))
    means = np.convolve(steps_s, np.ones(block) / block, "valid")
    random = np.random.default_rng(SEED)
    drawn = random.choice(means, (draws, max(1, len(steps_s) // block))).mean(axis=1)
    low, high = np.quantile(drawn, [0.05, 0.95])
    return float((high - low) / 2 / steps_s.mean())
