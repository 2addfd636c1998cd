"""Where a model keeps its buffers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.models.expanded import own_elements


class HeldBuffers:
    """The buffers of a model, as they are when this is made: modules that put another tensor in the place of
    one (``self.mean = 0.9 * self.mean + ...``) are followed."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._saved = saved_forms(model)
        self._places = [
            (module._buffers, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def gather(self) -> None:
        """Write what has been put in the place of a buffer into it, and put it back. What has another shape
        or type by now, as tables that grow, stays where it is."""
        for place, name, buffer in self._places:
            now = place.get(name)
            if now is not None and now is not buffer and _fits(now, buffer):
                with torch.no_grad():
                    buffer.copy_(now)
                place[name] = buffer

    def changed(self) -> tuple[list[str], list[str]]:
        """Names of persistent buffers that the model has made since, and of those that have another shape or
        type. Others are taken for tables, which each rank makes for itself."""
        now = saved_forms(self._model)
        made = [name for name in now if name not in self._saved]
        return made, [name for name, form in self._saved.items() if now.get(name, form) != form]


def saved_forms(model: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and types of persistent buffers, by name."""
    found = dict(model.named_buffers())
    saved = [name for name in model.state_dict() if name in found]
    return {name: (found[name].shape, found[name].dtype) for name in saved}


def _fits(now: Tensor, buffer: Tensor) -> bool:
    return (
        now.shape == buffer.shape and now.dtype == buffer.dtype and own_elements(buffer).shape == buffer.shape
    )
