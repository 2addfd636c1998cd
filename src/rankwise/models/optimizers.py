"""The optimiser that the options describe."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.config import TrainConfig
from rankwise.models import muon

NORMALISATIONS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm2d)


class _Uncompiled:
    """An optimiser that torch.compile knows nothing of, which is for the model alone.

    torch wraps these methods so that the compiler breaks off where they are called, and to do that imports
    all of the compiler: a third of a rank's start-up.
    """

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


class SGD(_Uncompiled, torch.optim.SGD):
    """torch's."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


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
