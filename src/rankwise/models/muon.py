"""Muon: momentum whose matrices are made orthogonal before each step (Jordan et al. 2024).

torch.optim.Muon takes matrices alone. Here convolutions take part, as matrices with a row for each of
their outputs, and the other parameters take SGD's steps, so that a replica has one optimiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration that brings singular values near 1 fast, not exactly
(https://kellerjordan.github.io/posts/muon/)."""

STEPS = 5


class Muon(torch.optim.Optimizer):
    """SGD with momentum; in groups with `orthogonalise` each step is made (nearly) orthogonal.

    With u the step of SGD with `momentum`, perhaps in `nesterov`'s form, as a matrix [rows, columns], the
    weights become w <- (1 - lr weight_decay) w - lr sqrt(max(1, rows / columns)) orthogonalised(u). In other
    groups `weight_decay` is SGD's.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        orthogonalise: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**options, "orthogonalise": orthogonalise})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """A step with the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        as_matrix = group["orthogonalise"] and parameter.dim() > 1
        if not as_matrix:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        momentum: Tensor = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        update = gradient.add(momentum, alpha=group["momentum"]) if group["nesterov"] else momentum
        if as_matrix:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            matrix = update.flatten(1)
            rows, columns = matrix.shape
            update = orthogonalised(matrix).view(update.shape) * max(1, rows / columns) ** 0.5
        parameter.add_(update, alpha=-group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix [rows, columns] with its singular values brought near 1, by a Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    x: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(STEPS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.T.contiguous() if matrix.shape[0] > matrix.shape[1] else x
