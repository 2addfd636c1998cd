"""Scores of a network over several views of an image (test-time augmentation)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Views = Literal["none", "flip", "flip+shift"]


def scores(model: nn.Module, images: Tensor, views: Views) -> Tensor:
    """Scores [batch, classes] of images [batch, channels, height, width].

    ``flip`` takes the mean over an image and its mirror image. ``flip+shift`` gives that half of the weight,
    and a quarter each to the same of the image moved by one pixel up and left, and down and right, with its
    border mirrored (Jordan 2024, arXiv:2404.00498, section 3.5).
    """
    if views == "none":
        found: Tensor = model(images)
        return found
    upright = _with_mirror(model, images)
    if views == "flip":
        return upright
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), mode="reflect")
    moved = [padded[:, :, at : at + height, at : at + width] for at in (0, 2)]
    return 0.5 * upright + 0.25 * sum(_with_mirror(model, view) for view in moved)


def _with_mirror(model: nn.Module, images: Tensor) -> Tensor:
    return 0.5 * (model(images) + model(images.flip(3)))
