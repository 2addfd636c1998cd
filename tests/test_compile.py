"""torch.compile: the same training, where it works and pays; else as it is, said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rankwise.config import TrainConfig
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.training import compile
from rankwise.training.compile import _judge, _Trial

from . import effort

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[torch.nn.Module]:
    """Compiling without a compiler: the graph is taken as it is, and run as it is."""
    real, models = torch.compile, []

    def compile_eagerly(model: torch.nn.Module) -> Any:
        models.append(model)
        return real(model, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    return models


@pytest.mark.parametrize(
    "options",
    effort.daily(
        TEAMS := [{"ranks": 1}, {"ranks": 2, "strategy": "allreduce"}, {"ranks": 3, "topology": "master"}],
        TEAMS[2:],
    ),
)
def test_a_compiled_run_trains_the_same(
    config: Make,
    train_in_threads: Train,
    capsys: pytest.CaptureFixture[str],
    compiled: list[torch.nn.Module],
    options: dict[str, Any],
) -> None:
    """Every rank that trains calls a compiled model, what was tried before leaves no trace (BatchNorm
    included), and the weights are those of a run that was not compiled, ragged last batches included."""
    wanted = {**options, "train_limit": 150, "val_limit": 50, "model": "tests.test_training:BatchNormNet"}
    plain = train_in_threads(config(**wanted), folder="plain")
    assert plain[0].config["compile"] == "off"
    record, _, weights = train_in_threads(config(**wanted, compile="on"), folder="compiled")
    assert len(compiled) == record.config["ranks"] - (record.config["topology"] == "master")
    assert record.config["compile"] == "on"
    assert capsys.readouterr().out.count("--compile on: a step takes") == 1
    for name, value in plain[2].items():
        assert torch.allclose(value, weights[name], atol=1e-5), name


@effort.only_in_full
def test_inductor_agrees(config: Make, train_in_threads: Train) -> None:
    """With the compiler of this machine, if there is one, a run ends where one that was not compiled does."""
    options = {"train_limit": 100, "val_limit": 50, "batch_size": 16}
    plain = train_in_threads(config(**options), folder="plain")[2]
    record, _, weights = train_in_threads(config(**options, compile="on"), folder="compiled")
    if record.config["compile"] == "off":
        pytest.skip("no C++ compiler here")
    assert all(torch.allclose(plain[name], weights[name], atol=1e-4) for name in plain)


@pytest.mark.parametrize("mode", ["on", "auto"])
def test_without_a_compiler_it_trains_as_it_is(
    config: Make,
    train_in_threads: Train,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """Where compiling fails, on one rank or all, the run goes on with the bits of one that was not compiled,
    says so once, and its record has it."""

    def fail(model: torch.nn.Module) -> torch.nn.Module:
        raise RuntimeError("No working C++ compiler found\nin all of PATH")

    monkeypatch.setattr(compile, "SHORT_S", 0.0)
    options = {"ranks": 2, "strategy": "allreduce", "train_limit": 100, "val_limit": 50}
    plain = train_in_threads(config(**options), folder="plain")[2]
    monkeypatch.setattr(torch, "compile", fail)
    record, _, weights = train_in_threads(config(**options, compile=mode), folder="compiled")
    said = capsys.readouterr().out
    assert said.count("cannot be compiled here") == 1
    assert "No working C++ compiler found in all of PATH" in said
    assert record.config["compile"] == "off"
    assert all(torch.equal(plain[name], weights[name]) for name in plain)


def test_short_runs_are_not_compiled(
    config: Make, train_in_threads: Train, capsys: pytest.CaptureFixture[str], compiled: list[torch.nn.Module]
) -> None:
    """auto does not even try for training of seconds."""
    record = train_in_threads(config(train_limit=64, val_limit=50, epochs=1, compile="auto"))[0]
    assert not compiled
    assert record.config["compile"] == "off"
    assert "too short" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("trials", "kept"),
    [
        ([_Trial(1.0, 0.8, 20), _Trial(1.0, 0.9, 20)], True),
        ([_Trial(1.0, 0.5, 20), _Trial(1.0, 0.99, 20)], False),
        ([_Trial(0.0), _Trial(1.0, 0.8, 20)], True),
        ([_Trial(1.0, 0.5, 20), _Trial(1.0, error="broken")], False),
    ],
)
def test_auto_keeps_what_is_faster_on_each_rank(trials: list[_Trial], kept: bool) -> None:
    """auto keeps compiled models if each rank that trains gains by them, a master having no say; asked for,
    they are kept unless one failed."""
    assert _judge(trials, auto=True)[0] == kept
    assert _judge(trials, auto=False)[0] == all(not trial.error for trial in trials)
