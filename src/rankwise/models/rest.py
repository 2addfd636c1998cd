"""What a model holds besides the tensors of its `state_dict()`: extra state of its modules, such as counters
and tables of words, and buffers that are not persistent."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError


class ExtraState:
    """The extra state of a model's modules, by their names. Raises ModelError for a module that cannot take
    back what it gives."""

    def __init__(self, model: nn.Module) -> None:
        self._holders = {
            name: module
            for name, module in model.named_modules()
            if type(module).get_extra_state is not nn.Module.get_extra_state
        }
        for name, module in self._holders.items():
            if type(module).set_extra_state is nn.Module.set_extra_state:
                raise ModelError(
                    f"module {name or 'model'} has get_extra_state, and no set_extra_state that takes it: "
                    "write both"
                )

    def __bool__(self) -> bool:
        return bool(self._holders)

    def copy(self) -> dict[str, Any]:
        """As it is now."""
        return {name: copied(module.get_extra_state()) for name, module in self._holders.items()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Make it what `copy` gave, of this model or another of the same kind."""
        for name, module in self._holders.items():
            module.set_extra_state(copied(state[name]))


PLAIN = (type(None), bool, int, float, complex, str, bytes)


def copied(value: Any) -> Any:
    """A deep copy, many times faster than `copy.deepcopy` for what most states are: dicts and lists of
    numbers."""
    if type(value) in PLAIN:
        return value
    if type(value) is dict:
        return {name: copied(its) for name, its in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return copy.deepcopy(value)


def rest_of(model: nn.Module) -> dict[str, Any]:
    """By name, what a file of the tensors of `state_dict()` lacks."""
    held = model.state_dict()
    rest = {name: value for name, value in held.items() if not isinstance(value, Tensor)}
    return rest | {name: buffer for name, buffer in model.named_buffers() if name not in held}


def packed(rest: Mapping[str, Any]) -> bytes:
    """`rest_of` a model as a file's content. Raises ModelError, by name, for what cannot be read without
    running code that is in the file."""
    for name, value in rest.items():
        try:
            unpacked(_saved(value))
        except Exception:  # of pickle, of torch, or of a class of the user's
            raise ModelError(
                f"the model's {name} is a {type(value).__name__}, which a checkpoint cannot hold: give "
                "tensors, numbers, text, and lists, tuples and dicts of them"
            ) from None
    return _saved(dict(rest))


def unpacked(content: bytes) -> Any:
    """What was packed."""
    return torch.load(io.BytesIO(content), weights_only=True)


def _saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()
