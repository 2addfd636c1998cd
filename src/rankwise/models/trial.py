"""A network is tried before it is trained, on copies: what it makes and keeps in a trial (tables, masks,
running statistics) is not what it trains with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from rankwise.errors import ModelError, one_line
from rankwise.models.blank import blank_batch
from rankwise.models.precision import autocast

Shape = tuple[int, int, int]
Precision = Literal["fp32", "bf16"]


class Trial:
    """Tries the network `model` that `make` makes, and that is called `name`, on blank images float32
    [samples, channels, height, width] of `classes` classes.

    The model stays as it is, and so does torch's generator. Each attempt takes a copy; a model that cannot
    be copied, as those whose weights a hook computes, is made once more instead.
    """

    def __init__(
        self, name: str, make: Callable[[], nn.Module], classes: int, precision: Precision = "fp32"
    ) -> None:
        self.model = make()
        self._name = name
        self._make = make
        self._classes = classes
        self._precision = precision

    def evaluate(self, image_shape: Shape) -> None:
        """A forward pass as in the evaluation. If that is when the model makes parameters or buffers, as lazy
        layers do, it is made to do so. Raises ModelError if it cannot take such images, or gives no scores.
        """
        images, _ = blank_batch(image_shape, self._classes, 2)
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), autocast(self._precision):
                tried = self._copy().eval()
                scores = tried(images)
            if _form(tried) != _form(self.model):
                with torch.no_grad():
                    self.model.eval()(images)
        except Exception as error:
            raise ModelError(
                f"model {self._name} cannot take images of shape {image_shape}: {one_line(error)}"
            ) from error
        self._require_scores(scores, 2, "")
        for name, tensor in _tensors(self.model):
            if is_lazy(tensor):
                raise ModelError(f"model {self._name} does not use {name} in a forward pass: give it a shape")

    def train(self, image_shape: Shape) -> None:
        """Forward and backward pass of a training step with two images. Raises ModelError for what fails, for
        other outputs than scores, and for buffers that are made only then."""
        tried = self._copy()
        try:
            self._step(tried, image_shape, 2)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"model {self._name} cannot be trained on images of shape {image_shape}: {one_line(error)}"
            ) from error
        made = [name for name in _form(tried) if name not in _form(self.model)]
        if made:
            raise ModelError(
                f"model {self._name} makes {made[0]} in its first training step, when ranks have been put in "
                "step already: make it in __init__"
            )

    def trains_on_one(self, image_shape: Shape) -> bool:
        """Whether a training step with a single image can be made and gives a number."""
        try:
            return math.isfinite(self._step(self._copy(), image_shape, 1))
        except Exception:  # whatever it is: two images have just worked
            return False

    def _copy(self) -> nn.Module:
        try:
            return copy.deepcopy(self.model)
        except Exception:  # what a class does then is its own
            return self._make()

    def _step(self, tried: nn.Module, image_shape: Shape, samples: int) -> float:
        """The loss of a step of a copy."""
        images, labels = blank_batch(image_shape, self._classes, samples)
        with torch.random.fork_rng(devices=[]):
            with autocast(self._precision):
                scores = tried.train()(images)
                self._require_scores(scores, samples, " in training")
                loss = F.cross_entropy(scores, labels)
            torch.autograd.backward(loss)
        return loss.item()

    def _require_scores(self, scores: object, samples: int, when: str) -> None:
        given = tuple(getattr(scores, "shape", ())) or type(scores).__name__
        if given != (samples, self._classes):
            raise ModelError(
                f"model {self._name} answers {samples} images{when} with {given}, expected scores of shape "
                f"({samples}, {self._classes})"
            )


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [
        *((f"the parameter {name}", value) for name, value in model.named_parameters()),
        *((f"the buffer {name}", value) for name, value in model.named_buffers()),
    ]


def _form(model: nn.Module) -> dict[str, torch.Size | None]:
    """The shapes of parameters and buffers by name, None for those that have none yet."""
    return {name: None if is_lazy(tensor) else tensor.shape for name, tensor in _tensors(model)}
