"""A training step on made images: what it costs depends on their shape alone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.models.precision import autocast


def blank_batch(image_shape: tuple[int, int, int], classes: int, samples: int) -> tuple[Tensor, Tensor]:
    """Images float32 [samples, channels, height, width] in channels-last memory, as a feed gives them, and
    labels int64 [samples]."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(samples, *image_shape, generator=generator).mul_(2).sub_(1)
    return images.contiguous(memory_format=torch.channels_last), torch.arange(samples) % classes


def make_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    precision: Literal["fp32", "bf16"],
) -> None:
    """Forward and backward pass of a step, as the training loop does it."""
    images, labels = batch
    with autocast(precision):
        loss = F.cross_entropy(model(images), labels)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    loss.item()


def median_step_s(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    precision: Literal["fp32", "bf16"],
) -> float:
    """The median time of forward and backward pass, in seconds."""
    return statistics.median(seconds_of(lambda: make_gradients(model, optimizer, batch, precision)))


def seconds_of(action: Callable[[], object], *, at_least_s: float = 0.3, repeats: int = 5) -> list[float]:
    """How long an action takes, again and again, for so long and so often at least; the first time is left
    out."""
    action()
    found: list[float] = []
    while len(found) < repeats or sum(found) < at_least_s:
        start_s = time.perf_counter()
        action()
        found.append(time.perf_counter() - start_s)
    return found
