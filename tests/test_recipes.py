"""What good recipes need: each option against a plain reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankwise import data, models
from rankwise.config import TrainConfig
from rankwise.data.feed import feed
from rankwise.models.views import scores
from rankwise.record import Record


def test_smoothed_labels(
    config: Callable[..., TrainConfig], train_in_threads: Callable[..., tuple[Record, Any, Any]]
) -> None:
    """The loss of the first step is the cross entropy to labels of which a fifth is spread over all classes,
    written out; the validation loss is to the labels as they are."""
    plain = config(epochs=1, train_limit=64, batch_size=64, seed=3)
    smooth = config(epochs=1, train_limit=64, batch_size=64, seed=3, label_smoothing=0.2)
    record, _, _ = train_in_threads(smooth, folder="smooth")
    whole, _, _ = train_in_threads(plain, folder="plain")
    dataset = data.prepare("digits")
    torch.manual_seed(3)
    model = models.build("mlp", dataset.image_shape, 10)
    from rankwise.data.selection import select

    pool = select(smooth, dataset).train_pool
    ((images, labels),) = feed(dataset.train, pool, 64)
    log = F.log_softmax(model(images), dim=1).detach().numpy()
    targets = np.full((64, 10), 0.02)
    targets[np.arange(64), labels.numpy()] += 0.8
    assert record.epochs[0].train_loss == pytest.approx(float(-(targets * log).sum(1).mean()), rel=1e-5)
    assert whole.epochs[0].train_loss == pytest.approx(float(F.nll_loss(torch.tensor(log), labels)), rel=1e-5)


class Linear(nn.Module):
    """Tells views apart: each pixel counts in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(5, 2 * 6 * 7, generator=torch.Generator().manual_seed(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(len(images), -1) @ self.weight.T


def test_views_of_an_image() -> None:
    """The mean over views, against a loop over pixels."""
    model, images = Linear(), torch.randn(3, 2, 6, 7, generator=torch.Generator().manual_seed(2))

    def moved(by: int, mirrored: bool) -> np.ndarray:
        found = np.empty_like(images.numpy())
        for row in range(6):
            for column in range(7):
                # Moved up and left by one means that a pixel comes from one below and right of it.
                source_row, source_column = abs(row + by), abs(column + by)
                source_row = min(source_row, 10 - source_row)
                source_column = min(source_column, 12 - source_column)
                place = 6 - column if mirrored else column
                found[:, :, row, place] = images.numpy()[:, :, source_row, source_column]
        return found

    def reference(by: int) -> np.ndarray:
        both = [model(torch.tensor(moved(by, mirrored))).numpy() for mirrored in (False, True)]
        return np.mean(both, axis=0)

    assert np.allclose(scores(model, images, "none"), model(images))
    assert np.allclose(scores(model, images, "flip"), reference(0), atol=1e-5)
    expected = 0.5 * reference(0) + 0.25 * reference(1) + 0.25 * reference(-1)
    assert np.allclose(scores(model, images, "flip+shift"), expected, atol=1e-5)


@pytest.mark.parametrize("views", ["flip", "flip+shift"])
def test_views_change_evaluations_alone(
    config: Callable[..., TrainConfig], train_in_threads: Callable[..., tuple[Record, Any, Any]], views: str
) -> None:
    """Training with other views in the evaluation ends with the same weights to the bit."""
    _, _, plain = train_in_threads(config(ranks=2), folder="plain")
    record, _, viewed = train_in_threads(config(ranks=2, tta=views), folder="viewed")
    assert all(torch.equal(plain[name], viewed[name]) for name in plain)
    assert 0 < record.epochs[-1].val_accuracy < 1
