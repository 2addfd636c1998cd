"""Buffers that are expanded: they show few elements in many places, and cannot be written to as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def own_elements(tensor: Tensor) -> Tensor:
    """The elements of a tensor that have memory of their own: all, unless it is expanded."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def load(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """`model.load_state_dict(saved)`, for a model with expanded buffers too, and with those that are not
    persistent, if they are there and of one shape, as tables that follow a batch's size are not. Raises
    RuntimeError if names or shapes of others differ."""
    held = model.state_dict()
    expanded = {
        name: own
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and (own := own_elements(tensor)).shape != tensor.shape
    }
    if any(saved[name].shape != model.get_buffer(name).shape for name in expanded if name in saved):
        raise RuntimeError("a buffer has another shape")
    besides = {name: buffer for name, buffer in model.named_buffers() if name not in held}
    plain = {name: value for name, value in saved.items() if name not in expanded | besides}
    found = model.load_state_dict(plain, strict=False)
    missing = [name for name in found.missing_keys if name not in expanded or name not in saved]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"it lacks {missing} and holds {found.unexpected_keys} besides")
    fitting = {name: b for name, b in besides.items() if name in saved and saved[name].shape == b.shape}
    for name, own in (expanded | {name: own_elements(b) for name, b in fitting.items()}).items():
        own.copy_(saved[name][tuple(map(slice, own.shape))])
