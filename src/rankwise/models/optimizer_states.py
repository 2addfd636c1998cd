"""Several optimisers as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.models.optimizer_state import OptimizerState


class Optimizers:
    """Several optimisers as one, where ranks compare and exchange them: groups and states, and no steps."""

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        self.named = dict(optimizers)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, one optimiser's behind the other's."""
        return [group for its in self.named.values() for group in its.param_groups]

    @property
    def state(self) -> dict[Tensor, Any]:
        """What they keep for each parameter."""
        return {
            parameter: its for optimizer in self.named.values() for parameter, its in optimizer.state.items()
        }


class OptimizerStates:
    """The states of several optimisers, which make their steps themselves; names have the optimiser's name in
    front."""

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        self._states = {name: OptimizerState(its) for name, its in optimizers.named.items()}
        for name, its in self._states.items():
            optimizers.named[name].register_step_post_hook(lambda *_, its=its: its.stepped())

    @property
    def begun(self) -> list[Tensor]:
        """Which parameters have begun, of each optimiser."""
        return [begun for its in self._states.values() for begun in its.begun]

    def step(self) -> None:
        """A step of each."""
        for its in self._states.values():
            its.step()

    def reset(self) -> None:
        """Forget everything but rates and modes."""
        for its in self._states.values():
            its.reset()

    def settings(self) -> dict[tuple[int, str], Any]:
        """What is set in the groups, by group and name."""
        found: dict[tuple[int, str], Any] = {}
        groups = 0
        for name, its in self._states.items():
            found |= {(groups + group, key): value for (group, key), value in its.settings().items()}
            groups += len(self._optimizers.named[name].param_groups)
        return found

    def gather(self) -> None:
        """Take back into the places what has been put beside them."""
        for its in self._states.values():
            its.gather()

    def named(self) -> dict[str, Tensor]:
        """All tensors, under names that do not change between runs."""
        return {
            f"{name}/{key}": value for name, its in self._states.items() for key, value in its.named().items()
        }

    def shaped(self) -> list[Tensor]:
        """The tensors that are shaped like their parameter, in a fixed order."""
        return [tensor for its in self._states.values() for tensor in its.shaped()]

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Overwrite everything. Raises ValueError if names or shapes differ."""
        for name, its in self._states.items():
            front = f"{name}/"
            its.load(
                {key.removeprefix(front): value for key, value in saved.items() if key.startswith(front)}
            )

    def note(self) -> None:
        """Write the numbers that are no tensors into their places."""
        for its in self._states.values():
            its.note()

    def show(self) -> None:
        """Let the optimisers see what is in the places."""
        for its in self._states.values():
            its.show()


def state_of(optimizer: torch.optim.Optimizer) -> OptimizerState | OptimizerStates:
    """What one optimiser keeps, or several. Raises ModelError as `OptimizerState` does."""
    if isinstance(optimizer, Optimizers):
        return OptimizerStates(optimizer)
    return OptimizerState(optimizer)
