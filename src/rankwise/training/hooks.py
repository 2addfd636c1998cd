"""Hooks on what a user's loop calls, so that the loop stays as it is: models, and optimisers' steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rankwise.errors import OutOfStepError
from rankwise.ledger.phases import Ledger


class LoopHooks:
    """Moves the ledger's cursor while models and optimisers work, and stands in front of each step.

    `before_step` is called first. The closure of an optimiser of which several steps go by one loss
    (`closed`) returns what `mean` makes of it. Raises OutOfStepError in the step of an optimiser that was
    not kept, though it changes what the models hold.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Mapping[str, torch.optim.Optimizer],
        closed: Sequence[torch.optim.Optimizer],
        ledger: Ledger,
        *,
        before_step: Callable[[], None],
        mean: Callable[[float], float],
    ) -> None:
        self._ledger = ledger
        self._before_step = before_step
        self._mean = mean
        self._known = set(map(id, optimizers.values()))
        self._closed = set(map(id, closed))
        self._forwards = 0
        for model in models:
            model.register_forward_pre_hook(self._forward_begins)
            model.register_forward_hook(self._forward_ends, always_call=True)
        for its in optimizers.values():
            its.register_step_pre_hook(self._step_begins)
            its.register_step_post_hook(self._step_ends)
        for model in models:
            for parameter in model.parameters():
                _HOOKS[id(parameter)] = self

    def _forward_begins(self, *_: object) -> None:
        if torch.compiler.is_compiling():
            return  # inside of a compiled module, which a clock would cut in two
        self._forwards += 1
        if self._forwards == 1:
            self._ledger.enter("forward")

    def _forward_ends(self, _module: nn.Module, _inputs: object, output: object) -> None:
        if torch.compiler.is_compiling():
            return
        self._forwards = max(self._forwards - 1, 0)  # it may have begun while another thread compiled
        if self._forwards == 0:
            self._ledger.enter("other")
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(self._backward_begins)  # type: ignore[no-untyped-call]

    def _backward_begins(self, _: Tensor) -> None:
        self._ledger.enter("backward")

    def _step_begins(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._before_step()
        self._ledger.enter("optimizer")
        if id(optimizer) not in self._closed:
            return None
        return tuple(map(self._with_mean, args)), {k: self._with_mean(its) for k, its in kwargs.items()}

    def _step_ends(self, *_: object) -> None:
        self._ledger.enter("other")

    def _with_mean(self, value: Any) -> Any:
        """A closure that returns the mean of what it returns on all ranks."""
        if isinstance(value, torch.optim.Optimizer) or not callable(value):
            return value

        def closure() -> Any:
            loss = value()
            mean = self._mean(loss.item() if isinstance(loss, Tensor) else float(loss))
            self._ledger.enter("optimizer")
            return torch.full_like(loss, mean) if isinstance(loss, Tensor) else mean

        return closure

    def require_known(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises OutOfStepError if an optimiser that is about to change a model was not kept."""
        if id(optimizer) not in self._known:
            raise OutOfStepError(
                f"an optimiser {type(optimizer).__name__} steps that run.keep did not get: give it to "
                "run.keep(optimizer=...) before the loop"
            )


_HOOKS: WeakValueDictionary[int, LoopHooks] = WeakValueDictionary()
"""Of each run that is there, under the ids of its parameters. It is asked and never gone through: entries go
whenever Python collects garbage, also in the middle of that."""


def _any_step_begins(optimizer: torch.optim.Optimizer, *_: object) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (hooks := _HOOKS.get(id(parameter))) is not None:
                hooks.require_known(optimizer)
                return


# Once, as torch goes through its hooks while other threads may begin a run.
register_optimizer_step_pre_hook(_any_step_begins)
