"""Several models, optimisers and other things with a state as one replica, for loops of users' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from rankwise.errors import ModelError
from rankwise.models.optimizer_state import OptimizerState
from rankwise.models.optimizer_states import Optimizers
from rankwise.models.replica import Replica


class HasState(Protocol):
    """What gives its state and takes it back: schedulers, scalers, averages."""

    def state_dict(self) -> dict[str, Any]:
        """All of it."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Take it back."""


class Several(nn.Module):
    """The models that a loop trains, by name, with all else that it keeps.

    Modules that are kept and not trained, such as averages of weights, lie in it as buffers: ranks take
    their mean where they differ. What is neither is extra state.
    """

    def __init__(self, models: Mapping[str, nn.Module], kept: Mapping[str, HasState]) -> None:
        super().__init__()
        for name, model in models.items():
            self.add_module(name, model)
        shadows = {name: its for name, its in kept.items() if isinstance(its, nn.Module)}
        for name, its in shadows.items():
            self.add_module(name, _Shadow(its))
        rest = {name: its for name, its in kept.items() if name not in shadows}
        if rest:
            self.add_module("kept", _Rest(rest))


class _Shadow(nn.Module):
    """The tensors of a module that is not trained, as buffers in the same memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, tensor in module.state_dict(keep_vars=True).items():
            if isinstance(tensor, Tensor):
                self.register_buffer(name.replace(".", "/"), tensor.detach())


class _Rest(nn.Module):
    """Things with a state that is no module's, as extra state."""

    def __init__(self, things: Mapping[str, HasState]) -> None:
        super().__init__()
        self._things = dict(things)

    def get_extra_state(self) -> dict[str, Any]:
        return {name: its.state_dict() for name, its in self._things.items()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, its in self._things.items():
            its.load_state_dict(state[name])


class _Settings:
    """What is set in the groups of an optimiser, such as rates, which schedulers change."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        groups = self._optimizer.param_groups
        return {"groups": [{name: its for name, its in g.items() if name != "params"} for g in groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for group, saved in zip(self._optimizer.param_groups, state_dict["groups"], strict=True):
            for name, value in saved.items():
                if isinstance(group.get(name), Tensor):
                    group[name].copy_(value)
                else:
                    group[name] = value


class LoopReplica(Replica):
    """The models and optimisers of a user's loop, which makes the steps itself.

    `closed` are optimisers that ask for a loss anew in each step.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        kept: Mapping[str, HasState],
        **options: Any,
    ) -> None:
        stepping, closed = _by_what_they_need(optimizers)
        self.closed = list(closed.values())
        settings = {f"settings of {name}": _Settings(its) for name, its in stepping.items()}
        together = cast(torch.optim.Optimizer, Optimizers(stepping))  # as which it is asked for its groups
        super().__init__(Several(models, {**kept, **settings, **closed}), together, **options)

    def step(self) -> None:
        """The loop has made it."""

    def gradients(self) -> list[Tensor | None]:
        """Copies of what the parameters have in `.grad`."""
        return [None if its.grad is None else its.grad.clone() for its in self.parameters]

    def set_gradients(self, gradients: Sequence[Tensor | None]) -> None:
        """Put copies of these into `.grad`."""
        for parameter, its in zip(self.parameters, gradients, strict=True):
            parameter.grad = None if its is None else its.clone()


def _by_what_they_need(
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> tuple[dict[str, torch.optim.Optimizer], dict[str, torch.optim.Optimizer]]:
    """Optimisers that step by gradients alone, and those that ask for more (a closure), whose state is kept
    as a whole."""
    stepping, closed = {}, {}
    for name, its in optimizers.items():
        try:
            OptimizerState(its)
        except ModelError:
            closed[name] = its
        else:
            stepping[name] = its
    return stepping, closed
