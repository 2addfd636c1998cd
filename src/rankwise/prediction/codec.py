"""How long compressing takes, tried on this machine."""

from __future__ import annotations

import time
from functools import cache

import numpy as np

from rankwise.prediction.traffic import Model, Traffic
from rankwise.strategies import compression
from rankwise.strategies.compression import ByPayload

TRIALS = 5


def seconds(compress: str, model: Model, traffic: Traffic) -> float:
    """What a rank takes to compress its values and to unpack what comes: of every rank where all payloads go
    to all. PowerSGD's products are taken as one pass over its payload."""
    if compress == "none" or not traffic.payload_bytes:
        return 0.0
    encode_s, decode_s = _try(compress, model.parameters)
    return encode_s + decode_s * max(1.0, traffic.unpacked_bytes / traffic.payload_bytes)


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
