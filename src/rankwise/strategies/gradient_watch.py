"""Whether the gradients of a step are what the backward passes have made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rankwise.errors import OutOfStepError

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

FIRST, EVERY = 8, 256
"""Batches that are watched: the first ones, and then one of so many, as it costs a small network 3%."""

ROUNDING = 1e-4
"""Of the sum of a gradient's sizes, by which the sum of several passes may differ from the sum of theirs;
more in types with fewer digits, such as bfloat16."""

CHUNK = 4096
"""Numbers of a gradient that have weights of their own."""

GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it have fractions of all sizes."""


class GradientWatch:
    """Compares the gradients of `parameters` in a step with what autograd has handed to them.

    Ranks add up what the backward passes have made. If a rank changes it, by clipping, scaling or a hook, or
    puts another gradient in its place, the sum is another one than that of one process, which changes the
    gradient of the whole batch.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._parameters = list(parameters)
        self._batches = 0
        self._made: dict[int, tuple[float, float]] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def in_first(self) -> bool:
        """Whether the batch is one of the first."""
        return self._batches <= FIRST

    def begin(self) -> None:
        """A batch begins."""
        watched = self._batches < FIRST or self._batches % EVERY == 0
        self._batches += 1
        self._made.clear()
        if watched and not self._handles:
            self._handles = [self._watch(at) for at, its in enumerate(self._parameters) if its.requires_grad]
        elif not watched:
            self._leave()

    def require_untouched(self) -> None:
        """Raises OutOfStepError if gradients are not as the backward passes have made them; those that are
        not finite are dropped anyway."""
        if self._handles:
            for place in range(len(self._parameters)):
                self._compare(place)

    def _compare(self, place: int) -> None:
        import torch

        parameter = self._parameters[place]
        total, size = _sums(parameter.grad)
        made, made_size = self._made.get(place, (0.0, 0.0))
        off = max(ROUNDING, 4 * torch.finfo(parameter.dtype).eps) * max(size, made_size)
        if not abs(total - made) <= off and size < float("inf"):
            raise OutOfStepError(
                "gradients were changed between backward() and step(), where each rank has only its own: "
                "clipping is the option clip_norm, scaling belongs to the loss, what a hook does to them to "
                "one of the optimiser's step, and zero_grad() comes before backward()"
            )

    def _watch(self, place: int) -> RemovableHandle:
        parameter = self._parameters[place]
        handle = parameter.register_hook(self._note(place))  # type: ignore[no-untyped-call]
        # Before those of the user's, which may change the gradient; torch goes by the order of insertion.
        hooks: Any = parameter._backward_hooks
        others = [(key, hook) for key, hook in hooks.items() if key != handle.id]
        for key, _ in others:
            del hooks[key]
        hooks.update(others)
        found: RemovableHandle = handle
        return found

    def _note(self, place: int) -> Callable[[Tensor], None]:
        def note(gradient: Tensor) -> None:
            """Comes before the gradient is added to what the parameter has."""
            total, size = _sums(gradient)
            has = self._parameters[place].grad
            if has is None or not has.any():  # the first pass, or the first behind a zero_grad()
                self._made[place] = (total, size)
                return
            self._compare(place)
            before, size_before = self._made.get(place, (0.0, 0.0))
            self._made[place] = (before + total, size_before + size)

        return note

    def _leave(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _sums(gradient: Tensor | None) -> tuple[float, float]:
    """A sum of a gradient's numbers, each with a weight of its own, as the plain sum of a classifier's is
    zero; and the sum of their sizes."""
    import torch

    if gradient is None:
        return 0.0, 0.0
    dense = gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
    flat = dense.flatten()
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()
    weights = _weights(flat.dtype)
    whole = len(flat) // CHUNK * CHUNK
    # No matrix product: inside an autocast region it would round.
    total = (flat[whole:] * weights[: len(flat) - whole]).sum()
    if whole:
        total = total + (flat[:whole].view(-1, CHUNK) * weights).sum()
    return total.item(), torch.linalg.vector_norm(flat, 1).item()


@cache
def _weights(dtype: torch.dtype) -> Tensor:
    """Those of the numbers of a chunk, which all chunks have."""
    import torch

    return torch.arange(1, CHUNK + 1, dtype=torch.float64).mul_(GOLDEN).frac_().to(dtype)
