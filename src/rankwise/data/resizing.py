"""Smaller training images in the first epochs, which cost less (progressive resizing)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


def height_in(config: TrainConfig, epoch: int) -> int | None:
    """Pixels to which the training images of an epoch are scaled, None for images as they are."""
    for height, last in stages(config):
        if epoch <= last:
            return height
    return None


def stages(config: TrainConfig) -> list[tuple[int, int]]:
    """Height in pixels and last epoch of each stage of `--resize`, in their order. Raises ConfigError."""
    if config.resize == "none":
        return []
    found, last = [], 0
    for part in config.resize.split(","):
        height, _, epochs = part.partition(":")
        if not (height.isdecimal() and epochs.isdecimal() and int(height) > 0 and int(epochs) > 0):
            raise ConfigError(
                f"--resize {config.resize} was given, expected none, or HEIGHT:EPOCHS,..., e.g. 24:4 for "
                "four epochs on images of 24 pixels"
            )
        last += int(epochs)
        found.append((int(height), last))
    return found


def check(config: TrainConfig, image_shape: tuple[int, int, int]) -> None:
    """Raises ConfigError, one line, unless images [channels, height, width] are larger than all stages."""
    for height, _ in stages(config):
        if height >= image_shape[1]:
            raise ConfigError(
                f"--resize {config.resize} was given, but images of {config.dataset} have a height of "
                f"{image_shape[1]} pixels: expected fewer"
            )


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
