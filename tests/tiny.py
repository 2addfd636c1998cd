"""The smallest training that is one: what tests train on when learning is not their subject."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

TRAIN, VAL, CLASSES, SIDE = 200, 50, 10, 8

DATASET = f"{__name__}:images"
MODEL = f"{__name__}:net"

WORDS = ("--dataset", DATASET, "--model", MODEL, "--batch-size", "16", "--lr", "0.02")
"""The same for the command line; `Command` lets programs find this file."""

PATTERNS = np.random.default_rng(0).integers(0, 2, (CLASSES, SIDE, SIDE)) * 160 + 48


def images() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A noisy pattern of 8x8 grey values for each class, 200 to train on and 50 to validate: learnt in a few
    epochs, and not at once."""
    rng = np.random.default_rng(1)

    def some(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % CLASSES
        noisy = PATTERNS[labels] + rng.normal(0, 60, (count, SIDE, SIDE))
        return noisy.clip(0, 255).astype(np.uint8), labels

    return (*some(TRAIN), *some(VAL))


def net(image_shape: tuple[int, int, int] = (1, SIDE, SIDE), classes: int = CLASSES) -> nn.Module:
    """One hidden layer: about 2,000 parameters for these images."""
    from torch import nn  # which a launcher, that asks for the images alone, does without

    return nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(image_shape), 26), nn.ReLU(), nn.Linear(26, classes)
    )
