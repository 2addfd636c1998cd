"""A network is tried before it is trained, on copies: what it makes and keeps in a trial (tables, masks,
running statistics) is not what it trains with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from rankwise.errors import ModelError, one_line
from rankwise.models.blank import blank_batch
from rankwise.models.buffers import saved_forms
from rankwise.models.precision import autocast

T = TypeVar("T")
Shape = tuple[int, int, int]
Precision = Literal["fp32", "bf16"]


class Trial:
    """Tries the network `model` that `make` makes, and that is called `name`, on blank images float32
    [samples, channels, height, width] of `classes` classes.

    The model stays as it is, and so does torch's generator. Each attempt takes a copy; a model that cannot
    be copied, as those whose weights a hook computes or that keep a function of their own, is made once more
    instead.
    """

    def __init__(
        self, name: str, make: Callable[[], nn.Module], classes: int, precision: Precision = "fp32"
    ) -> None:
        self.model = make()
        self._name = name
        self._make = make
        self._classes = classes
        self._precision = precision
        self.copies = True
        """Whether a copy of the model is one, as far as it was tried."""

    def evaluate(self, image_shape: Shape) -> None:
        """A forward pass as in the evaluation. If that is when the model makes parameters or buffers, as lazy
        layers do, it is made to do so. Raises ModelError if it cannot take such images, or gives no scores.
        """
        images, _ = blank_batch(image_shape, self._classes, 2)

        def attempt(tried: nn.Module) -> tuple[nn.Module, object]:
            tried.eval()
            with torch.no_grad(), autocast(self._precision):
                return tried, tried(images)

        try:
            tried, scores = self._on_copy(attempt)
            if _form(tried) != _form(self.model):
                self.model.eval()
                with torch.no_grad():
                    self.model(images)
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
        try:
            tried, _ = self._on_copy(lambda tried: (tried, self._step(tried, image_shape, 2)))
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
        before, after = saved_forms(self.model), saved_forms(tried)
        for name, form in before.items():
            if after.get(name, form) != form:
                raise ModelError(
                    f"model {self._name} turns the buffer {name} from {_words(form)} into "
                    f"{_words(after[name])} in a training step: give it its shape and type in __init__, or "
                    "persistent=False"
                )

    def trains_on_one(self, image_shape: Shape) -> bool:
        """Whether a training step with a single image can be made and gives a number."""
        try:
            return math.isfinite(self._on_copy(lambda tried: self._step(tried, image_shape, 1)))
        except Exception:  # whatever it is: two images have just worked
            return False

    def _on_copy(self, attempt: Callable[[nn.Module], T]) -> T:
        """Try a copy; or where it fails, or calls modules of the model itself, as functions that a module
        keeps do, one that is made anew. Torch's generator stays as it is."""
        own = set(map(id, self.model.modules()))

        def look(module: nn.Module, _: object) -> None:
            if id(module) in own:
                raise ModelError("a copy calls the model itself")

        with torch.random.fork_rng(devices=[]):
            if self.copies:
                hook = register_module_forward_pre_hook(look)
                try:
                    return attempt(copy.deepcopy(self.model))
                except Exception:  # what a class does when it is copied is its own
                    pass
                finally:
                    hook.remove()
            result = attempt(self._make())
            self.copies = False
            return result

    def _step(self, tried: nn.Module, image_shape: Shape, samples: int) -> float:
        """The loss of a step of a copy."""
        images, labels = blank_batch(image_shape, self._classes, samples)
        tried.train()
        with autocast(self._precision):
            scores = tried(images)
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


def _words(form: tuple[torch.Size, torch.dtype]) -> str:
    return f"{list(form[0])} of {str(form[1]).removeprefix('torch.')}"


def _form(model: nn.Module) -> dict[str, torch.Size | None]:
    """The shapes of parameters and buffers by name, None for those that have none yet."""
    return {name: None if is_lazy(tensor) else tensor.shape for name, tensor in _tensors(model)}
