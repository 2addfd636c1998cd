"""One rank's model and optimiser, seen as flat buffers that can be sent."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rankwise.errors import ModelError, OutOfStepError
from rankwise.models.average import Average
from rankwise.models.buffers import HeldBuffers
from rankwise.models.expanded import own_elements
from rankwise.models.freezing import is_under
from rankwise.models.optimizer_states import state_of
from rankwise.models.rest import ExtraState
from rankwise.models.snapshot import Snapshot

P = TypeVar("P")


class Replica:
    """A model with its optimiser, and flat buffers of what ranks keep in step.

    The weights are all parameters, then, with `share_optimizer_state`, the optimiser's tensors that are
    shaped like their parameter (momentum and the like) and which parameters have begun; they are float32, or
    float64 if any is.
    The floating-point buffers (BatchNorm's running mean and variance) and the integer and boolean ones
    (int64, BatchNorm's batch count; never turned into floats) are kept apart: training does not read
    them. Each floating-point buffer has a mark by which ranks find out whether it is the same on all of them.
    Raises ModelError for complex numbers, and for buffers that are sparse or quantised.

    Parameters that are not trained are kept apart too: ranks that start alike stay alike in them. What the
    optimiser trains besides, such as learned weights of losses, belongs to the weights. With an `average`,
    its buffers are shared like the model's own; its weights follow by themselves.

    All that is settled when the replica is made: `require_unchanged` finds out what has changed since.

    `unshared` are the places of the buffers among the tensors of a snapshot: in them ranks differ within an
    epoch. `clip_norm` limits the norm of all gradients together that a `step` goes by, None for no limit.
    `needs_pairs` says that the model cannot train on a batch of one sample, as BatchNorm cannot. What the
    loop calls is `module`, the model itself unless it is compiled, or a strategy wraps it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        share_optimizer_state: bool = False,
        clip_norm: float | None = None,
        average: Average | None = None,
        needs_pairs: bool = False,
    ) -> None:
        self.model = model
        self.module = model
        self.optimizer = optimizer
        self.clip_norm = clip_norm
        self.average = average
        self.needs_pairs = needs_pairs
        self._held = _held(model, optimizer)
        self._memory = {name: _memory(value) for name, value in self._held.items()}
        self._trained = {name: value for name, value in self._held.items() if value.requires_grad}
        self.parameters = list(self._trained.values())
        self._stepped = [p for group in optimizer.param_groups for p in group["params"]]
        self._attached: dict[type, Any] = {}
        self._has_sparse = self._kinds_known = False
        self._state = state_of(optimizer)
        self.extra = ExtraState(model)
        self.buffers = HeldBuffers(model)
        _require_dense_numbers(model)
        self._shares_state = share_optimizer_state
        weights = [parameter.detach() for parameter in self.parameters]
        if share_optimizer_state:
            momenta = self.optimizer_tensors()
            weights += [*momenta, *self._state.begun] if momenta else []
        frozen = [parameter.detach() for parameter in model.parameters() if not parameter.requires_grad]
        buffers = [own_elements(buffer.detach()) for buffer in model.buffers()]
        averaged = [*average.weights, *average.buffers] if average else []
        self._floats = [buffer for buffer in buffers if buffer.is_floating_point()]
        if average:
            self._floats += average.buffers
        self._weights = _Flat(weights, _wide(weights))
        self._frozen = _Flat(frozen, _wide(frozen))
        self._buffers = _Flat(self._floats, _wide(self._floats))
        self._integers = _Flat([b for b in buffers if not b.is_floating_point()], torch.int64)
        self._all = [*weights, *frozen, *buffers, *averaged]
        before, behind = len(weights) + len(frozen), len(average.weights) if average else 0
        places = [*range(before, len(self._all))]
        self.unshared = places[: len(buffers)] + places[len(buffers) + behind :]

    @property
    def of_optimizer(self) -> range:
        """The places of the optimiser's state among the tensors of a snapshot."""
        return range(len(self._all), len(self._all) + len(self.optimizer_state()))

    @property
    def size(self) -> int:
        """Numbers in all parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters)

    @property
    def evaluated(self) -> nn.Module:
        """The model that is evaluated: the average, if there is one."""
        return self.average.model if self.average else self.model

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Those of the parameters as `pack` lays them out; what else it packs comes behind."""
        return self._weights.layout.shapes[: len(self.parameters)]

    def freeze(self, prefixes: Collection[str]) -> None:
        """Leave trained parameters whose names begin so as they are from here on, and train all others."""
        for name, parameter in self._trained.items():
            parameter.requires_grad_(not is_under(name, prefixes))

    def forget_gradients(self) -> None:
        """As `optimizer.zero_grad()` does, without the record for a profiler that it makes each time, which
        costs a small network more than a layer."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """The optimiser's step with the gradients that are there, but for frozen parameters. Sparse ones are
        made dense, as the optimiser's state is."""
        for parameter in self.parameters:
            if not parameter.requires_grad:
                parameter.grad = None  # it may hold an older one, by which it would still move
        if self._has_sparse or not self._kinds_known:
            self._make_dense()
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._stepped, self.clip_norm)
        self._state.step()

    def _make_dense(self) -> None:
        """A parameter's first gradient tells its kind, and each is looked at until all have had one."""
        for parameter in self.parameters:
            if (gradient := parameter.grad) is not None and gradient.is_sparse:
                parameter.grad = gradient.to_dense()
                self._has_sparse = True
        self._kinds_known = all(parameter.grad is not None for parameter in self.parameters)

    def require_unchanged(self) -> None:
        """Raises OutOfStepError, one line, if the model or its optimiser holds other parameters than when the
        replica was made, or in other memory, trains one that it did not train then, or has made a buffer: no
        rank sends that."""
        now = _held(self.model, self.optimizer)
        changed = [name for name in self._held | now if now.get(name) is not self._held.get(name)]
        made, reshaped = self.buffers.changed()
        moved = [name for name, its in self._held.items() if _memory(its) != self._memory[name]]
        thawed = [name for name, its in self._held.items() if its.requires_grad and name not in self._trained]
        for kind, names, what in (
            ("parameter", changed, "was added, removed or replaced"),
            ("parameter", thawed, "was unfrozen"),
            ("parameter", moved, "was given other memory (write into it with copy_ instead)"),
            ("buffer", made, "was made"),
            ("buffer", reshaped, "got another shape or type"),
        ):
            if names:
                raise OutOfStepError(
                    f"the {kind} {names[0]} {what} after ranks had been put in step, and they would not "
                    "agree on it: change the model and its optimiser before, or put the ranks in step anew"
                )

    def weight_mark(self) -> int:
        """63 bits of a hash of all parameters, those that are not trained too: equal for equal ones."""
        return _mark([*self._held.values()])

    def settings(self, *, rates: bool) -> tuple[int, dict[tuple[int, str], Any]]:
        """63 bits of a hash of what is set in the optimiser's groups, with `rates` its rates too; and that by
        group and name."""
        found = {at: its for at, its in self._state.settings().items() if rates or at[1] != "lr"}
        return _number(repr(found).encode()), found

    def named_weights(self) -> tuple[list[str], list[NDArray[Any]]]:
        """All parameters: their names, and contiguous float64 arrays of their shapes."""
        values = [p.detach().to(torch.float64).contiguous().numpy() for p in self._held.values()]
        return list(self._held), values

    def attach(self, part: object) -> None:
        """Keep what a strategy builds on this model, such as hooks; one of each class."""
        self._attached[type(part)] = part

    def attached(self, kind: type[P]) -> P:
        """What was attached last of this class. Raises KeyError if nothing was."""
        part: P = self._attached[kind]
        return part

    def poison(self) -> None:
        """Make a gradient not a number, as an overflow or a broken machine would."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.fill_(torch.nan)
                return

    def pack(self, tail: int = 0) -> NDArray[np.floating]:
        """The weights as one flat array, with `tail` free places at its end, in the same memory each time."""
        if self._shares_state:
            self._state.gather()
        return self._weights.pack(tail)

    def unpack(self, flat: NDArray[np.floating]) -> None:
        """Overwrite the weights from a flat array; a longer one's tail is left alone."""
        self._weights.unpack(flat)
        if self._shares_state:
            self._state.note()  # numbers, of which no mean is taken, stay this rank's own
            self._state.show()

    def pack_frozen(self) -> NDArray[np.floating]:
        """The parameters that are not trained as one flat array, empty for most models."""
        return self._frozen.pack(0)

    def unpack_frozen(self, flat: NDArray[np.floating]) -> None:
        """Overwrite the parameters that are not trained."""
        self._frozen.unpack(flat)

    def pack_buffers(self) -> NDArray[np.floating]:
        """The floating-point buffers as one flat array, empty for a model without BatchNorm and the like."""
        return self._buffers.pack(0)

    def unpack_buffers(self, flat: NDArray[np.floating], which: Sequence[bool] | None = None) -> None:
        """Overwrite the floating-point buffers from a flat array, or `which` of them, in their order."""
        self._buffers.unpack(flat, which)

    def buffer_marks(self) -> NDArray[np.int64]:
        """A mark of each floating-point buffer, 63 bits of a hash of its bits: equal for equal ones."""
        return np.array([_mark([buffer]) for buffer in self._floats], np.int64)

    def pack_integers(self) -> NDArray[np.int64]:
        """The integer buffers as one flat int64 array, empty for most models."""
        return self._integers.pack(0)

    def unpack_integers(self, flat: NDArray[np.int64]) -> None:
        """Overwrite the integer buffers from a flat array."""
        self._integers.unpack(flat)

    def snapshot(self, reuse: Snapshot | None = None) -> Snapshot:
        """A copy of all that a step changes, in the memory of one that is no longer needed."""
        if reuse is None:
            tensors = [*self._all, *self.optimizer_state().values()]
            reuse = Snapshot(tensors, self._state, self.buffers, self.extra)
        reuse.take()
        return reuse

    def optimizer_tensors(self) -> list[Tensor]:
        """The optimiser's tensors that are shaped like their parameter, in a fixed order."""
        return self._state.shaped()

    def optimizer_state(self) -> dict[str, Tensor]:
        """All that the optimiser keeps, under names that do not change between runs."""
        return self._state.named()

    def load_optimizer_state(self, saved: dict[str, Tensor]) -> None:
        """Overwrite what the optimiser keeps. Raises ValueError if the names or shapes differ."""
        self._state.load(saved)

    def reset_optimizer(self) -> None:
        """Forget the optimiser's state, as if it had just been made."""
        self._state.reset()


