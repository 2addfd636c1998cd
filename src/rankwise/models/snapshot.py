"""A copy of all that a step changes in a replica."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.models.buffers import HeldBuffers
from rankwise.models.optimizer_state import OptimizerState
from rankwise.models.optimizer_states import OptimizerStates
from rankwise.models.rest import ExtraState

Content = tuple[list[Tensor], dict[str, Any]]
"""What a snapshot keeps: tensors, and the extra state of modules."""


class Snapshot:
    """What a replica was; `restore` makes it so again."""

    def __init__(
        self,
        tensors: list[Tensor],
        state: OptimizerState | OptimizerStates,
        buffers: HeldBuffers,
        extra: ExtraState,
    ) -> None:
        self._tensors = tensors
        self._state = state
        self._buffers = buffers
        self._extra = extra
        self._copies = [torch.empty_like(tensor) for tensor in tensors]
        self._extra_copy: dict[str, Any] = {}

    def take(self) -> None:
        """Copy the replica as it is now."""
        self._state.note()
        self._buffers.gather()
        torch._foreach_copy_(self._copies, self._tensors)
        self._extra_copy = self._extra.copy()

    def restore(self) -> None:
        """Overwrite the replica."""
        self.restore_tensors()
        self._extra.load(self._extra_copy)

    def restore_tensors(self) -> None:
        """Overwrite weights, buffers and optimiser state, and leave what else goes on, such as schedulers."""
        self._buffers.gather()
        torch._foreach_copy_(self._tensors, self._copies)
        self._state.show()

    def content(self) -> Content:
        """What is kept, to be sent to a replica of the same model."""
        return self._copies, self._extra_copy

    def fill(self, content: Content) -> None:
        """Keep what another replica was."""
        tensors, self._extra_copy = content
        torch._foreach_copy_(self._copies, tensors)
