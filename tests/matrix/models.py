"""Models: small ones of the kinds that people train."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

SAMPLES = 96
CLASSES = 3
VOCABULARY = 11

_RANDOM = torch.Generator().manual_seed(5)
LABELS = torch.randint(0, CLASSES, (SAMPLES,), generator=_RANDOM)
VECTORS = torch.randn(SAMPLES, 6, generator=_RANDOM, dtype=torch.float64)
SERIES = torch.randn(SAMPLES, 4, 5, generator=_RANDOM, dtype=torch.float64)
IMAGES = torch.randn(SAMPLES, 2, 5, 5, generator=_RANDOM, dtype=torch.float64)
TOKENS = torch.randint(0, VOCABULARY, (SAMPLES, 4), generator=_RANDOM)
_RARE = torch.randint(0, 40, (SAMPLES,), generator=_RANDOM)
"""A sample whose number here is 0 or 1 is routed to an expert of its own: in many batches there is none."""


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def small_mlp() -> nn.Module:
    """With weights that are small beside what a step changes, which 8 bits then show."""
    model = mlp()
    with torch.no_grad():
        for p in model.parameters():
            p *= 0.1
    return model


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(4, CLASSES))


def normalised(norm: nn.Module) -> nn.Module:
    """A network with a normalisation. What comes before has no bias: its gradient would be rounding alone,
    which an optimiser like Adam makes as large as any other."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), norm, nn.Tanh(), nn.Flatten(), nn.Linear(36, CLASSES)
    )


def layer_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, CLASSES))


def dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


class Recurrent(nn.Module):
    """The last state of a recurrent layer, in classes."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.layer, self.head = kind(5, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


def parametrized(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), norm(nn.Linear(8, CLASSES)))


class Words(nn.Module):
    """The mean of words, in classes; with `tied` weights the table of words is read twice."""

    def __init__(self, *, sparse: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 6, sparse=sparse)
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, VOCABULARY if tied else CLASSES)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(x).mean(1))))


class Scalars(nn.Module):
    """Parameters that are single numbers, among others."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor([0.1]))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x * self.scale + self.shift)


