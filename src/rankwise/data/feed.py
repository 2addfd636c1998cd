"""From uint8 images in a memory map to the float tensors of a batch."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from rankwise.data.dataset import Split
from rankwise.data.partition import Indices

CHUNK = 256
"""Samples gathered at once: a small batch is cut from a chunk that is still in the processor's cache."""


class Feed:
    """Hands out the samples of `order` one batch after the other.

    Pixels are scaled to [-1, 1], the paper's mean and deviation of 0.5. With a `generator`, images
    may be mirrored (`flip`) and cropped out of a border of zeros (`crop_padding` pixels); the same
    generator, order and batch sizes give the same bits.
    """

    def __init__(
        self,
        split: Split,
        order: Indices,
        batch_size: int,
        *,
        flip: bool = False,
        crop_padding: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._images = split.images
        self._labels = split.labels
        self._order = order
        self._chunk = batch_size * max(1, CHUNK // batch_size)
        self._flip = flip
        self._crop_padding = crop_padding
        self._generator = generator
        self._next = 0
        self._chunk_start = 0
        self._pixels = torch.empty(0)
        self._targets = torch.empty(0, dtype=torch.int64)

    def take(self, count: int) -> tuple[Tensor, Tensor]:
        """The next `count` samples: images float32 [count, channels, height, width] in channels-last
        memory, labels int64 [count]."""
        start = self._next - self._chunk_start
        if start >= len(self._targets):
            self._load()
            start = 0
        self._next += count
        return self._pixels[start : start + count], self._targets[start : start + count]

    def _load(self) -> None:
        chosen = self._order[self._next : self._next + self._chunk]
        pixels = torch.from_numpy(np.take(self._images, chosen, axis=0)).permute(0, 3, 1, 2)
        if self._flip:
            pixels = _mirror_some(pixels, self._generator)
        scaled = pixels.to(torch.float32).mul_(2 / 255).sub_(1)
        if self._crop_padding:
            scaled = _crop_some(scaled, self._crop_padding, self._generator)
        self._pixels = scaled
        self._targets = torch.from_numpy(np.take(self._labels, chosen))
        self._chunk_start = self._next


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
