"""Modules of users' own that fill themselves, keep more than tensors, or need more than one sample."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from rankwise import models, synchronise
from rankwise.comm import World, run_in_threads
from rankwise.errors import ConfigError, ModelError
from rankwise.plan import RunPlan
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import effort, tiny
from .conftest import stopped
from .test_cli import call

Make = Callable[..., RunPlan]
Train = Callable[..., tuple[Record, Any, dict[str, Tensor]]]

SHAPE = (1, tiny.SIDE, tiny.SIDE)
PIXELS = tiny.SIDE**2


class Plain(nn.Module):
    """Scores of images, of which each pixel is multiplied by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.net()
        self.scale = nn.Parameter(torch.ones(PIXELS))

    def table(self, samples: int) -> Tensor:
        return torch.linspace(0.5, 1.5, PIXELS).expand(samples, PIXELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x.flatten(1) * self.scale * self.table(len(x))).reshape(x.shape))


class Cached(Plain):
    """Keeps the table of the largest batch so far."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: Tensor | None = None

    def table(self, samples: int) -> Tensor:
        if self.kept is None or len(self.kept) < samples:
            self.kept = super().table(samples).clone()
        return self.kept[:samples]


class Buffered(Plain):
    """Makes a buffer of it in the first forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kept", None)

    def table(self, samples: int) -> Tensor:
        if self.kept is None:
            self.kept = super().table(1).clone()
        return self.kept.expand(samples, PIXELS)


def eager() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 26), nn.BatchNorm1d(26), nn.Linear(26, 10))


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(26), nn.LazyBatchNorm1d(), nn.LazyLinear(10))


def normed() -> nn.Module:
    """Its weight is computed by a hook, and cannot be copied."""
    made = tiny.net()
    nn.utils.weight_norm(made[1])  # the newer one is a parametrization, which can be
    return made


@pytest.mark.parametrize(
    ("fills", "holds", "strategy"),
    effort.rotating(
        [("Cached", "Plain"), ("Buffered", "Plain"), ("lazy", "eager")], ["allreduce", "local-sgd"]
    ),
)
def test_modules_that_fill_themselves(
    config: Make, train_in_threads: Train, strategy: str, fills: str, holds: str
) -> None:
    """A network that makes tables, buffers or layers in its first forward passes, of training or evaluation,
    is trained like one that has them from the beginning, to the bit."""
    options = {"ranks": 2, "epochs": 2, "strategy": strategy, "topology": "allreduce", "train_limit": 60}
    found, expected = (
        train_in_threads(config(**options, model=f"{__name__}:{name}"), folder=name)[2]
        for name in (fills, holds)
    )
    assert expected.items()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_what_cannot_be_copied_is_tried_all_the_same(config: Make, train_in_threads: Train) -> None:
    """A network whose weights a hook computes, which cannot be copied, is tried and trained; an average of
    its weights is refused by name."""
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(normed())
    options = {"ranks": 2, "strategy": "allreduce", "train_limit": 60, "model": f"{__name__}:normed"}
    record, _, weights = train_in_threads(config(**options))
    assert record.outcome == "completed"
    assert "1.weight_g" in weights
    with pytest.raises(ModelError, match="averaged-weights ema"):
        train_in_threads(config(**options, averaged_weights="ema"), folder="averaged")


class Features(nn.Module):
    """Keeps features by a hook that is a function of its own, which a copy's layers call too."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = tiny.net(), nn.Linear(26, 10)
        self.seen: dict[str, Tensor] = {}

        def keep(_: nn.Module, __: Any, output: Tensor) -> None:
            self.seen["hidden"] = output

        self.net[2].register_forward_hook(keep)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)
        return scores + self.last(self.seen["hidden"])


class Frozen(nn.Module):
    """Sets its mode in the usual way, and returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(tiny.net(), nn.BatchNorm1d(10))

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)
        self.net[1].eval()

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.net(x)
        return scores


