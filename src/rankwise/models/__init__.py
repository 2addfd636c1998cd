"""Networks by name. Importing this package does not import torch; building a network does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rankwise.errors import ModelError, one_line, unknown_name
from rankwise.system.user_code import import_from

if TYPE_CHECKING:
    from torch import nn

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

MODELS = {
    "paper-cnn": ("rankwise.models.paper_cnn:PaperCNN", "the paper's network, 62,006 parameters on 3x32x32"),
    "mlp": ("rankwise.models.mlp:MLP", "two hidden layers of 256, the smallest that learns"),
    "resnet9": ("rankwise.models.resnet:ResNet9", "a short residual network, 6.6 million parameters"),
    "airbench": (
        "rankwise.models.airbench:Airbench",
        "whitened patches and three blocks, 2.0 million parameters",
    ),
    "airbench-wide": ("rankwise.models.airbench:AirbenchWide", "the same, wider"),
    "airbench-deep": ("rankwise.models.airbench:AirbenchDeep", "wider and deeper, with short cuts"),
    "resnet18": ("rankwise.models.resnet:ResNet18", "ResNet-18 in its CIFAR form, 11.2 million parameters"),
}
"""name -> (where its class is, what it is). A class is called with (image_shape, classes)."""


def check(spec: str) -> None:
    """Raise ModelError unless `spec` names a network, or has the form ``module:callable``."""
    module, colon, attribute = spec.partition(":")
    if spec not in MODELS and not (colon and module and attribute):
        raise ModelError(unknown_name("model", spec, [*MODELS, "module:callable"]))


def build(spec: str, image_shape: Shape, classes: int, *, takes: Sequence[Shape] = ()) -> nn.Module:
    """A network for images of `image_shape` (channels, height, width) and `classes` classes.

    It is tried once on a blank pair of images, and of each other shape that it shall take (`takes`), so that
    a network that does not fit is refused here, by name, and not in the middle of training. A user's
    ``module:callable`` is called with (image_shape, classes), or without arguments if it takes none. Raises
    ModelError.
    """
    import torch

    check(spec)
    maker = import_from(MODELS[spec][0] if spec in MODELS else spec, "model", ModelError)
    try:
        model = maker(image_shape, classes) if _takes_arguments(maker) else maker()
    except Exception as error:
        raise ModelError(
            f"model {spec} cannot be built for images {image_shape}: {one_line(error)}"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise ModelError(f"model {spec} gave a {type(model).__name__}, expected a torch.nn.Module")
    model.eval()
    for shape in (image_shape, *takes):
        _try(model, spec, shape, classes)
    return model.train()


def _try(model: nn.Module, spec: str, image_shape: Shape, classes: int) -> None:
    import torch

    try:
        with torch.inference_mode():
            scores = model(torch.zeros(2, *image_shape))
    except Exception as error:
        raise ModelError(
            f"model {spec} cannot take images of shape {image_shape}: {one_line(error)}"
        ) from error
    if tuple(getattr(scores, "shape", ())) != (2, classes):
        given = tuple(getattr(scores, "shape", ())) or type(scores).__name__
        raise ModelError(
            f"model {spec} answers two images with {given}, expected scores of shape (2, {classes})"
        )


def _takes_arguments(maker: Any) -> bool:
    import inspect

    try:
        inspect.signature(maker).bind((3, 32, 32), 10)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True
