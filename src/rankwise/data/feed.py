"""From uint8 images in a memory map to the float tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rankwise.data.dataset import Split
from rankwise.data.partition import Indices

CHUNK = 256
"""Samples gathered at once: a small batch is cut from a chunk that is still in the processor's cache."""


def feed(
    split: Split,
    order: Indices,
    batch_size: int,
    *,
    flip: bool = False,
    crop_padding: int = 0,
    generator: torch.Generator | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of `order`, batch after batch, the last one with what is left.

    Gives images, float32 [batch, channels, height, width] in channels-last memory, and labels, int64
    [batch]. Pixels are scaled to [-1, 1], the paper's mean and deviation of 0.5. With a `generator`
    images may be mirrored (`flip`) and cropped out of a border of zeros (`crop_padding` pixels); the
    same generator, order and batch size give the same bits.
    """
    chunk = batch_size * max(1, CHUNK // batch_size)
    for start in range(0, len(order), chunk):
        chosen = order[start : start + chunk]
        pixels = torch.from_numpy(np.take(split.images, chosen, axis=0)).permute(0, 3, 1, 2)
        if flip:
            pixels = _mirror_some(pixels, generator)
        images = pixels.to(torch.float32).mul_(2 / 255).sub_(1)
        if crop_padding:
            images = _crop_some(images, crop_padding, generator)
        labels = torch.from_numpy(np.take(split.labels, chosen))
        yield from zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True)


def _mirror_some(images: Tensor, generator: torch.Generator | None) -> Tensor:
    """Each image as it is or mirrored left to right, with equal chances."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(3), images)


def _crop_some(images: Tensor, padding: int, generator: torch.Generator | None) -> Tensor:
    """Each image moved by up to `padding` pixels each way, zeros where it leaves the frame."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    cropped = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return cropped.permute(0, 3, 1, 2)
