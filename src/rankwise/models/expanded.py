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
    persistent, if they are there. Raises RuntimeError if names or shapes differ."""
    held = model.state_dict()
    expanded = {
        name: own
        for name, tensor in held.items()
        if isinstance(tensor, Tensor) and (own := own_elements(tensor)).shape != tensor.shape
    }
    besides = {name: own_elements(b) for name, b in model.named_buffers() if name not in held}
    apart = {name: own for name, own in (expanded | besides).items() if name in saved}
    if any(saved[name].shape != model.get_buffer(name).shape for name in apart):
        raise RuntimeError("a buffer has another shape")
    plain = {name: value for name, value in saved.items() if name not in apart}
    found = model.load_state_dict(plain, strict=False)
    missing = [name for name in found.missing_keys if name not in apart]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"it lacks {missing} and holds {found.unexpected_keys} besides")
    for name, own in apart.items():
        own.copy_(saved[name][tuple(map(slice, own.shape))])
