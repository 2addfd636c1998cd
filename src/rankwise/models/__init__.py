"""Networks by name. Importing this package does not import torch; building a network does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import ModelError, one_line, unknown_name
from rankwise.system.user_code import import_from

if TYPE_CHECKING:
    from torch import nn

    from rankwise.models.trial import Trial

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


def build(spec: str, image_shape: Shape, classes: int) -> nn.Module:
    """A network for images of `image_shape` (channels, height, width) and `classes` classes.

    A user's ``module:callable`` is called with (image_shape, classes), or without arguments if it takes none.
    It is tried on a blank pair of images. Raises ModelError.
    """
    return trial_of(spec, image_shape, classes).model


def trial_of(
    spec: str,
    image_shape: Shape,
    classes: int,
    *,
    takes: Sequence[Shape] = (),
    memory_format: Literal["channels-last", "contiguous"] = "channels-last",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Trial:
    """The trial of a network as `build` gives it, evaluated once on a blank pair of images, and of each other
    shape that it shall take (`takes`), so that a network that does not fit is refused here, by name, and
    not in the middle of training. With the `memory_format` contiguous it gets such images. Raises ModelError.
    """
    from rankwise.models.trial import Trial

    def make() -> nn.Module:
        model = _made(spec, image_shape, classes)
        if memory_format == "contiguous":
            model.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
        return model

    trial = Trial(spec, make, classes, precision)
    for shape in (image_shape, *takes):
        trial.evaluate(shape)
    trial.model.train()
    return trial


def _made(spec: str, image_shape: Shape, classes: int) -> nn.Module:
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
    return model


def _takes_arguments(maker: Any) -> bool:
    import inspect

    try:
        inspect.signature(maker).bind((3, 32, 32), 10)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        pass
    return True