class Closed(nn.Module):
    """Keeps a function of its own layers, so that a copy calls those of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.norm = tiny.net(), nn.BatchNorm1d(10)
        self.scores = lambda x: self.norm(self.net(x))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.scores(x)
        return scores


@pytest.mark.parametrize("name", ["Features", "Frozen", "Closed"])
def test_a_trial_leaves_a_model_as_it_is(name: str) -> None:
    """Models whose copies call the model itself, or whose modes return nothing, are tried, and neither their
    statistics nor their gradients are touched."""
    torch.manual_seed(0)
    trial = models.trial_of(f"{__name__}:{name}", SHAPE, 10)
    torch.manual_seed(0)
    fresh = globals()[name]().state_dict()
    trial.train(SHAPE)
    trial.trains_on_one(SHAPE)
    assert all(torch.equal(value, fresh[key]) for key, value in trial.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trial.model.parameters())


def test_an_average_of_what_cannot_be_copied_is_refused(config: Make, train_in_threads: Train) -> None:
    """An average whose copy would call the model that is trained is refused by name."""
    with pytest.raises(ModelError, match="averaged-weights ema needs: a copy fails, or calls the model"):
        train_in_threads(config(model=f"{__name__}:Closed", averaged_weights="ema"))


class Growing(Plain):
    """A buffer that is saved becomes another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + x.mean()
        return super().forward(x)


def test_a_buffer_that_becomes_another_is_refused(config: Make, train_in_threads: Train) -> None:
    """A saved buffer that gets another type in training would be each rank's own: refused before training."""
    with pytest.raises(ModelError, match=r"turns the buffer seen from \[\] of int64 into \[\] of float32"):
        train_in_threads(config(model=f"{__name__}:Growing", ranks=2))


class Thawing(nn.Module):
    """Unfreezes a layer in its tenth step."""

    steps: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.net()
        self.net[1].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 2:
            Thawing.steps += 1
            self.net[1].requires_grad_(Thawing.steps > 20)
        scores: Tensor = self.net(x)
        return scores


