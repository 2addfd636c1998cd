"""Smaller training images in the first epochs, which cost less (progressive resizing)."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Resizing:
    """Height in pixels and last epoch of each stage of `--resize`, in their order; none for images as they
    are."""

    stages: tuple[tuple[int, int], ...] = ()

    def height_in(self, epoch: int) -> int | None:
        """Pixels to which the training images of an epoch are scaled, None for images as they are."""
        return next((height for height, last in self.stages if epoch <= last), None)


@functools.cache
def parse_resize(text: str) -> Resizing:
    """``none``, or ``HEIGHT:EPOCHS,...``. Raises ConfigError, one line."""
    if text == "none":
        return Resizing()
    found, last = [], 0
    for part in text.split(","):
        height, _, epochs = part.partition(":")
        if not (height.isdecimal() and epochs.isdecimal() and int(height) > 0 and int(epochs) > 0):
            raise ConfigError(
                f"--resize {text} was given, expected none, or HEIGHT:EPOCHS,..., e.g. 24:4 for "
                "four epochs on images of 24 pixels"
            )
        last += int(epochs)
        found.append((int(height), last))
    return Resizing(tuple(found))


def shape_at(height: int, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape of images [channels, height, width] that are scaled to this height."""
    channels, full, width = image_shape
    return channels, height, max(1, round(width * height / full))


def scaled(images: Tensor, height: int) -> Tensor:
    """Images float32 [samples, channels, height, width] at another height, by linear interpolation over as
    many pixels as become one."""
    from torch.nn import functional as F

    _, *size = shape_at(height, tuple(images.shape[1:]))  # type: ignore[arg-type]
    return F.interpolate(images, size, mode="bilinear", antialias=True)
