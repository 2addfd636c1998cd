"""The examples of `Run` end with the weights of the plain scripts that they were."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from threading import local
from typing import Any

import numpy as np
import pytest
import torch

import rankwise
from rankwise.api import Run
from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed

from . import effort, run_examples
from .conftest import Command

OPTIONS: dict[str, list[str]] = {
    "classifier.py": ["--limit", "50", "--epochs", "5"],
    "transformer.py": ["--limit", "2300", "--epochs", "2", "--width", "16", "--dropout", "0"],
    "vae.py": ["--limit", "50", "--epochs", "3"],
    "gan.py": ["--limit", "50", "--epochs", "3"],
    "recurrent.py": ["--limit", "2500", "--epochs", "2"],
    "lbfgs.py": ["--limit", "50", "--epochs", "2"],
    "table.py": ["--limit", "50", "--epochs", "9", "--patience", "2"],
    "compiled.py": ["--limit", "50", "--epochs", "2", "--backend", "eager"],
}
"""So that the last turn is shorter, and ranks have parts of it that differ."""

BATCH = 6
"""Samples of each rank in a turn. What all ranks have together is the plain script's batch."""

DRAWS = {
    "vae.py": ("torch.randn_like(mean)", "torch.sin(7 * mean.detach())"),
    "gan.py": ("torch.randn(len(real), LATENT)", "real[:, 20 : 20 + LATENT]"),
}
"""What is drawn for a sample, and in place of it what is the same on whichever rank the sample is trained."""

MODELS = {"gan.py": ["generator", "discriminator"]}
MEANS = ("val_loss", "error")

ALONE = {"compiled.py"}
"""Of which ranks are processes: torch.compile is not made for several threads."""


@pytest.fixture
def _repeatable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ranks that are threads share torch's generator: weights begin as their shapes say. One thread computes,
    as several would sum in another order than the ranks."""
    for name in ("uniform_", "normal_", "kaiming_uniform_"):
        monkeypatch.setattr(torch.nn.init, name, by_shape(getattr(torch.nn.init, name)))
    yield
    torch.set_default_dtype(torch.float32)


def by_shape(fill: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """An initialisation that gives a tensor numbers by its shape alone."""

    @wraps(fill)
    def filled(tensor: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(tensor.shape))
        return fill(tensor, *args, **{**options, "generator": generator})

    return filled


def _execute(source: str, name: str) -> dict[str, np.ndarray]:
    """Run a script; returns the weights and the means that it ends with, by name."""
    if name in DRAWS:
        assert DRAWS[name][0] in source
        source = source.replace(*DRAWS[name])
    found: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), found)
    models = {model: found[model] for model in MODELS.get(name, ["model"])}
    models = {model: getattr(of, "_orig_mod", of) for model, of in models.items()}
    ends = {
        f"{model} {key}": p.detach().numpy()
        for model, of in models.items()
        for key, p in of.named_parameters()
    }
    return ends | {key: np.float64(found[key]) for key in MEANS if key in found}


def _arguments(name: str, batch: int) -> list[str]:
    batches = [] if name == "lbfgs.py" else ["--batch-size", str(batch)]
    return [name, "--dtype", "float64", *OPTIONS[name], *batches]


def _plain(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What the plain script ends with, whose batch is that of all ranks."""
    monkeypatch.setattr(sys, "argv", _arguments(name, BATCH * ranks))
    return _execute(run_examples.plain(name), name)


class _Mortal(Run):
    """Of which rank 0 dies some calls of MPI after the first turn was asked for."""

    calls = 0

    def turns(self, loader: Any) -> Iterator[Any]:
        if self.world.number == 0 and self.calls:
            self.world._transport._calls_left, self.calls = self.calls, 0
        return super().turns(loader)


def _on_ranks(name: str, ranks: int, monkeypatch: pytest.MonkeyPatch, calls: int = 0) -> list[Any]:
    """What an example ends with on each rank. After `calls`, if it is given, rank 0 dies, and the others go
    on with the batch of all."""
    here = local()
    lost = {"on_shrink": "keep-global-batch"} if calls else {}
    monkeypatch.setattr(_Mortal, "calls", calls)
    monkeypatch.setattr(rankwise, "Run", lambda **options: _Mortal(world=here.world, **{**options, **lost}))
    monkeypatch.setattr(sys, "argv", _arguments(name, BATCH))

    def program(world: World) -> dict[str, np.ndarray]:
        here.world = world
        return _execute(run_examples.script(name), name)

    return run_in_threads(ranks, program)


