"""A small perceptron: the cheapest network that learns, for tests and first tries."""

from __future__ import annotations

import math

from torch import nn


class MLP(nn.Sequential):
    """Two hidden layers of 256 with ReLU, for images of any shape."""

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(math.prod(image_shape), 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, classes),
        )
