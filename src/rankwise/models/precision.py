"""The arithmetic of forward and backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from rankwise.errors import OutOfStepError


def autocast(precision: Literal["fp32", "bf16"]) -> AbstractContextManager[object]:
    """Inside, a forward pass computes in this precision, and the backward pass of it as well.

    With bf16 matrix products and convolutions take bfloat16 copies of the weights, which stay float32, and
    what needs more digits, a loss for one, is done in float32: torch's own lists say what is what. Its
    gradients are float32. It can be entered again and again, not inside itself.
    """
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def forget_cast_weights() -> None:
    """Before a step: until an autocast region ends torch computes with the copies of the weights that it has
    made for the first step, whatever becomes of the weights themselves. Raises OutOfStepError inside one."""
    if torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled():
        raise OutOfStepError(
            "step() was called inside torch.autocast, where torch goes on computing with the weights of the "
            "first step: end the region after the loss, before backward() and step()"
        )
    torch.clear_autocast_cache()  # of a region around one that is disabled here