class Layout:
    """Where tensors lie in one flat array: one behind the other, each in the order in which it lies in
    memory, so that nothing is turned around on the way (many convolutions are kept channels last).

    `shapes` are theirs in that order.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.sizes = [tensor.numel() for tensor in tensors]
        self.size = sum(self.sizes)
        orders = [sorted(range(t.dim()), key=t.stride, reverse=True) for t in tensors]
        self.shapes = tuple(
            tuple(tensor.shape[axis] for axis in order) for tensor, order in zip(tensors, orders, strict=True)
        )
        self._backs = [[order.index(axis) for axis in range(len(order))] for order in orders]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The first `size` numbers of an array, each tensor's in its own shape and in the array's memory."""
        parts = torch.split(flat[: self.size], self.sizes)
        return [
            part.view(shape).permute(back)
            for part, shape, back in zip(parts, self.shapes, self._backs, strict=True)
        ]


class _Flat:
    """Several tensors as one flat array; the staging memory is allocated once."""

    def __init__(self, tensors: list[Tensor], dtype: torch.dtype) -> None:
        self._tensors = tensors
        self.layout = Layout(tensors)
        self._staging = torch.empty(0, dtype=dtype)
        self._views: list[Tensor] = []

    def pack(self, tail: int) -> NDArray[Any]:
        if len(self._staging) != self.layout.size + tail or not self._views:
            self._staging = torch.zeros(self.layout.size + tail, dtype=self._staging.dtype)
            self._views = self.layout.views(self._staging)
        if self._tensors:
            torch._foreach_copy_(self._views, self._tensors)
        return self._staging.numpy()

    def unpack(self, flat: NDArray[Any], which: Sequence[bool] | None = None) -> None:
        tensors, views = self._tensors, self.layout.views(torch.from_numpy(flat))
        if which is not None:
            tensors, views = ([*itertools.compress(its, which)] for its in (tensors, views))
        if tensors:
            torch._foreach_copy_(tensors, views)


def _require_dense_numbers(model: nn.Module) -> None:
    if any(tensor.is_complex() for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError("the model holds complex numbers, expected floats and integers")
    for name, buffer in model.named_buffers():
        if buffer.is_quantized or buffer.layout != torch.strided:
            kind = "quantised" if buffer.is_quantized else "sparse"
            raise ModelError(
                f"the buffer {name} of the model is {kind}, which ranks cannot keep the same: keep it dense, "
                "or make it where it is used"
            )


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The model's parameters by name, and those that the optimiser has besides."""
    held: dict[str, Tensor] = dict(model.named_parameters())
    known = set(map(id, held.values()))
    besides = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    return held | {f"{number} of the optimiser alone": p for number, p in enumerate(besides)}


def _memory(tensor: Tensor) -> tuple[int, torch.dtype, torch.Size]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape


def _mark(tensors: Sequence[Tensor]) -> int:
    return _number(*(_bytes(tensor.detach()) for tensor in tensors))


def _number(*parts: bytes) -> int:
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part)
    return int.from_bytes(found.digest(), "little") >> 1


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _wide(tensors: list[Tensor]) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
