"""A moving average of a model's weights, which is evaluated in place of the model."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import nn

from rankwise.errors import ModelError, one_line
from rankwise.models.buffers import HeldBuffers
from rankwise.models.expanded import own_elements
from rankwise.models.rest import ExtraState

EVERY = 5
"""Steps after which lookahead looks."""


class Average:
    """The average of a model, in a `model` of its own: its weights, and its floating-point buffers; extra
    state is the model's. Raises ModelError for a model that cannot be copied.

    `ema`: with w the weights after step t, and a the average, a <- d a + (1 - d) w, with d = min(decay,
    (1 + t) / (10 + t)), so that what a network was at random is soon forgotten.

    `lookahead` (Zhang et al. 2019, arXiv:1907.08610, as Jordan 2024, arXiv:2404.00498, has it): every five
    steps a <- d a + (1 - d) w and then w <- a, with d = decay**5 p**3, where p is the part of the run that
    is over. All ranks must then have the same weights.

    A step is a commit: where ranks agree on weights every few steps, it is such a synchronisation.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Literal["ema", "lookahead"],
        *,
        decay: float,
        epochs: int = 1,
    ) -> None:
        self._kind = kind
        self._decay = decay
        self._epochs = epochs
        try:
            self.model = copy.deepcopy(model).requires_grad_(False)
            self.model.eval()
        except Exception as error:  # what a class does then is its own
            raise ModelError(
                f"the model cannot be copied, as --averaged-weights {kind} needs: {one_line(error)}"
            ) from error
        self.weights = [parameter.detach() for parameter in self.model.parameters()]
        self.buffers, theirs = (
            [own_elements(buffer) for buffer in its.buffers() if buffer.is_floating_point()]
            for its in (self.model, model)
        )
        self._mine = [*self.weights, *self.buffers]
        self._theirs = [*(parameter.detach() for parameter in model.parameters()), *theirs]
        self._held = HeldBuffers(model)
        self._extra, self._their_extra = ExtraState(self.model), ExtraState(model)
        # Masks of -inf and the like have no mean: they are in the average as they are in the model.
        self._endless = [
            pair for pair in zip(self.buffers, theirs, strict=True) if not pair[1].isfinite().all()
        ]

    def begin(self) -> None:
        """Be what the model is."""
        torch._foreach_copy_(self._mine, self._theirs)
        self._extra.load(self._their_extra.copy())

    def follow(self, steps: int, epochs: float) -> None:
        """The model has made `steps` steps, after which `epochs` epochs are over."""
        self._held.gather()
        if self._kind == "ema":
            self._approach(1 - min(self._decay, (1 + steps) / (10 + steps)))
        elif steps % EVERY == 0:
            part = self._decay**EVERY * (epochs / self._epochs) ** 3
            self._approach(1 - part)
            torch._foreach_copy_(self._theirs, self._mine)

    def _approach(self, part: float) -> None:
        """Come this part of the way nearer to the model."""
        torch._foreach_lerp_(self._mine, self._theirs, part)
        for mine, theirs in self._endless:
            mine.copy_(theirs)
        self._extra.load(self._their_extra.copy())
