"""The networks of "94% on CIFAR-10 in 3.29 Seconds on a Single GPU" (Jordan 2024, arXiv:2404.00498)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

MOMENTUM = 0.6
"""Part of the running statistics that stays at a step."""


class Airbench(nn.Module):
    """A 2x2 convolution that is meant for `--whitening`, three blocks that halve the image, a linear head.

    The convolutions of blocks have no bias and begin as the identity on the channels that come in; batch
    normalisation has a bias and no weight that is trained. What the head says is divided by 9.
    """

    widths: Sequence[int] = (64, 256, 256)
    convolutions = 2

    def __init__(self, image_shape: tuple[int, int, int] = (3, 32, 32), classes: int = 10) -> None:
        super().__init__()
        filters = 2 * image_shape[0] * 2 * 2  # a pair for each direction of a patch
        inputs = [filters, *self.widths]
        self.whitening = nn.Conv2d(image_shape[0], filters, 2)
        self.blocks = nn.Sequential(
            *(_Block(i, o, self.convolutions) for i, o in zip(inputs, self.widths, strict=False))
        )
        self.head = nn.Linear(self.widths[-1], classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        x = nn.functional.gelu(self.whitening(images))
        x = self.blocks(x)
        scores: Tensor = self.head(x.amax((2, 3))) / 9
        return scores


class AirbenchWide(Airbench):
    """The one for 95%: wider."""

    widths = (128, 384, 384)


class AirbenchDeep(Airbench):
    """The one for 96%: wider still, with a third convolution in each block and a short cut around two."""

    widths = (128, 512, 512)
    convolutions = 3


class _Block(nn.Module):
    """Convolutions, the first followed by max-pooling, each by normalisation and GELU."""

    def __init__(self, inputs: int, outputs: int, convolutions: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            _convolution(inputs, outputs), nn.MaxPool2d(2), _normalisation(outputs), nn.GELU()
        )
        self.rest = nn.Sequential(
            *(
                layer
                for number in range(1, convolutions)
                for layer in (
                    _convolution(outputs, outputs),
                    _normalisation(outputs),
                    *([nn.GELU()] if number < convolutions - 1 else []),
                )
            )
        )
        self.has_short_cut = convolutions > 2

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        rest = self.rest(x)
        return nn.functional.gelu(x + rest if self.has_short_cut else rest)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding="same", bias=False)
    with torch.no_grad():
        nn.init.dirac_(layer.weight[:inputs])
    return layer


def _normalisation(channels: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, eps=1e-12, momentum=1 - MOMENTUM)
    layer.weight.requires_grad_(False)
    return layer
