"""Scores of images, also from several views of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Views = Literal["none", "flip", "flip+shift"]


def score(model: Callable[[Tensor], Tensor], images: Tensor, tta: Views, below: float = 1.0) -> Tensor:
    """The scores [samples, classes] of images [samples, channels, height, width].

    With `flip` they are the mean over each image and its mirror image. With `flip+shift` half of it is that,
    and half the same of the image moved by a pixel to the upper left and to the lower right, with a
    reflected border (Jordan 2024, arXiv:2404.00498): six passes in place of one. Images whose likeliest
    class has the probability `below` or more after the first pass keep its scores.
    """
    scores = model(images)
    if tta == "none":
        return scores
    if below == 1:
        return _from_all_sides(model, images, scores, tta)
    doubtful = scores.float().softmax(1).amax(1) < below
    if doubtful.any():
        scores[doubtful] = _from_all_sides(model, images[doubtful], scores[doubtful], tta)
    return scores


def _from_all_sides(model: Callable[[Tensor], Tensor], images: Tensor, scores: Tensor, tta: Views) -> Tensor:
    """The mean over views of images that have these scores as they are."""

    def both_sides(views: Tensor, seen: Tensor) -> Tensor:
        return (seen + model(views.flip(3))) / 2

    mean = both_sides(images, scores)
    if tta == "flip":
        return mean
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    upper_left, lower_right = (padded[:, :, at : at + height, at : at + width] for at in (0, 2))
    moved = both_sides(upper_left, model(upper_left)) + both_sides(lower_right, model(lower_right))
    return mean / 2 + moved / 4