def _assert_alike(ends: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert ends.keys() == expected.keys()
    for key, its in ends.items():
        np.testing.assert_allclose(its, expected[key], rtol=0, atol=1e-10, err_msg=key)


@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize(
    ("name", "ranks"),
    effort.daily(
        [(name, ranks) for name in OPTIONS for ranks in (1, 2, 3) if name not in ALONE or ranks == 1],
        [(name, 1 if name in ALONE else 2 + turn % 2) for turn, name in enumerate(OPTIONS)],
    ),
)
def test_ranks_end_with_the_weights_of_the_plain_script(
    name: str, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An example on N ranks ends with the weights of the plain script with N times the batch, to 1e-10, and
    prints its means."""
    expected = _plain(name, ranks, monkeypatch)
    for ends in _on_ranks(name, ranks, monkeypatch):
        _assert_alike(ends, expected)


@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize("calls", effort.daily([2, 4, 6, 9, 15, 20], [6]))
@pytest.mark.parametrize("name", sorted(OPTIONS.keys() - {"recurrent.py"} - ALONE))
def test_after_a_loss_others_end_with_the_weights_of_the_plain_script(
    name: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If rank 0 is killed, the other ends with the weights that the plain script has, if it takes over its
    batch."""
    expected = _plain(name, 2, monkeypatch)
    killed, ends = _on_ranks(name, 2, monkeypatch, calls)
    assert killed is Killed
    _assert_alike(ends, expected)


@pytest.mark.usefixtures("_repeatable")
@pytest.mark.parametrize("calls", effort.daily([6, 15], [6]))
def test_a_hidden_state_begins_anew_after_a_loss(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a rank is killed, the others go on with its part of the series, from an empty state in that epoch,
    and stay alike."""
    killed, *ends = _on_ranks("recurrent.py", 3, monkeypatch, calls)
    assert killed is Killed
    _assert_alike(ends[0], ends[1])
    expected = _plain("recurrent.py", 3, monkeypatch)
    assert (
        0 < np.abs(np.concatenate([(ends[0][key] - expected[key]).ravel() for key in expected])).max() < 0.05
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_few_lines_convert_a_script(name: str) -> None:
    """At most nine lines are new or changed in an example, as many as the page says; it has less than a
    hundred, and none of the plain script is about ranks."""
    lines = sum(change.lines for change in run_examples.changes(name))
    assert lines <= 9
    assert f"| `{name}` | {lines} |" in run_examples.PAGE.read_text()
    assert len(run_examples.script(name).splitlines()) < 100
    assert not re.search(r"rankwise|\brun\b", run_examples.plain(name).split('"""', 2)[2])


@pytest.mark.mpi
@pytest.mark.parametrize("name", effort.daily(["classifier.py", "compiled.py"], ["classifier.py"]))
def test_processes_end_with_the_weights_of_the_plain_script(
    name: str, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that are processes do too, with weights as torch draws them, and print what the script
    prints."""
    torch._dynamo.reset()
    monkeypatch.setattr(sys, "argv", _arguments(name, 2 * BATCH))
    try:
        expected = _execute(run_examples.plain(name), name)
    finally:
        torch.set_default_dtype(torch.float32)
    save = "\ntorch.save(model.state_dict(), f'{run.rank}.pt')\n"
    (tmp_path / name).write_text(run_examples.script(name) + save)
    done = command.mpiexec(2, *_arguments(name, BATCH), OMP_NUM_THREADS="1")
    assert done.code == 0, done
    epochs = OPTIONS[name][OPTIONS[name].index("--epochs") + 1]
    assert [line.split(":")[0] for line in done.out.splitlines()] == [
        f"epoch {n + 1}" for n in range(int(epochs))
    ], done
    for rank in range(2):
        for key, its in torch.load(tmp_path / f"{rank}.pt").items():
            np.testing.assert_allclose(
                its.numpy(), expected[f"model {key.removeprefix('_orig_mod.')}"], rtol=0, atol=1e-10
            )
