"""What steps take that no run has made: with other batches and threads, and on cores that ranks share."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace

import numpy as np

from rankwise.prediction.network import Cluster
from rankwise.prediction.slowest import SEED, Seconds, chances_of_largest, sums
from rankwise.prediction.source import Compute, Source

SLICE_S = 0.003
"""About how long Linux lets a task run before another gets its core."""


def compute_at(
    source: Source, threads: int, batch: int, *, busy: int = 1, meets: bool = False
) -> tuple[Compute, Seconds]:
    """The known steps that are nearest to this number of threads and this batch, and the times [n] of steps
    with them, with an exchange after each if it `meets`.

    Between two batch sizes the mean goes along a line; with one alone forward and backward grow with the
    batch, and the rest of a step does not. Steps of the other kind stand in where there are more of them,
    by what an exchange adds to the next step. Of several with the same batch those count during which as many
    cores worked as there will, `busy` of a host.
    """
    there = sorted(
        known_at(source, threads),
        key=lambda its: (abs(math.log(its.batch / batch)), abs(math.log(its.busy / max(busy, 1)))),
    )
    own = [its for its in there if its.meets == meets]
    others = [its for its in there if its.meets != meets]
    known = own and (own[0].batch == batch or len(own) >= len(others))
    these, added_s = (own, 0.0) if known else (others, meeting_s(source, threads) * (1 if meets else -1))
    best = these[0]
    slope = best.per_sample_s
    if of_others := [its for its in these if its.batch != best.batch]:
        slope = (of_others[0].mean_s - best.mean_s) / (of_others[0].batch - best.batch)
    mean_s = max(best.mean_s + slope * (batch - best.batch) + added_s, 0.1 * best.mean_s)
    steps_s = best.steps_s * (mean_s / best.mean_s)
    return replace(best, backward_s=best.backward_s * batch / best.batch), steps_s


def meeting_s(source: Source, threads: int) -> float:
    """What an exchange adds to the next step: the difference between steps with and without, where there are
    both with the same batch; 0 if that is not known."""
    there = known_at(source, threads)
    more_s = []
    for met in (its for its in there if its.meets):
        alike = [its for its in there if not its.meets and its.batch == met.batch]
        if alike:
            more_s.append(met.mean_s - min(alike, key=lambda its: abs(its.busy - met.busy)).mean_s)
    return max(0.0, statistics.mean(more_s)) if more_s else 0.0


def known_at(source: Source, threads: int) -> list[Compute]:
    """What is known on the number of threads that is nearest."""
    apart = [abs(math.log(its.threads / threads)) for its in source.compute]
    return [its for its, far in zip(source.compute, apart, strict=True) if far == min(apart)]


def rounds_s(
    step_s: Seconds,
    terms: float,
    workers: int,
    crowd: float,
    here: int,
    cluster: Cluster,
    more_s: float = 0.0,
    *,
    together: int = 1,
) -> tuple[Seconds, Seconds, int]:
    """Draws of the time that a rank alone computes in a round of `terms` steps, draws of what it takes among
    the `here` ranks of its host, and how many such times are independent.

    `crowd` threads share a core, `together` workers meet in each step (1 for none), and the first step of a
    round takes `more_s` longer.
    """
    if together > 1:
        step_s = np.sort(sums(step_s, 1, SEED))
        random = np.random.default_rng(SEED)
        slowest = random.choice(step_s, len(step_s), p=chances_of_largest(len(step_s), together))
        return sums(step_s, terms, SEED), sums(slowest * max(crowd, 1), terms, SEED), -(-workers // together)
    alone = sums(step_s, terms, SEED) + more_s
    if crowd <= 1:
        return alone, alone, workers
    # The cores of a host are shared out: all its work, a time slice more or less, or one rank after the
    # other.
    work = (sums(step_s, terms * here, SEED + 1) / here + more_s) * crowd
    return alone, np.maximum(alone, np.minimum(alone * math.ceil(crowd), work + SLICE_S)), len(cluster.hosts)
