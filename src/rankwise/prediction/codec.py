"""How long compressing takes, tried on this machine."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from rankwise.strategies import compression
from rankwise.strategies.compression import ByPayload
from rankwise.strategies.traffic import ModelSize, Traffic

TRIALS = 5


def seconds(compress: str, model: ModelSize, traffic: Traffic) -> float:
    """What a rank takes in a round to compress its values and to unpack what comes. PowerSGD's products count
    as one pass over its payload."""
    if not traffic.compressed:
        return 0.0
    encode_s, decode_s = _try(compress, model.parameters)
    return encode_s + decode_s * max(1, traffic.unpacked)


@cache
def _try(compress: str, numbers: int) -> tuple[float, float]:
    """The least seconds of some trials, to encode and to decode."""
    found = compression.parse(compress)
    if not isinstance(found, ByPayload):
        return 0.0, 0.0
    random = np.random.default_rng(0)
    values = random.standard_normal(numbers).astype(np.float32)
    encodes, decodes = [], []
    for _ in range(TRIALS):
        started_s = time.perf_counter()
        payload = found.encode(values, random)
        between_s = time.perf_counter()
        found.decode(payload, numbers)
        encodes.append(between_s - started_s)
        decodes.append(time.perf_counter() - between_s)
    return min(encodes), min(decodes)
