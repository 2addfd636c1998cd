"""Training images changed at random, each by what its index, the epoch and the seed say, and nothing else.

So it does not matter which rank trains a sample, in which batch, before or after a rank was lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.data.dataset import Images
from rankwise.data.partition import Indices

GREY = 128
"""What is cut out becomes: the middle of the scale, which the network sees as 0."""


class _Purpose(IntEnum):
    """What random numbers are for; each has a stream of its own."""

    FLIP = 100
    ROW = 101
    COLUMN = 102
    CUT_ROW = 103
    CUT_COLUMN = 104


@dataclass(frozen=True)
class Augmentation:
    """What is done to the training images of an epoch.

    `flip`: each is mirrored left to right with equal chances (`random`), or by chance in the first epoch and
    then in every other one (`alternating`: Jordan 2024, arXiv:2404.00498, section 3.6, so that two epochs
    show both sides of each). `translate`: it is moved by up to this many pixels each way, and what comes into
    the frame is its reflection. `cutout`: a square of this many pixels anywhere on it becomes grey, a part of
    it where its middle is near the edge (DeVries and Taylor 2017, arXiv:1708.04552).
    """

    seed: int
    epoch: int
    flip: Literal["none", "random", "alternating"] = "none"
    translate: int = 0
    cutout: int = 0

    def __call__(self, images: Images, indices: Indices) -> Images:
        """The images of the samples at these `indices`, changed: uint8 [samples, height, width, channels].
        May overwrite what it is given."""
        if self.flip != "none":
            mirrored = self._mirrored(indices)
            images[mirrored] = images[mirrored][:, :, ::-1]
        if self.translate:
            images = self._translated(images, indices)
        if self.cutout:
            images[self._cut(images.shape[1:3], indices)] = GREY
        return images

    def _mirrored(self, indices: Indices) -> NDArray[np.bool_]:
        if self.flip == "random":
            return np.asarray(self._draw(_Purpose.FLIP, indices, 2) == 1)
        first = _numbers(self.seed, 1, _Purpose.FLIP, indices, 2)
        return np.asarray((first + self.epoch) % 2 == 1)

    def _translated(self, images: Images, indices: Indices) -> Images:
        count, height, width, channels = images.shape
        border = self.translate
        padded = np.pad(images, ((0, 0), (border, border), (border, border), (0, 0)), "reflect")
        # Every window of every image, as a view; a row of one is a run of bytes.
        sample, row, column, _ = padded.strides
        windows = np.lib.stride_tricks.as_strided(
            padded,
            (count, 2 * border + 1, 2 * border + 1, height, width * channels),
            (sample, row, column, row, 1),
            writeable=False,
        )
        top = self._draw(_Purpose.ROW, indices, 2 * border + 1)
        left = self._draw(_Purpose.COLUMN, indices, 2 * border + 1)
        return windows[np.arange(count), top, left].reshape(images.shape)

    def _cut(self, shape: tuple[int, ...], indices: Indices) -> NDArray[np.bool_]:
        """Which pixels [samples, height, width] are cut out."""
        height, width = shape
        rows = self._span(_Purpose.CUT_ROW, height, indices)
        columns = self._span(_Purpose.CUT_COLUMN, width, indices)
        return rows[:, :, None] & columns[:, None, :]

    def _span(self, purpose: _Purpose, pixels: int, indices: Indices) -> NDArray[np.bool_]:
        """Which pixels [samples, pixels] of one side are in the square, whose middle is any of them."""
        starts = self._draw(purpose, indices, pixels) - self.cutout // 2
        places = np.arange(pixels)
        return (places >= starts[:, None]) & (places < starts[:, None] + self.cutout)

    def _draw(self, purpose: _Purpose, indices: Indices, most: int) -> Indices:
        return _numbers(self.seed, self.epoch, purpose, indices, most)


def _numbers(seed: int, epoch: int, purpose: _Purpose, indices: Indices, most: int) -> Indices:
    """A random number from 0 to `most` - 1 for each index: SplitMix64's at that place (Steele, Lea and Flood
    2014), which needs none of those before it."""
    key = np.random.SeedSequence([seed, epoch, purpose]).generate_state(1, np.uint64)
    x = key + (indices.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((x ^ (x >> np.uint64(31))) % np.uint64(most)).astype(np.int64)
