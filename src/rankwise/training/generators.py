"""The generators of random numbers that code of a user's draws from: of torch, numpy and Python."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

Generators = tuple[dict[str, Tensor], dict[str, Any]]
"""Their states: arrays by name, and the rest as JSON."""


def generators() -> Generators:
    """The states as they are now."""
    kind, keys, place, has_normal, normal = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, spare = random.getstate()
    arrays = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "python": torch.tensor(words, dtype=torch.int64),
    }
    return arrays, {
        "numpy": [str(kind), int(place), int(has_normal), float(normal)],
        "python": [version, spare],
    }


def set_generators(states: Generators) -> None:
    """Go on from these states. Raises ValueError, RuntimeError, KeyError or TypeError if they are none."""
    arrays, rest = states
    kind, place, has_normal, normal = rest["numpy"]
    version, spare = rest["python"]
    torch.set_rng_state(arrays["torch"])
    np.random.set_state(  # noqa: NPY002
        (kind, arrays["numpy"].numpy().astype(np.uint32), place, has_normal, normal)
    )
    random.setstate((version, tuple(arrays["python"].tolist()), spare))
