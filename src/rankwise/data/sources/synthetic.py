"""Images made by rule, any number of them: for measuring, and for tests that need no download."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rankwise.data.dataset import Decoded, Images, Labels, Report, Samples, Source
from rankwise.errors import DataError

SIDE, CHANNELS = 32, 3
MARGIN = 6
"""Pixels between the border and the middle of a pattern, at least."""
DIRECTIONS = 5
WAVES_PER_PIXEL = np.array([0.11, 0.2])
CLASSES = tuple(
    f"{round(180 * direction / DIRECTIONS)} degrees, {width}"
    for direction in range(DIRECTIONS)
    for width in ("wide", "narrow")
)
TINTS = np.rint(
    16
    * np.cos(
        2 * np.pi * (3 * np.arange(len(CLASSES))[:, None] / len(CLASSES) + np.arange(CHANNELS) / CHANNELS)
    )
).astype(np.int16)
"""A faint colour for each class [classes, 3]: little to know a class by, but it gets learning started."""

PART = 250
"""Samples made at once: their arrays stay in the processor's cache."""

LEAST, MOST_TESTS = 10, 10_000


class Synthetic(Source):
    """`count` training samples in ten classes, and a fifth as many (10 to 10,000) for testing.

    A class is a grating of one direction and one stripe width. Its place, phase, colour and
    contrast are random, a second grating of no meaning lies over it, and all is noisy: averaging
    pixels does not tell the classes apart, so a linear model stays under 30% where a small
    convolutional network learns 70% and more from 10,000 samples.
    """

    def __init__(self, argument: str | None) -> None:
        self._count = _parse_count(argument)
        self.name = f"synthetic:{self._count}"

    def check(self) -> None:
        """Nothing can be missing."""

    def key(self) -> dict[str, object]:
        return {"recipe": 1}

    def decode(self, report: Report, downloads: Path) -> Decoded:
        tests = min(max(self._count // 5, LEAST), MOST_TESTS)
        shape = (SIDE, SIDE, CHANNELS)
        return Decoded(
            CLASSES,
            Samples(self._count, shape, _parts(self._count, split=0)),
            Samples(tests, shape, _parts(tests, split=1)),
            "made by rankwise",
        )


def _parse_count(argument: str | None) -> int:
    """The number of samples in `1000`, `1_000`, `50k` or `2M`."""
    form = re.fullmatch(r"(\d{1,9}(?:_\d{1,9}){0,4})([kM]?)", argument or "", re.ASCII)
    count = int(form[1]) * {"": 1, "k": 1_000, "M": 1_000_000}[form[2]] if form else 0
    if count < LEAST:
        raise DataError(
            f"dataset 'synthetic:{argument or ''}' has no number of samples: "
            f"write a whole number of {LEAST} or more, such as synthetic:10000, synthetic:50k or synthetic:2M"
        )
    return count


def _parts(count: int, split: int) -> Iterator[tuple[Images, Labels]]:
    """The samples of one split, each part from a generator of its own."""
    for number, start in enumerate(range(0, count, PART)):
        yield _part(np.random.default_rng([split, number]), min(PART, count - start))


def _part(random: np.random.Generator, count: int) -> tuple[Images, Labels]:
    """`count` samples, the classes as even as can be.

    Added up in int16, which is fast and rounds alike on every processor.
    """
    labels = random.permutation(np.arange(count) % len(CLASSES))
    pattern = _gratings(random, *np.divmod(labels, len(WAVES_PER_PIXEL)))
    distraction = _gratings(random, *random.integers([[DIRECTIONS], [len(WAVES_PER_PIXEL)]], size=(2, count)))
    signs = random.integers(0, 2, (2, count, 1, 1), np.int16) * 2 - 1
    images = np.empty((count, SIDE, SIDE, CHANNELS), np.uint8)
    for channel in range(CHANNELS):  # the innermost loops run along rows of pixels, not over three colours
        plane = pattern * (signs[0] * random.integers(40, 110, (count, 1, 1), np.int16))
        plane += distraction * (signs[1] * random.integers(30, 80, (count, 1, 1), np.int16))
        plane >>= 7
        plane += random.integers(64, 192, (count, 1, 1), np.int16) + TINTS[labels, channel, None, None]
        noise = np.frombuffer(random.bytes(plane.size), np.int8).reshape(plane.shape).astype(np.int16)
        plane += (noise * 60) >> 7
        images[..., channel] = np.clip(plane, 0, 255, out=plane)
    return images, labels


def _gratings(
    random: np.random.Generator, direction: NDArray[np.int64], width: NDArray[np.int64]
) -> NDArray[np.int16]:
    """Striped patches [n, SIDE, SIDE] of values in -127..127, each at some place and in some phase.

    sin(x + y) = sin x cos y + cos x sin y, and the patch's bell is a product as well: so a sample
    costs sines for 2 * SIDE places, not for SIDE * SIDE.
    """
    count = len(direction)
    angle = np.pi / DIRECTIONS * (direction + random.uniform(-0.35, 0.35, count))
    waves = 2 * np.pi * WAVES_PER_PIXEL[width] * np.exp(random.uniform(-0.15, 0.15, count))
    phase = random.uniform(0, 2 * np.pi, count)
    spread = random.uniform(5, 9, (count, 1))
    middle = random.uniform(MARGIN, SIDE - MARGIN, (2, count, 1))
    from_x, from_y = np.arange(SIDE) - middle
    x = (waves * np.cos(angle))[:, None] * from_x + phase[:, None]
    y = (waves * np.sin(angle))[:, None] * from_y
    bell_x, bell_y = np.exp(-0.5 * (from_x / spread) ** 2), np.exp(-0.5 * (from_y / spread) ** 2)

    def product(along_y: NDArray[np.float64], along_x: NDArray[np.float64]) -> NDArray[np.int16]:
        rounded_y, rounded_x = (np.rint(127 * side).astype(np.int16) for side in (along_y, along_x))
        return rounded_y[:, :, None] * rounded_x[:, None, :]

    return (
        product(bell_y * np.cos(y), bell_x * np.sin(x)) + product(bell_y * np.sin(y), bell_x * np.cos(x))
    ) >> 7
