"""The proof that each sample of an epoch was trained once."""

from __future__ import annotations

import numpy as np

from rankwise.comm import World
from rankwise.data.partition import Indices
from rankwise.training.history import SampleCounts


def count_samples(world: World, counts: Indices, expected: Indices, seed: int) -> SampleCounts:
    """How many samples all ranks trained in an epoch, how many of them too often, and how many too seldom.

    `counts` [n] says how often this rank trained each sample, `expected` [n] how often all should. To
    prove that what all ranks trained is that, 8 bytes are enough: each sample has a random 64-bit
    number, and the sums of the numbers trained and expected agree, modulo 2**64, only for the same
    samples. If they do not, the counts themselves are added up.
    """
    asked = int(expected.sum())
    numbers = np.random.default_rng(seed).integers(2**64, size=len(counts), dtype=np.uint64)
    fingerprint = np.array([np.sum(numbers * counts.astype(np.uint64))])
    world.allreduce(fingerprint)
    if fingerprint[0] == np.sum(numbers * expected.astype(np.uint64)):
        return SampleCounts(asked, asked)
    total = counts.copy()
    world.allreduce(total)
    surplus = total - expected
    return SampleCounts(
        asked, int(total.sum()), int(surplus.clip(min=0).sum()), int(-surplus.clip(max=0).sum())
    )
