"""Gradients as one flat array, whose pieces go out while the backward pass still makes the next ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.comm import BackgroundExchange, World
from rankwise.errors import OutOfStepError
from rankwise.strategies.compression import Flat
from rankwise.strategies.gradient_watch import GradientWatch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Bucket:
    """A piece of the flat array, `span`, with the gradients of the parameters in `places`, of which `missing`
    have not come yet."""

    span: slice
    places: slice
    missing: int = 0


class Buckets:
    """The gradients of a round, each batch's times its share of the round, those of the last layers first.

    `flat` holds them in their layout, `shapes` are theirs in it. Behind them stand a number for each
    parameter, how many of the round's batches gave it a gradient, unless gradients are `compressed`, and a
    flag. With more than one bucket, of about `bucket_bytes` each, one goes out as soon as the backward pass
    has filled it, in the same order on all ranks; the last one goes in the step, with the numbers and the
    flag. An exchange in the background goes on only when it is polled, which each later gradient does.

    Ranks add up what the backward pass has made. Changing it before `add`, by clipping for example, would be
    another computation than one process makes, and raises OutOfStepError.
    """

    def __init__(
        self, parameters: Sequence[Tensor], bucket_bytes: float, world: World, *, compressed: bool = False
    ) -> None:
        import torch

        from rankwise.models.replica import Layout

        self._world = world
        self._parameters = [parameter for parameter in reversed(parameters) if parameter.requires_grad]
        wide = any(parameter.dtype == torch.float64 for parameter in self._parameters)
        layout = Layout(self._parameters)
        counted = 0 if compressed else len(self._parameters)
        self._tensor = torch.zeros(layout.size + counted + 1, dtype=torch.float64 if wide else torch.float32)
        self.flat: Flat = self._tensor.numpy()
        self._gradients = slice(0, layout.size)
        self._counts = self.flat[layout.size : -1]
        self.shapes = layout.shapes
        self._views = layout.views(self._tensor)
        self._given = False
        self._buckets = cut(layout.sizes, bucket_bytes // self.flat.itemsize)
        self._under_way: list[BackgroundExchange] = []
        self._next = 0
        self._share = 0.0
        self._holds_some = self._sends = False
        self.watch = GradientWatch(self._parameters)
        if len(self._buckets) > 1:
            for bucket in self._buckets:
                for parameter in self._parameters[bucket.places]:
                    parameter.register_post_accumulate_grad_hook(self._hook(bucket))  # type: ignore[no-untyped-call]

    def expect(self, share: float, *, sends: bool) -> None:
        """The next backward pass is of a batch with this share, the last of its round if it `sends`."""
        if self._given:  # or the backward pass would add to what is in the flat array
            for parameter in self._parameters:
                parameter.grad = None
            self._given = False
        self._share = share
        self.watch.begin()
        self._sends = sends and len(self._buckets) > 1
        for bucket in self._buckets:
            bucket.missing = sum(p.requires_grad for p in self._parameters[bucket.places])

    def add(self) -> None:
        """Take in the gradients of the batch that was expected. Raises OutOfStepError if they are not as the
        backward passes have made them."""
        self.watch.require_untouched()
        if self._sends:
            self._send(len(self._buckets))  # also of parameters that took no part in the backward pass
        else:
            with self._world.ledger.phase("pack"):
                self._take(slice(None), self._gradients)
        self._holds_some = True

    def close(self) -> Flat:
        """What this rank has of the round, which ends here; its flag says whether the rank is to stop."""
        if not self._holds_some:
            self.flat[:] = 0
        self._holds_some = False
        self.flat[-1] = self._world.stopping
        return self.flat

    def reduce(self) -> bool:
        """Add the round up over all ranks: what is still here, and what is under way. Returns whether any
        rank is to stop."""
        if len(self._buckets) == 1:
            self._world.allreduce(self.close())
            self.clear()
            return bool(self.flat[-1])
        if not self._next:  # nothing came out of a backward pass
            self.close()
        elif self._next < len(self._buckets):  # no step was made with what did
            self.flat[self._buckets[self._next].span.start :] = 0
        self._sends = False
        self._send(len(self._buckets))
        for exchange in self._under_way:
            exchange.wait()
        self.clear()
        return bool(self.flat[-1])

    def clear(self) -> None:
        """Forget the round."""
        self._under_way.clear()
        self._next = 0
        self._holds_some = self._sends = False

    def give(self) -> None:
        """Make what is in the flat array the parameters' gradients, until the next batch is expected. A
        parameter that had none on any rank has none, and the optimiser leaves it be."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            parameter.grad = view if parameter.dtype is self._tensor.dtype else view.to(parameter.dtype)
        if np.count_nonzero(self._counts) < self._counts.size:
            for place in np.flatnonzero(self._counts == 0):
                self._parameters[place].grad = None
        self._given = True

    def _hook(self, bucket: _Bucket) -> Callable[[Tensor], None]:
        def came(_: Tensor) -> None:
            if not self._sends:
                return
            bucket.missing -= 1
            if bucket.missing < 0:
                megabytes = math.ceil(self.flat.nbytes / 1e6)
                raise OutOfStepError(
                    "a second backward pass came before step(), when gradients of the first were on their "
                    f"way to other ranks: give bucket_mb={megabytes} or more, and they leave in step()"
                )
            full = self._next
            while full < len(self._buckets) - 1 and not self._buckets[full].missing:
                full += 1
            self._send(full)
            if self._under_way:
                self._under_way[-1].poll()

        return came

    def _send(self, until: int) -> None:
        """Send the buckets before `until` that are still here."""
        for bucket in self._buckets[self._next : until]:
            if self._sends:
                with self._world.ledger.phase("pack"):
                    self._take(bucket.places, slice(bucket.span.start, bucket.span.stop))
            span = bucket.span
            if bucket is self._buckets[-1]:
                self.flat[-1] = self._world.stopping
                span = slice(span.start, len(self.flat))
            self._under_way.append(self._world.start_allreduce(self.flat[span]))
        self._next = max(self._next, until)

    def _take(self, places: slice, span: slice) -> None:
        """Put some parameters' gradients, times the share, into their place, or add them to what is there."""
        import torch

        views, found = self._views[places], [p.grad for p in self._parameters[places]]
        gradients = [g for g in found if g is not None and not g.is_sparse]
        had: Any = 1
        if len(gradients) < len(found):
            had = [gradient is not None for gradient in found]
            gradients = [
                torch.zeros_like(v) if g is None else g.to_dense() for v, g in zip(views, found, strict=True)
            ]
        if self._counts.size:
            self._counts[places] = self._counts[places] + had if self._holds_some else had
        if self._holds_some:
            torch._foreach_add_(views, gradients, alpha=self._share)
        else:
            torch._foreach_copy_(views, gradients)
            self._tensor[span].mul_(self._share)


def cut(sizes: Sequence[int], most: float) -> list[_Bucket]:
    """Buckets of whole parameters with these `sizes`, of at most `most` numbers unless one parameter has
    more."""
    buckets = [_Bucket(slice(0, 0), slice(0, 0))]
    end = 0
    for place, size in enumerate(sizes):
        start, end = end, end + size
        last = buckets[-1]
        if last.span.stop > last.span.start and end - last.span.start > most:
            buckets.append(_Bucket(slice(start, end), slice(place, place + 1)))
        else:
            last.span, last.places = slice(last.span.start, end), slice(last.places.start, place + 1)
    return buckets
