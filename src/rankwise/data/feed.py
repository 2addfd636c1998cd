"""From uint8 images in a memory map to the float tensors of a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise.data.augmentation import Augmentation
from rankwise.data.dataset import Images, Split
from rankwise.data.partition import Indices
from rankwise.data.resizing import scaled

CHUNK = 256
"""Samples gathered at once: a small batch is cut from a chunk that is still in the processor's cache."""


class Feed:
    """Turns a rank's samples into tensors, batch after batch.

    Images are float32 [batch, channels, height, width] in channels-last memory, labels int64 [batch].
    Pixels are scaled to [-1, 1], the paper's mean and deviation of 0.5. `order` are the samples to come, as
    far as is known. An `augmentation` changes images before, and at the end they are scaled to a `height`;
    without these they are as they are.
    """

    def __init__(
        self,
        split: Split,
        order: Indices,
        *,
        augmentation: Augmentation | None = None,
        height: int | None = None,
    ) -> None:
        self._split = split
        self._order = order
        self._augmentation = augmentation
        self._height = height
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
        pixels = np.take(self._split.images, chosen, axis=0)
        if self._augmentation is not None:
            pixels = self._augmentation(pixels, chosen)
        images = as_input(pixels)
        if self._height is not None:
            images = scaled(images, self._height)
        return images, torch.from_numpy(np.take(self._split.labels, chosen))


def as_input(pixels: Images) -> Tensor:
    """What a network gets of images [samples, height, width, channels]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32).mul_(2 / 255).sub_(1)


def feed(split: Split, order: Indices, batch_size: int, **options: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of `order`, batch after batch, the last one with what is left; `options` are Feed's."""
    batches = Feed(split, order, **options)
    for start in range(0, len(order), batch_size):
        yield batches.take(order[start : start + batch_size])
