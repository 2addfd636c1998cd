"""The optimiser that the options describe."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rankwise.config import TrainConfig
from rankwise.models import muon

_FUSED_SGD: Any = getattr(torch, "_fused_sgd_", None)
_SETTINGS = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize")
"""Of a group, which torch's kernel takes by these names."""

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


class _Uncompiled:
    """An optimiser that torch.compile knows nothing of, which is for the model alone.

    torch wraps these methods so that the compiler breaks off where they are called, and to do that imports
    all of the compiler: a third of a rank's start-up.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class SGD(_Uncompiled, torch.optim.SGD):
    """torch's, to the bit.

    Where a step is nothing but one call of torch's kernel, it is that call: what torch does around it costs a
    small network several times as much as the kernel, and more in a training step, which has driven it out of
    the caches.
    """

    _whole_step = torch.optim.Optimizer.profile_hook_step(
        torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))
    )

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step, whose closure (if there is one) returns the loss, as this does then."""
        calls = None if closure is not None or self._is_watched() else self._calls()
        if calls is None:
            return self._whole_step(closure)
        with torch.no_grad():
            for tensors, group in calls:
                _FUSED_SGD(*tensors, is_first_step=False, **{name: group[name] for name in _SETTINGS})
        return None

    step.hooked = True  # type: ignore[attr-defined]  # or torch wraps it once more

    def _is_watched(self) -> bool:
        """Whether there is anything else that a step has to do or ask."""
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or getattr(self, "grad_scale", None) is not None
            or getattr(self, "found_inf", None) is not None
        )

    def _calls(self) -> list[tuple[tuple[list[Tensor], list[Tensor], list[Tensor]], dict[str, Any]]] | None:
        """For each group parameters, gradients and momenta that one call of the kernel takes; None if any
        group needs more than that, as in the first step, which makes the momenta."""
        calls = []
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            states = [self.state.get(parameter) for parameter in parameters]
            momenta = [state["momentum_buffer"] for state in states if state] if group["momentum"] else []
            dtype = parameters[0].dtype
            if (
                not (_FUSED_SGD and group["fused"] and isinstance(group["lr"], float))
                or len(momenta) != (len(parameters) if group["momentum"] else 0)
                or any(momentum is None for momentum in momenta)
                or any(its.dtype is not dtype or not its.is_cpu for its in parameters)
                or any(its.dtype is not dtype or its.layout is not torch.strided for its in gradients)
            ):
                return None
            calls.append(((parameters, gradients, momenta), group))
        return calls


class Adam(_Uncompiled, torch.optim.Adam):
    """torch's."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class AdamW(_Uncompiled, torch.optim.AdamW):
    """torch's."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(_Uncompiled, muon.Muon):
    """That of `rankwise.models.muon`."""


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser of `model`, where there is one in torch's fused form: one kernel for all parameters.

    The first group has the rate `--lr`. The biases of normalisation layers are in one of their own with
    `norm_bias_lr_scale`, with as much less weight decay, so that they decay as fast as the rest.
    """
    scale = config.norm_bias_lr_scale
    apart = _normalisation_biases(model) if scale != 1 else []
    hidden = hidden_matrices(model) if config.optimizer == "muon" else []
    aside = {id(parameter) for parameter in (*apart, *hidden)}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in aside]
    groups: list[dict[str, Any]] = [{"params": rest}]
    if apart:
        groups.append({"params": apart, "lr": config.lr * scale, "weight_decay": config.weight_decay / scale})
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    momentum: dict[str, Any] = {"momentum": config.momentum, "nesterov": config.nesterov}
    if config.optimizer == "sgd":
        return SGD(groups, **common, **momentum, fused=True)
    if config.optimizer == "muon":
        if hidden:
            own = {"lr": config.muon_lr, "fixed_norm": config.muon_fixed_norm}
            groups.append({"params": hidden, **own, "orthogonalise": True})
        return Muon(groups, **common, **momentum)
    adam = Adam if config.optimizer == "adam" else AdamW
    return adam(groups, **common, fused=True)


def hidden_matrices(model: nn.Module) -> list[Tensor]:
    """The trained weights of convolutions and linear layers but the last one, which maps to classes."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [layer.weight for layer in layers[:-1] if layer.weight.requires_grad]


def _normalisation_biases(model: nn.Module) -> list[Tensor]:
    found = (
        getattr(module, "bias", None) for module in model.modules() if isinstance(module, NORMALISATIONS)
    )
    return [bias for bias in found if bias is not None and bias.requires_grad]
