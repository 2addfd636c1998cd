"""What a dataset is, and what a source of datasets must do."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
"""[samples, height, width, channels]"""

Labels = NDArray[np.int64]
"""[samples], each an index into the names of the classes"""

Report = Callable[[str, int, int], None]
"""Told how far a longer piece of work is: what is done, how much of it, out of how much."""


@dataclass(frozen=True, eq=False)
class Split:
    """Samples and their classes: read-only memory maps, which all processes of a host share."""

    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A dataset that stands ready; `source` says where its samples come from."""

    name: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    source: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width), the order in which networks speak of images."""
        height, width, channels = self.train.images.shape[1:]
        return channels, height, width


@dataclass(frozen=True)
class Samples:
    """A split that is still to be decoded: how much it will be, and its parts in order.

    `shape` is (height, width, channels) of every image. The lengths of the parts add up to `count`.
    """

    count: int
    shape: tuple[int, int, int]
    parts: Iterable[tuple[Images, Labels]]


@dataclass(frozen=True)
class Decoded:
    """A dataset on its way into the cache."""

    classes: tuple[str, ...]
    train: Samples
    test: Samples
    origin: str


class Source(ABC):
    """One dataset that can be decoded. Every method raises DataError, and nothing else, on bad input."""

    name: str
    """The dataset's spec in its one normal form, so that 1M and 1_000_000 share a cache entry."""

    any_entry: bool = False
    """Whether each finished cache entry of this name will do, wherever its samples came from."""

    @abstractmethod
    def check(self) -> None:
        """Look, cheaply, whether all that is needed is there."""

    @abstractmethod
    def key(self) -> dict[str, object]:
        """What the samples depend on, as JSON: a dataset is decoded anew when this changes."""

    @abstractmethod
    def decode(self, report: Report, downloads: Path) -> Decoded:
        """Read the samples. The parts may be read later, one by one; downloads go to `downloads`."""
