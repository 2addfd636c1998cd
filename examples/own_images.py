"""Your own images and your own network, on the command line:

cd examples
rankwise train --dataset own_images:bars --model own_images:Bars --ranks 3 --epochs 5 --lr 0.05
"""

import numpy as np
from torch import nn


def bars():
    """Grey 12x12 images of a noisy bar that lies or stands: training and test images and labels."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 120, (2400, 12, 12, 1), dtype=np.uint8)
    labels = rng.integers(0, 2, 2400)
    for image, label, place in zip(images, labels, rng.integers(1, 11, 2400), strict=True):
        bar = image[place] if label else image[:, place]
        bar += 100
    return images[:2000], labels[:2000], images[2000:], labels[2000:], ["stands", "lies"]


class Bars(nn.Sequential):
    """A small network, built for the images that it is to see."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 8, 5),
            nn.ReLU(),
            nn.AdaptiveMaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32, classes),
        )
