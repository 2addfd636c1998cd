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
    weights become w <- (1 - lr weight_decay) w - lr sqrt(max(1, rows / columns)) orthogonalised(u). With
    `fixed_norm` w is first scaled to the Frobenius norm of such an orthogonal matrix, sqrt(rows), so that
    `lr` is a part of the weights (github.com/KellerJordan/cifar10-airbench). In other groups `weight_decay`
    is SGD's.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        orthogonalise: bool = False,
        fixed_norm: bool = False,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(params, {**options, "orthogonalise": orthogonalise, "fixed_norm": fixed_norm})

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
            matrix = update.flatten(1)
            rows, columns = matrix.shape
            if group["fixed_norm"]:
                parameter.mul_(rows**0.5 / (parameter.norm() + 1e-7))
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            update = orthogonalised(matrix).view(update.shape) * max(1, rows / columns) ** 0.5
        parameter.add_(update, alpha=-group["lr"])


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix [rows, columns] with its singular values brought near 1, by a Newton-Schulz iteration."""
    x: Tensor = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    # What costs fewer operations: 4 r^2 c + 2 r^3 of them a step, or 4 r^2 c once and 8 r^3 a step.
    x = _by_its_gram_matrix(x) if x.shape[1] > 2 * x.shape[0] else _step_by_step(x)
    return x.T.contiguous() if matrix.shape[0] > matrix.shape[1] else x


def _step_by_step(x: Tensor) -> Tensor:
    """The iteration as it is written: x <- (a + b g + c g^2) x, where g = x x^T."""
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def _by_its_gram_matrix(x: Tensor) -> Tensor:
    """The same for a wide x: all factors are polynomials in the first g, so they commute, and g of the next
    step is p g p."""
    a, b, c = COEFFICIENTS
    gram = x @ x.T
    product = identity = torch.eye(len(x), dtype=x.dtype)
    for step in range(STEPS):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c).add_(identity, alpha=a)
        product = polynomial @ product if step else polynomial
        if step < STEPS - 1:
            gram = polynomial @ gram @ polynomial
    return product @ x
