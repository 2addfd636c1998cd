"""bfloat16 arithmetic with float32 weights: what it may change, and what it may not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rankwise import strategies
from rankwise.config import TrainConfig
from rankwise.models.precision import autocast
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system import machine

from . import effort
from .conftest import stopped

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]]

SYNCHRONISING = [name for name in strategies.STRATEGIES if name not in ("single", "ddp")]
MEETING = [name for name in SYNCHRONISING if name not in ("easgd", "downpour")]

FAR = {"fp32": 1e-3, "bf16": 0.05}
"""How far apart, of the way from the start, weights may end that were trained on the same samples by one rank
and by several: bfloat16 has 8 bits, and rounds the gradient of each rank's part on its own."""


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Euclidean, over all weights."""
    return float(sum((one[name] - two[name]).square().sum() for name in one)) ** 0.5


@pytest.mark.parametrize(
    ("strategy", "precision"),
    effort.daily(
        [
            ("allreduce", "bf16"),
            ("gradient-server", "fp32"),
            ("allreduce", "fp32"),
            ("gradient-server", "bf16"),
        ],
        [("allreduce", "bf16")],
    ),
)
def test_ranks_are_one_rank_with_the_large_batch(
    config: Make, train_in_threads: Train, strategy: str, precision: str
) -> None:
    """N ranks with batch b end, after 20 steps, where one rank with batch N b does, within FAR of the way
    that it went; in bfloat16 as in float32."""
    workers, batch = 3, 20
    options = {
        "dataset": "digits", "model": "paper-cnn", "train_limit": workers * batch, "val_limit": 50,
        "epochs": 20, "lr": 0.05, "precision": precision, "checkpoint_every": 20,
    }  # fmt: skip
    ranks = workers + (strategy == "gradient-server")
    alone = train_in_threads(config(**options, batch_size=workers * batch), folder="alone")[2]
    team = train_in_threads(
        config(**options, batch_size=batch, ranks=ranks, strategy=strategy), folder="team"
    )
    start = train_in_threads(config(**options | {"epochs": 1, "lr": 1e-12}), folder="start")[2]
    way = distance(alone, start)
    assert way > 0.1
    assert distance(alone, team[2]) < FAR[precision] * way


@pytest.mark.parametrize("name", effort.daily(SYNCHRONISING, SYNCHRONISING[::3]))
def test_every_strategy_trains_in_bfloat16(config: Make, train_in_threads: Train, name: str) -> None:
    """With any strategy a run in bfloat16 trains each sample once, keeps float32 weights, learns, and goes
    on, where ranks meet, to the bit."""
    options: dict[str, Any] = {
        "ranks": 3, "strategy": name, "train_limit": 200, "val_limit": 100, "batch_size": 16,
        "precision": "bf16",
    }  # fmt: skip
    if name == "post-local-sgd":
        options["local_after"] = 1.0
    record, folder, weights = train_in_threads(config(**options, epochs=2), folder="whole")
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert record.samples.trained == record.samples.expected
    assert {value.dtype for value in weights.values()} == {torch.float32}
    first, second = record.epochs
    assert first.train_loss is not None
    assert second.train_loss is not None
    assert second.train_loss < first.train_loss
    if name in MEETING:
        stopped(folder)
        parts = train_in_threads(config(**options, epochs=2), folder="parts", resume=True)[2]
        assert all(torch.equal(parts[key], weights[key]) for key in weights)


def test_only_the_products_are_bfloat16() -> None:
    """Inside, a layer answers in bfloat16, a loss is float32, and gradients have the weights' type."""
    layer = torch.nn.Linear(4, 3)
    with autocast("bf16"):
        scores = layer(torch.ones(2, 4))
        loss = torch.nn.functional.cross_entropy(scores, torch.tensor([0, 1]))
    loss.backward()
    assert (scores.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32
    with autocast("fp32"):
        assert layer(torch.ones(2, 4)).dtype == torch.float32


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_processor_without_bfloat16_is_named_once(
    config: Make,
    train_in_threads: Train,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
) -> None:
    """Where the processor has no instructions for bfloat16 the run works, and says once that it is slow."""
    monkeypatch.setattr(machine, "multiplies_bf16", lambda: False)
    options = {"ranks": ranks, "epochs": 1, "train_limit": 100}
    train_in_threads(config(**options, precision="bf16"))
    assert capsys.readouterr().out.count("--precision bf16 is slow") == 1
    train_in_threads(config(**options), folder="plain")
    assert "bf16" not in capsys.readouterr().out
