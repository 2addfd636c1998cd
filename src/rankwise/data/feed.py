"""From uint8 images in a memory map to the float tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.data.dataset import Split
from rankwise.data.partition import Indices

CHUNK = 256
"""Samples gathered at once: a small batch is cut from a chunk that is still in the processor's cache."""


class Feed:
    """Turns a rank's samples into tensors, batch after batch.

    Images are float32 [batch, channels, height, width] in channels-last memory, labels int64 [batch].
    Pixels are scaled to [-1, 1], the paper's mean and deviation of 0.5. With a `generator` images may be
    mirrored (`flip`) and cropped out of a border of zeros (`crop_padding` pixels); the same generator,
    order and batches give the same bits. `order` are the samples to come, as far as is known.
    """

    def __init__(
        self,
        split: Split,
        order: Indices,
        *,
        flip: bool = False,
        crop_padding: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._split = split
        self._order = order
        self._flip = flip
        self._crop_padding = crop_padding
        self._generator = generator
        self._next = self._chunk_start = 0
        self._chunk: tuple[Tensor, Tensor] | None = None

    def take(self, indices: Indices) -> tuple[Tensor, Tensor]:
        """The samples at these indices: the next ones of the order, or others if it has changed."""
        start, self._next = self._next, self._next + len(indices)
        if not np.array_equal(self._order[start : self._next], indices):
            return self._load(indices)
        if self._chunk is None or self._next > self._chunk_start + len(self._chunk[1]):
            size = len(indices) * max(1, CHUNK // len(indices))
            self._chunk_start, self._chunk = start, self._load(self._order[start : start + size])
        span = slice(start - self._chunk_start, self._next - self._chunk_start)
        images, labels = self._chunk
        return images[span], labels[span]

    def _load(self, chosen: Indices) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.take(self._split.images, chosen, axis=0)).permute(0, 3, 1, 2)
        if self._flip:
            pixels = _mirror_some(pixels, self._generator)
        images = pixels.to(torch.float32).mul_(2 / 255).sub_(1)
        if self._crop_padding:
            images = _crop_some(images, self._crop_padding, self._generator)
        return images, torch.from_numpy(np.take(self._split.labels, chosen))


def feed(split: Split, order: Indices, batch_size: int, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of `order`, batch after batch, the last one with what is left; `options` are Feed's."""
    batches = Feed(split, order, **options)
    for start in range(0, len(order), batch_size):
        yield batches.take(order[start : start + batch_size])


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
