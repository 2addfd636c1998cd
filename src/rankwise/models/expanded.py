"""Buffers that are expanded: they show few elements in many places, and cannot be written to as they are."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def own_elements(tensor: Tensor) -> Tensor:
    """The elements of a tensor that have memory of their own: all, unless it is expanded."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(axis, 0, 1)
    return tensor


def load(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """`model.load_state_dict(saved)`, for a model with expanded buffers too. Raises RuntimeError if names or
    shapes differ."""
    expanded = {
        name: own
        for name, tensor in model.state_dict().items()
        if (own := own_elements(tensor)).shape != tensor.shape
    }
    if any(saved[name].shape != model.get_buffer(name).shape for name in expanded if name in saved):
        raise RuntimeError("a buffer has another shape")
    found = model.load_state_dict({n: v for n, v in saved.items() if n not in expanded}, strict=False)
    missing = [name for name in found.missing_keys if name not in expanded or name not in saved]
    if missing or found.unexpected_keys:
        raise RuntimeError(f"it lacks {missing} and holds {found.unexpected_keys} besides")
    for name, own in expanded.items():
        own.copy_(saved[name][tuple(map(slice, own.shape))])
