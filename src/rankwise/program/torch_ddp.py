"""What DistributedDataParallel exchanges in its own C++, seen by a communication hook that does the same."""

from __future__ import annotations

import sys
from typing import Any
from weakref import WeakSet

from rankwise.ledger.call_log import Kind
from rankwise.program.places import Places
from rankwise.program.torch_calls import Row, TorchCalls
from rankwise.program.wrappers import Method, frame_of, named

NAME = "torch.nn.parallel.distributed"

CALL = "DistributedDataParallel"


class DdpCalls:
    """The exchanges of all DDP models of this process.

    A bucket's sum is begun in the hook, and the last hook of a backward pass waits for all of them, where DDP
    would wait a moment later. What a program hooks in itself, and gradients that are views of the buckets,
    stay as they are, and count as own work.
    """

    def __init__(self, calls: TorchCalls) -> None:
        self._calls = calls
        self._hooked: WeakSet[Any] = WeakSet()
        seen = calls.seen
        self._find = Places(seen.log, seen.numbers, CALL).find
        self._all_reduce: Any = None

    def patch(self) -> None:
        """Replace what of DDP exchanges by itself, if it is loaded."""
        module = sys.modules.get(NAME)
        owner = getattr(module, "DistributedDataParallel", None)
        if owner is None:
            return
        for place, name in (
            *((module, name) for name in ("_verify_param_shape_across_processes", "_sync_module_states")),
            (owner, "_sync_buffers"),
        ):
            if hasattr(place, name):  # in this torch
                self._calls._set(place, name, self._together(getattr(place, name)))
        self._calls._set(owner, "forward", self._before_forward(owner.forward))

    def _together(self, method: Method) -> Method:
        """What the ranks of a model do together: its first argument is the model, or their group."""

        def call(*args: Any, **kwargs: Any) -> Any:
            log, calls = self._calls.of_thread(), self._calls
            if calls._is_off(log):
                return method(*args, **kwargs)
            first = args[0] if args else None
            group = kwargs.get("process_group", getattr(first, "process_group", first))
            comm, _ = calls.comm_of(group)
            row = Row(log, self._find(frame_of(1)))
            kind = Kind.FAILED
            try:
                result = method(*args, **kwargs)
                kind = Kind.COLLECTIVE
                return result
            finally:
                row.put(int(kind), comm=comm)

        return named(call, method)

    def _before_forward(self, method: Method) -> Method:
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            if model not in self._hooked and not self._calls._is_off(self._calls.of_thread()):
                self._hooked.add(model)
                self._hook(model)
            return method(model, *args, **kwargs)

        return named(call, method)

    def _hook(self, model: Any) -> None:
        """Give a model the hook, unless it does something else than the plain sum of its gradients."""
        joins = getattr(getattr(model, "_join_config", None), "enable", False)
        if (
            model._comm_hooks
            or model.gradient_as_bucket_view
            or getattr(model, "mixed_precision", None) is not None
            or getattr(model, "_delay_all_reduce_all_params", False)
            or joins
            or not hasattr(model, "reducer")
        ):
            return
        import torch.distributed as dist

        size = dist.get_world_size(model.process_group)
        begun: list[tuple[Any, int]] = []
        calls = self._calls

        def hook(state: Any, bucket: Any) -> Any:
            log = calls.of_thread()
            tensor = bucket.buffer()
            tensor.mul_(1.0 / size)  # as DDP does before it sums
            if calls._is_off(log):
                work = dist.all_reduce(tensor, group=model_group, async_op=True)
                return work.get_future().then(_first)
            if bucket.index() == 0:
                begun.clear()  # of a backward pass that was broken off
            site = self._find(frame_of(1))
            comm, _ = calls.comm_of(model_group)
            row = Row(log, site)
            work = dist.all_reduce(tensor, group=model_group, async_op=True)
            begun.append((work, row.put(int(Kind.POST_COLLECTIVE), comm=comm, bytes=tensor.nbytes)))
            future = work.get_future().then(_first)
            if bucket.is_last():
                calls.wait_for(begun, site)
                begun.clear()
            return future

        model_group = model.process_group
        dist._register_comm_hook(model.reducer, None, hook)  # type: ignore[attr-defined]


def _first(future: Any) -> Any:
    return future.value()[0]
