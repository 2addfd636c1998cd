"""One rank's model and optimiser, seen as flat buffers that can be sent."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankwise.errors import ModelError


class Replica:
    """A model with its optimiser, and two flat buffers of what ranks keep in step.

    The float buffer holds all parameters, then all floating-point buffers (BatchNorm's running mean
    and variance), then, with `share_optimizer_state`, the optimiser's tensors that are shaped like
    their parameter (momentum and the like). It is float32, or float64 if the model has any float64.
    The integer buffer (int64) holds integer and boolean buffers (BatchNorm's batch count), which are
    never turned into floats: ranks agree on the largest. Raises ModelError for complex numbers.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, share_optimizer_state: bool = False
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        _create_state(optimizer)
        tensors = [*model.parameters(), *model.buffers()]
        if any(tensor.is_complex() for tensor in tensors):
            raise ModelError("the model holds complex numbers, expected floats and integers")
        floats = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
        if share_optimizer_state:
            floats += self.optimizer_tensors()
        integers = [tensor.detach() for tensor in tensors if not tensor.is_floating_point()]
        wide = any(tensor.dtype == torch.float64 for tensor in floats)
        self._floats = _Flat(floats, torch.float64 if wide else torch.float32)
        self._integers = _Flat(integers, torch.int64)

    def pack(self, tail: int = 0) -> NDArray[np.floating]:
        """A copy of everything floating-point as one flat array, with `tail` free places at its end."""
        return self._floats.pack(tail)

    def unpack(self, flat: NDArray[np.floating]) -> None:
        """Overwrite everything floating-point from a flat array; a longer one's tail is left alone."""
        self._floats.unpack(flat)

    def pack_integers(self) -> NDArray[np.int64]:
        """A copy of the integer buffers as one flat int64 array, empty for most models."""
        return self._integers.pack(0)

    def unpack_integers(self, flat: NDArray[np.int64]) -> None:
        """Overwrite the integer buffers from a flat array."""
        self._integers.unpack(flat)

    def optimizer_tensors(self) -> list[Tensor]:
        """The optimiser's tensors that are shaped like their parameter, in a fixed order."""
        return [
            value
            for parameter in _parameters(self.optimizer)
            for _, value in sorted(self.optimizer.state[parameter].items())
            if isinstance(value, Tensor) and value.shape == parameter.shape
        ]

    def optimizer_state(self) -> dict[str, Tensor]:
        """All of the optimiser's tensors under names that do not change between runs."""
        return {
            f"{number}.{name}": value
            for number, parameter in enumerate(_parameters(self.optimizer))
            for name, value in self.optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        """Overwrite the optimiser's tensors. Raises ValueError if the names or shapes differ."""
        mine = self.optimizer_state()
        if {name: value.shape for name, value in mine.items()} != {n: v.shape for n, v in saved.items()}:
            raise ValueError("the optimiser's state has another layout")
        for name, value in mine.items():
            value.copy_(saved[name])

    def reset_optimizer(self) -> None:
        """Forget the optimiser's state, as if it had just been made."""
        for state in self.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()


class _Flat:
    """Several tensors as one flat array; the staging memory is allocated once."""

    def __init__(self, tensors: list[Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self._size = sum(tensor.numel() for tensor in tensors)
        self._dtype = dtype
        self._staging = torch.empty(0, dtype=dtype)

    def pack(self, tail: int) -> NDArray[Any]:
        if len(self._staging) != self._size + tail:
            self._staging = torch.zeros(self._size + tail, dtype=self._dtype)
        with torch.no_grad():
            for view, tensor in zip(self._views(self._staging), self._tensors, strict=True):
                view.copy_(tensor)
        return self._staging.numpy()

    def unpack(self, flat: NDArray[Any]) -> None:
        with torch.no_grad():
            for view, tensor in zip(self._views(torch.from_numpy(flat)), self._tensors, strict=True):
                tensor.copy_(view)

    def _views(self, flat: Tensor) -> Iterable[Tensor]:
        parts = torch.split(flat[: self._size], [tensor.numel() for tensor in self._tensors])
        return (part.view(tensor.shape) for part, tensor in zip(parts, self._tensors, strict=True))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter its optimiser state now, as zeros, where the optimiser would wait for a step.

    So all ranks hold state of the same layout at all times, also one that has not trained yet. Zeros
    are what torch's optimisers begin with (SGD's first step with a zero momentum buffer is the same
    as with none). Which tensors there are is asked of an optimiser of the same kind on one number.
    """
    for group in optimizer.param_groups:
        missing = [p for p in group["params"] if p.requires_grad and not optimizer.state.get(p)]
        if not missing:
            continue
        number = torch.zeros(1, requires_grad=True)
        number.grad = torch.zeros(1)
        taken = inspect.signature(type(optimizer)).parameters
        options = {key: value for key, value in group.items() if key in taken and key != "params"}
        twin = type(optimizer)([number], **options)
        twin.step()
        for parameter in missing:
            for name, value in twin.state[number].items():
                if not isinstance(value, Tensor):
                    continue
                optimizer.state[parameter][name] = (
                    torch.zeros_like(parameter) if value.shape == number.shape else torch.zeros_like(value)
                )
