"""Buffers of a model: what is the same on all ranks stays as it is, and the rest is agreed on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.errors import ModelError
from rankwise.models.replica import Replica
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.strategies import STRATEGIES

from .. import effort
from ..conftest import read_weights, stopped

SAMPLES = 48
TABLES = {
    "mask": torch.tensor([0.0, float("-inf")]).repeat(4),
    "nothing": torch.tensor([float("nan"), 1.0]),
    "positions": torch.rand(8, generator=torch.Generator().manual_seed(1)),
    "expanded": torch.rand(3, generator=torch.Generator().manual_seed(2)).expand(5, 3),
    "indices": torch.arange(6).expand(4, -1),
    "large": torch.tensor([2**53 + 1, -(2**62)]),
    "halves": torch.rand(4, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16),
}


class Net(nn.Module):
    """A network with BatchNorm, and tables of many kinds."""

    def __init__(self, features: int = 8, classes: int = 2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, classes)
        )
        for name, table in TABLES.items():
            self.register_buffer(name, table, persistent=name != "positions")

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network for a run."""
    return Net(shape[0] * shape[1] * shape[2], classes)


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and torch.equal(
        *(its.contiguous().reshape(-1).view(torch.uint8) for its in (one, two))
    )


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: its.clone() for name, its in model.named_buffers() if name not in TABLES}


@pytest.mark.parametrize(
    ("name", "averaged"),
    effort.rotating([name for name in STRATEGIES if name not in ("single", "ddp")], ["none", "ema"]),
)
def test_tables_stay_bit_for_bit(name: str, averaged: str) -> None:
    """After two epochs masks of -inf, expanded tables, large integers and the like are what they were, in the
    average too, and ranks agree on BatchNorm's statistics."""
    if averaged == "ema" and not STRATEGIES[name].strategy.recovery.synchronous:
        averaged = "none"
    first, data = Net(), torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 8, generator=data)
    labels = torch.randint(0, 2, (SAMPLES,), generator=data)
    models = [copy.deepcopy(first) for _ in range(3)]

    def program(world: World) -> dict[str, Tensor]:
        model = models[world.rank]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        ranks = synchronise(
            model,
            optimizer,
            world,
            samples=SAMPLES,
            strategy=name,
            batch_size=4,
            epochs=2,
            averaged_weights=averaged,
        )
        for epoch in (1, 2):
            for batch in ranks.batches(epoch):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch.indices]), labels[batch.indices]).backward()
                ranks.step()
        for its in (model, ranks.replica.evaluated):
            for table, value in TABLES.items():
                assert same_bits(its.get_buffer(table), value), table
        return statistics_of(model)

    found = run_in_threads(3, program)
    assert not torch.equal(found[0]["layers.2.running_mean"], statistics_of(first)["layers.2.running_mean"])
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


class Assigning(nn.Module):
    """Keeps a running mean, in place or by putting a new tensor in the place of the old one, and a table of
    the size of the batch."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.layer = nn.Linear(8, 2)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("table", torch.zeros(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.table = torch.arange(float(len(x)))
            mean = 0.9 * self.mean + 0.1 * x.mean(0)
            if self.in_place:
                self.mean.copy_(mean)
            else:
                self.mean = mean
        return self.layer(x - self.mean)


@pytest.mark.parametrize("averaged", ["none", "ema"])
@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd"])
def test_buffers_that_are_assigned_are_followed(strategy: str, averaged: str) -> None:
    """A buffer in whose place a module puts another tensor is agreed on, averaged and undone like one that it
    changes in place, to the bit."""
    images = torch.randn(SAMPLES, 8, generator=torch.Generator().manual_seed(0))

    def trained(*, in_place: bool) -> list[list[Tensor]]:
        torch.manual_seed(0)
        first = Assigning(in_place=in_place)

        def program(world: World) -> list[Tensor]:
            model = copy.deepcopy(first)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            options = {"samples": SAMPLES, "strategy": strategy, "batch_size": 5}
            ranks = synchronise(model, optimizer, world, averaged_weights=averaged, **options)
            for epoch in (1, 2):
                for batch in ranks.batches(epoch):
                    optimizer.zero_grad()
                    snapshot = ranks.replica.snapshot()
                    model(images[batch.indices]).square().sum().backward()
                    snapshot.restore()
                    optimizer.zero_grad()
                    model(images[batch.indices]).square().sum().backward()
                    ranks.step()
            evaluated = ranks.replica.evaluated
            return [its.clone() for its in (model.mean, model.layer.weight.detach(), evaluated.mean)]

        return run_in_threads(2, program)

    found, expected = trained(in_place=False), trained(in_place=True)
    for mine, theirs in zip(found, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))
    assert torch.equal(found[0][0], found[1][0])


def test_going_back_leaves_tables() -> None:
    """A snapshot that is restored brings statistics back, and an expanded table keeps its bits and shape."""
    model = Net()
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
    snapshot = replica.snapshot()
    before = statistics_of(model)
    model(torch.randn(6, 8))
    snapshot.restore()
    assert all(torch.equal(value, before[name]) for name, value in statistics_of(model).items())
    assert all(same_bits(model.get_buffer(name), value) for name, value in TABLES.items())


def test_a_run_goes_on_with_its_tables(
    config: Callable[..., TrainConfig],
    train_in_threads: Callable[..., tuple[Record, RunFolder, dict[str, Any]]],
) -> None:
    """Checkpoints hold tables as they are, and a resumed run ends with the bits of one that did not stop."""
    options = {"ranks": 2, "model": f"{__name__}:build", "epochs": 3, "checkpoint_keep": 4}
    _, whole, weights = train_in_threads(config(**options), folder="whole")
    parts = stopped(whole)
    train_in_threads(config(**options), folder="parts", resume=True)
    again = read_weights(parts)
    assert again.keys() == weights.keys()
    assert all(same_bits(again[name], value) for name, value in weights.items())
    assert all(same_bits(weights[name], TABLES[name]) for name in TABLES if name != "positions")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # which torch will remove, but models have
@pytest.mark.parametrize("kind", ["sparse", "quantised"])
def test_what_has_no_mean_is_refused(kind: str) -> None:
    """Sparse and quantised buffers are refused by name, in one line that says what to do."""
    model, table = Net(), torch.ones(3)
    sparse = kind == "sparse"
    model.register_buffer(
        "table", table.to_sparse() if sparse else torch.quantize_per_tensor(table, 0.1, 0, torch.qint8)
    )
    with pytest.raises(ModelError, match=f"the buffer table of the model is {kind}.*keep it dense"):
        Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