class Mixed(nn.Module):
    """A layer of float32 before one of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, CLASSES, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x.float())).double())


class Tables(nn.Module):
    """Buffers that never change: a mask of -inf, a table of indices, one that is expanded, one that is not
    saved."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]).repeat(4))
        self.register_buffer("order", torch.tensor([5, 4, 3, 2, 1, 0]))
        self.register_buffer("wide", torch.tensor([0.5]).expand(6))
        self.register_buffer("passing", torch.linspace(0, 1, 6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b((self.a(x[:, self.order] * self.wide + self.passing) + self.mask).softmax(1))


class Unused(nn.Module):
    """A layer that takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.unused = mlp(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class Experts(nn.Module):
    """An expert for few samples: it has a gradient where a batch holds one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.expert = mlp(), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x[:, :6])
        rare = x[:, 6] < 2
        return out.index_put((rare,), out[rare] + self.expert(x[rare, :6])) if rare.any() else out


class Transformer(nn.Module):
    """A block with causal attention over words. Its projections have no bias: that of keys changes nothing,
    and its gradient would be rounding alone."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(VOCABULARY, 8), nn.Parameter(torch.randn(4, 8) / 4)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True, bias=False)
        self.before, self.after = nn.LayerNorm(8), nn.LayerNorm(8)
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, CLASSES)
        self.register_buffer("mask", torch.full((4, 4), float("-inf")).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places
        n = self.before(h)
        h = h + self.attend(n, n, n, attn_mask=self.mask, need_weights=False)[0]
        return self.head((h + self.inner(self.after(h))).mean(1))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


Loss = Callable[[nn.Module, list[nn.Parameter], Tensor, Tensor], Tensor]


def cross_entropy(model: nn.Module, besides: list[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).double(), y)


def weighed(model: nn.Module, besides: list[nn.Parameter], x: Tensor, y: Tensor) -> Tensor:
    """Two losses with learned weights (Kendall et al. 2018)."""
    one, two = besides
    out = model(x)
    return (-one).exp() * F.cross_entropy(out, y) + one + (-two).exp() * out.square().mean() + two


@dataclass(frozen=True)
class Kind:
    """A kind of model: how it is made, what it reads, and its numbers' `dtype`, None as it is made.

    `besides` are parameters that the model does not hold. With `groups` its layers train at two rates. What
    is compared after the `first_step` alone, within `tolerance` of the largest change, has numbers too short
    for more. `draws` says why ranks and one process may differ, or None.
    """

    make: Callable[[], nn.Module]
    inputs: Tensor = field(default_factory=lambda: VECTORS)
    dtype: torch.dtype | None = torch.float64
    loss: Loss = cross_entropy
    besides: int = 0
    groups: bool = False
    first_step: bool = False
    tolerance: float = 1e-10
    draws: str | None = None

    @functools.cached_property
    def prototype(self) -> nn.Module:
        """The model before its first step, always the same."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = self.make()
        return model.to(self.dtype) if self.dtype else model

    @functools.cached_property
    def data(self) -> Tensor:
        """The samples."""
        floats = self.inputs.is_floating_point() and self.dtype is not None
        return self.inputs.to(self.dtype) if floats else self.inputs


BATCH_STATISTICS = "BatchNorm normalises the batch of its rank, not that of all ranks"
OWN_DRAWS = "dropout draws on each rank what it drops there"
FORWARD_PASSES = "spectral norm goes one step on in each forward pass, and a rank without a batch makes none"
KEPT_ZEROS = (
    "zero_grad(set_to_none=False) keeps zeros of a parameter that takes no part; ranks see no gradient"
)

MODELS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(6, CLASSES)),
    "mlp": Kind(mlp),
    "conv": Kind(conv, IMAGES),
    "channels-last": Kind(
        lambda: conv().to(memory_format=torch.channels_last),
        IMAGES.contiguous(memory_format=torch.channels_last),
    ),
    "lstm": Kind(lambda: Recurrent(nn.LSTM), SERIES),
    "gru": Kind(lambda: Recurrent(nn.GRU), SERIES),
    "weight-norm": Kind(lambda: parametrized(parametrizations.weight_norm)),
    "spectral-norm": Kind(lambda: parametrized(parametrizations.spectral_norm)),
    "embedding": Kind(Words, TOKENS),
    "sparse-embedding": Kind(lambda: Words(sparse=True), TOKENS),
    "tied": Kind(lambda: Words(tied=True), TOKENS),
    "scalars": Kind(Scalars),
    "transformer": Kind(Transformer, TOKENS),
    "batch-norm": Kind(lambda: normalised(nn.BatchNorm2d(4)), IMAGES, draws=BATCH_STATISTICS),
    "group-norm": Kind(lambda: normalised(nn.GroupNorm(2, 4)), IMAGES),
    "layer-norm": Kind(layer_norm),
    "dropout": Kind(dropout, draws=OWN_DRAWS),
    "tables": Kind(Tables),
    "unused": Kind(Unused),
    "experts": Kind(Experts, torch.cat([VECTORS, _RARE[:, None]], 1)),
    "frozen": Kind(frozen),
    "loss-weights": Kind(mlp, loss=weighed, besides=2),
    "two-groups": Kind(mlp, groups=True),
    "float32": Kind(mlp, dtype=torch.float32, first_step=True, tolerance=1e-5),
    "bfloat16": Kind(small_mlp, dtype=torch.bfloat16, first_step=True, tolerance=2e-2),
    "mixed": Kind(Mixed, dtype=None, first_step=True, tolerance=1e-5),
}


class Program:
    """A user's program: model, what is learned besides, and their optimiser."""

    def __init__(self, kind: Kind, optimizer_of: Callable[[Any], torch.optim.Optimizer]) -> None:
        self.kind = kind
        self.model = copy.deepcopy(kind.prototype)
        self.besides = [nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(kind.besides)]
        parameters = [*self.model.parameters(), *self.besides]
        groups = [parameters[:2], parameters[2:]] if kind.groups else [parameters]
        self.optimizer = optimizer_of([{"params": group} for group in groups])
        for group in self.optimizer.param_groups[1:]:
            group["lr"] = group["lr"] * 0.3
        self.turns = 0
        self.scheduler: Any = None
        self.seen: list[Tensor] = []
        """What was looked at on the way."""

    def loss(self, indices: Any) -> Tensor:
        """The mean over some samples."""
        indices = torch.as_tensor(indices)
        return self.kind.loss(self.model, self.besides, self.kind.data[indices], LABELS[indices])

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that can be trained."""
        return [*self.model.parameters(), *self.besides]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that it holds and has looked at, by name."""
        yield from self.model.named_parameters()
        yield from self.model.named_buffers()
        yield from ((f"weight {n} of the loss", its) for n, its in enumerate(self.besides))
        yield from ((f"look {n}", its) for n, its in enumerate(self.seen))
