"""Optimisers: all of torch's that step by gradients, and others of which much is heard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import lion_pytorch
import prodigyopt
import schedulefree
from torch import Tensor, optim

Parameters = Iterable[Tensor] | list[dict[str, Any]]
"""What an optimiser takes: parameters, or groups of them."""

Make = Callable[[Parameters], optim.Optimizer]


def of(kind: Callable[..., optim.Optimizer], **options: Any) -> Make:
    """What makes an optimiser of some parameters."""
    return lambda parameters: kind(parameters, **options)


def _muon(parameters: Parameters) -> optim.Optimizer:
    """Of the matrices alone: others it does not take."""
    groups: list[Any] = list(parameters)
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    matrices = [{**group, "params": [p for p in group["params"] if p.dim() == 2]} for group in groups]
    return optim.Muon([group for group in matrices if group["params"]], lr=0.02)


OPTIMIZERS: dict[str, Make] = {
    "SGD": of(optim.SGD, lr=0.1),
    "SGD with momentum": of(optim.SGD, lr=0.1, momentum=0.9),
    "SGD with dampening": of(optim.SGD, lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.01),
    "SGD, Nesterov's": of(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "Adadelta": of(optim.Adadelta, lr=1.0),
    "Adafactor": of(optim.Adafactor, lr=0.05),
    "Adagrad": of(optim.Adagrad, lr=0.1, initial_accumulator_value=0.1),
    "Adam": of(optim.Adam, lr=0.01, amsgrad=True),
    "AdamW": of(optim.AdamW, lr=0.01, fused=True),
    "Adamax": of(optim.Adamax, lr=0.01),
    "ASGD": of(optim.ASGD, lr=0.05, t0=4),
    "NAdam": of(optim.NAdam, lr=0.01),
    "RAdam": of(optim.RAdam, lr=0.01),
    "RMSprop": of(optim.RMSprop, lr=0.01, centered=True, momentum=0.5),
    "Rprop": of(optim.Rprop, lr=0.01),
    "Muon": _muon,
    "Lion": of(lion_pytorch.Lion, lr=0.003),
    "Prodigy": of(prodigyopt.Prodigy, lr=1.0),
    "schedule-free AdamW": of(schedulefree.AdamWScheduleFree, lr=0.02, warmup_steps=3),
    "schedule-free SGD": of(schedulefree.SGDScheduleFree, lr=0.2),
}

REFUSED = {"LBFGS": (of(optim.LBFGS), "closure"), "SparseAdam": (of(optim.SparseAdam), "dense gradients")}