def test_what_is_found_in_training_leaves_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A change that is refused in the middle of a run ends it with code 1, and the epochs before it stay."""
    monkeypatch.chdir(tmp_path)
    Thawing.steps = 0
    words = [
        "--dataset",
        tiny.DATASET,
        "--model",
        f"{__name__}:Thawing",
        "--lr",
        "0.02",
        "--batch-size",
        "16",
    ]
    assert call("train", *words, "--epochs", "4", "--out", "run") == 1
    assert "parameter net.1.weight was unfrozen" in capsys.readouterr().err
    record = RunFolder(tmp_path / "run").read()
    assert (record.outcome, len(record.epochs)) == ("failed", 1)
    assert list((tmp_path / "run" / "checkpoints").glob("epoch-0001"))


class Noisy(nn.Module):
    """Draws in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(tiny.net(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + torch.randn_like(x))


def test_a_trial_draws_nothing() -> None:
    """Weights, and what is drawn after them, are what they are without a trial, whatever a network draws."""
    torch.manual_seed(3)
    expected, then = Noisy().state_dict(), torch.rand(3)
    torch.manual_seed(3)
    trial = models.trial_of(f"{__name__}:Noisy", SHAPE, 10)
    trial.train(SHAPE)
    assert trial.trains_on_one(SHAPE)
    assert torch.equal(torch.rand(3), then)
    assert all(torch.equal(value, expected[name]) for name, value in trial.model.state_dict().items())
    assert all(parameter.grad is None for parameter in trial.model.parameters())


class Changing(nn.Module):
    """Answers in training as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny.net()

    def forward(self, x: Tensor) -> Any:
        return self.in_training(self.net(x)) if self.training else self.net(x)


class WithAux(Changing):
    def in_training(self, scores: Tensor) -> Any:
        return scores, scores


class Short(Changing):
    def in_training(self, scores: Tensor) -> Any:
        return scores[:, 1:]


class Detached(Changing):
    def in_training(self, scores: Tensor) -> Any:
        return scores.detach()


class Late(Changing):
    def in_training(self, scores: Tensor) -> Any:
        self.register_buffer("mean", scores.detach().mean(0))
        return scores


class Unused(Changing):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.LazyLinear(3)


class Lines(Changing):
    """Has one number a channel, which InstanceNorm cannot scale."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(10)

    def in_training(self, scores: Tensor) -> Any:
        return self.norm(scores[:, :, None, None]).flatten(1)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("WithAux", r"answers 2 images in training with tuple, expected scores of shape \(2, 10\)"),
        ("Short", r"answers 2 images in training with \(2, 9\)"),
        ("Detached", "cannot be trained on images of shape .1, 8, 8.: .*does not require grad"),
        ("Late", "makes the buffer mean in its first training step"),
        ("Unused", "does not use the parameter more.weight in a forward pass"),
        ("Lines", "cannot be trained on images .*more than 1 spatial element"),
    ],
)
def test_what_fails_in_training_is_found_before(
    name: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a network does in training mode alone is tried before training, and refused in one line with code
    2; no folder is left."""
    words = ["--dataset", tiny.DATASET, "--model", f"{__name__}:{name}", "--out", str(tmp_path / "run")]
    assert call("train", *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"rankwise: model {__name__}:{name}")
    assert re.search(told, line)
    assert not (tmp_path / "run").exists()


class Keeping(Plain):
    """Counts its steps, which change what it computes, and keeps words, in its extra state, and a statistic
    in a buffer that is not persistent."""

    made: ClassVar[list[Keeping]] = []

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, Any] = {"steps": 0, "words": ["a", None], "table": torch.zeros(2)}
        self.register_buffer("mean", torch.zeros(PIXELS), persistent=False)
        self.register_buffer("sized", torch.zeros(0), persistent=False)
        self.made.append(self)

    def forward(self, x: Tensor) -> Tensor:
        self.sized = torch.ones(len(x))
        if self.training:
            self.kept["steps"] += 1
            self.kept["table"] = self.kept["table"] + 1
            with torch.no_grad():
                self.mean += x.flatten(1).mean(0) / 10
        factor = 1 + self.kept["steps"] / 10 + float(self.kept["table"].sum()) / 100
        return super().forward(x - self.mean.reshape(x.shape[1:])) / factor

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


@pytest.mark.parametrize(
    ("options", "average"),
    effort.rotating(
        [
            {"ranks": 1},
            {"ranks": 2, "strategy": "allreduce"},
            {"ranks": 3, "strategy": "parameter-averaging"},
        ],
        ["none", "ema"],
    ),
)
def test_all_that_a_module_keeps_is_in_a_checkpoint(
    config: Make, train_in_threads: Train, options: dict[str, Any], average: str
) -> None:
    """Extra state that is no tensor, and buffers that are not persistent, are saved: a resumed run computes
    what one that was not stopped does, to the bit."""
    plan = config(
        **options,
        epochs=3,
        train_limit=50,
        checkpoint_keep=9,
        averaged_weights=average,
        model=f"{__name__}:Keeping",
    )
    whole, folder, expected = train_in_threads(plan)
    stopped(folder)
    resumed, _, found = train_in_threads(plan, folder="parts", resume=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert [row.val_loss for row in resumed.epochs] == [row.val_loss for row in whole.epochs]
    steps = sum(row.steps for row in whole.epochs)
    assert Keeping.made[-1].kept["steps"] == steps
    assert Keeping.made[-1].kept["words"] == ["a", None]


@pytest.mark.parametrize("strategy", ["allreduce", "parameter-averaging"])
def test_extra_state_goes_to_ranks_that_come_in(config: Make, train_in_threads: Train, strategy: str) -> None:
    """A spare that takes the place of a lost rank has the extra state that the others have, and so has every
    rank after an epoch."""
    before = len(Keeping.made)
    record, _, _ = train_in_threads(
        config(
            ranks=2,
            spares=1,
            epochs=3,
            strategy=strategy,
            topology="allreduce",
            on_failure="continue",
            fault=["kill:rank=1,epoch=2,step=2"],
            model=f"{__name__}:Keeping",
        )
    )
    assert record.samples.trained == record.samples.expected
    (lost,) = [fault.rank for fault in record.faults]
    assert lost == 1
    counts = sorted(made.kept["steps"] for made in Keeping.made[before:])
    assert counts[-1] == counts[-2] >= sum(row.steps for row in record.epochs)


class Odd(Keeping):
    def get_extra_state(self) -> Any:
        return {"made by": Odd}


class OneWay(Plain):
    def get_extra_state(self) -> Any:
        return 1


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Odd", "_extra_state is a dict, which a checkpoint cannot hold: give tensors, numbers, text"),
        ("OneWay", "module model has get_extra_state, and no set_extra_state"),
    ],
)
def test_extra_state_that_cannot_be_kept(config: Make, train_in_threads: Train, name: str, told: str) -> None:
    """Extra state that cannot be saved, or not be given back, is refused before training, in one line."""
    with pytest.raises(ModelError, match=told) as refused:
        train_in_threads(config(model=f"{__name__}:{name}"))
    assert "\n" not in str(refused.value)


def rows() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def maps() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10))


@pytest.mark.parametrize(
    ("samples", "options", "steps"),
    [
        (33, {"ranks": 1}, 2),
        (66, {"ranks": 2, "strategy": "allreduce"}, 2),
        (65, {"ranks": 2, "strategy": "local-sgd", "sync_every": 2}, 2),
        (65, {"ranks": 2, "strategy": "parameter-averaging", "topology": "allreduce"}, 2),
        (66, {"ranks": 3, "strategy": "gossip", "batch_size": 7}, 3),
        (33, {"ranks": 1, "model": f"{__name__}:maps"}, 3),
    ],
    ids=str,
)
def test_a_last_sample_joins_the_batch_before_it(
    config: Make, train_in_threads: Train, samples: int, options: dict[str, Any], steps: int
) -> None:
    """Where a network cannot train on a single sample, as BatchNorm cannot, a last one joins the batch before
    it, and none is left out; a network that can is given batches as always."""
    plan = config(**{"model": f"{__name__}:rows", **options}, train_limit=samples)
    record, _, weights = train_in_threads(plan)
    assert record.samples.trained == record.samples.expected == 2 * samples
    assert [row.steps for row in record.epochs] == [steps, steps]
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("strategy", ["allreduce", "parameter-averaging"])
def test_what_a_lost_rank_had_makes_no_batch_of_one(
    config: Make, train_in_threads: Train, strategy: str
) -> None:
    """Ranks that go on without another train what it had, with BatchNorm too, in batches of two or more."""
    plan = config(
        ranks=3,
        strategy=strategy,
        topology="allreduce",
        on_failure="continue",
        model=f"{__name__}:rows",
        batch_size=2,
        train_limit=40,
        fault=["kill:rank=1,epoch=1,step=7"],
    )
    record, _, _ = train_in_threads(plan)
    assert len(record.faults) == 1
    assert record.samples.trained == record.samples.expected == 80


@pytest.mark.parametrize(
    ("samples", "options"), [(20, {"batch_size": 1}), (3, {"ranks": 2, "strategy": "allreduce"})], ids=str
)
def test_batches_of_one_sample_are_refused(
    config: Make, train_in_threads: Train, samples: int, options: dict[str, Any]
) -> None:
    """Where nothing but a batch of one sample is possible, a network that cannot train on it is refused
    before training; one that can is not."""
    told = (
        "makes a batch of one of the .* training samples, .* as BatchNorm cannot: use a larger --batch-size"
    )
    with pytest.raises(ConfigError, match=told) as refused:
        train_in_threads(config(**options, train_limit=samples, model=f"{__name__}:rows"))
    assert "\n" not in str(refused.value)
    plan = config(**options, train_limit=samples, model=f"{__name__}:maps")
    assert train_in_threads(plan, folder="maps")[0].outcome == "completed"


def test_a_loop_of_ones_own_has_no_batch_of_one() -> None:
    """In a loop of one's own a model with BatchNorm gets no batch of one sample, and another one does."""

    def program(world: World, model: nn.Module) -> list[int]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        its = synchronise(model, optimizer, world, samples=18, batch_size=4, strategy="allreduce")
        sizes = []
        for batch in its.batches(1):
            optimizer.zero_grad()
            model(torch.rand(len(batch), *SHAPE)).sum().backward()
            its.step()
            sizes.append(len(batch))
        return sizes

    assert run_in_threads(2, lambda world: program(world, rows())) == [[4, 5], [4, 5]]
    assert run_in_threads(2, lambda world: program(world, tiny.net())) == [[4, 4, 1], [4, 4, 1]]


def test_a_model_without_shapes_is_refused_in_a_loop() -> None:
    """Layers that have no shape yet are refused by name, with what to do."""

    def program(world: World) -> None:
        model = lazy()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        synchronise(model, optimizer, world, samples=20, strategy="allreduce")

    with pytest.raises(
        ModelError, match=r"parameter 1.weight that has no shape yet .*: call model.inputs. once"
    ):
        run_in_threads(2, program)
