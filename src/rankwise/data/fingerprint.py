"""What a checkpoint remembers of the samples that it was trained on."""

from __future__ import annotations

import hashlib

import numpy as np

from rankwise.data.dataset import Split
from rankwise.data.partition import Indices

LOOKED_AT_BYTES = 8_000_000
"""Of images, which may be far more than memory holds."""


def fingerprint(split: Split) -> str:
    """A hash of a split: its size, all labels, and images at equal distances, all of them if they are few."""
    found = hashlib.blake2b(digest_size=16)
    found.update(repr(split.images.shape).encode())
    found.update(np.ascontiguousarray(split.labels).data)
    count, size = len(split), max(1, int(np.prod(split.images.shape[1:])))
    some = np.linspace(0, count - 1, min(count, max(1, LOOKED_AT_BYTES // size))).astype(np.int64)
    found.update(np.ascontiguousarray(split.images[some]).data)
    return found.hexdigest()


def of_pool(pool: Indices) -> str:
    """The number of the samples that are trained, and a hash of which they are."""
    return f"{len(pool)} {hashlib.blake2b(np.ascontiguousarray(pool).data, digest_size=8).hexdigest()}"
