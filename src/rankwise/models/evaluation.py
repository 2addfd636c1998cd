"""Scores of images, also from several views of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F


def score(
    model: Callable[[Tensor], Tensor], images: Tensor, tta: Literal["none", "flip", "flip+shift"]
) -> Tensor:
    """The scores [samples, classes] of images [samples, channels, height, width].

    With `flip` they are the mean over each image and its mirror image. With `flip+shift` half of it is that,
    and half the same of the image moved by a pixel to the upper left and to the lower right, with a
    reflected border (Jordan 2024, arXiv:2404.00498): six passes in place of one.
    """
    if tta == "none":
        return model(images)

    def both_sides(views: Tensor) -> Tensor:
        return (model(views) + model(views.flip(3))) / 2

    if tta == "flip":
        return both_sides(images)
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    upper_left, lower_right = (padded[:, :, at : at + height, at : at + width] for at in (0, 2))
    return both_sides(images) / 2 + (both_sides(upper_left) + both_sides(lower_right)) / 4
