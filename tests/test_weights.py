"""Trained weights that a run begins with (`--init`), and those that it keeps (`--keep best`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, ModelError, ResumeError
from rankwise.launch.order import Order, resumed
from rankwise.plan import initial_weights, make_plan
from rankwise.runs.checkpoint import finished
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.runs.weights import find_weights

from . import tiny

Train = Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]]
Config = Callable[..., Any]


def first_weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder.checkpoints / "epoch-0000" / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_begins_with_trained_weights(
    ranks: int, train_in_threads: Train, config: Config, tmp_path: Path
) -> None:
    """From a run's folder, and from a file of either kind; what --freeze names stays as it was trained."""
    _, first, trained = train_in_threads(config(epochs=3), folder="first")
    torch.save({"state_dict": trained}, tmp_path / "weights.pt")
    safetensors.torch.save_file(trained, tmp_path / "weights.safetensors")
    how = {"ranks": ranks, "topology": "allreduce"} if ranks > 1 else {}
    for at, source in enumerate((first.path, tmp_path / "weights.pt", tmp_path / "weights.safetensors")):
        init = str(initial_weights(str(source)).path)
        plan = config(init=init, epochs=1, freeze="1:1", checkpoint_keep=5, **how)
        record, folder, after = train_in_threads(plan, folder=f"next{at}")
        begun = first_weights(folder)
        assert all(torch.equal(begun[name], its) for name, its in trained.items())
        assert torch.equal(after["1.weight"], trained["1.weight"])
        assert not torch.equal(after["3.weight"], trained["3.weight"])
        assert record.config["init"] == init


def test_weights_of_another_network_are_refused_by_the_first_that_differs(
    train_in_threads: Train, config: Config
) -> None:
    """Before anything is trained, with both shapes."""
    _, first, _ = train_in_threads(config(epochs=1), folder="first")
    init = str(find_weights(first.path).path)
    with pytest.raises(
        ModelError,
        match=r"do not fit --model mlp: 1.weight has the shape \(26, 64\) there, and \(256, 64\) in",
    ):
        train_in_threads(config(init=init, model="mlp"), folder="mlp")
    with pytest.raises(ModelError, match=r"do not fit .*: they lack 4.weight, and have 3\.\w+"):
        train_in_threads(config(init=init, model=f"{__name__}:deeper"), folder="deeper")


def deeper() -> torch.nn.Module:
    """As the tiny network, with something between its layers."""
    net = tiny.net()
    return torch.nn.Sequential(*net[:3], torch.nn.Dropout(0.1), net[3])


def test_weights_that_are_not_there_are_one_line(
    train_in_threads: Train, config: Config, tmp_path: Path
) -> None:
    """A folder that does not exist, holds no run, or not that epoch; a file of another kind."""
    _, first, _ = train_in_threads(config(epochs=1), folder="first")
    (tmp_path / "notes.txt").write_text("no weights")
    for spec, said in {
        "firts": "firts does not exist",
        str(tmp_path / "notes.txt"): "is no file of weights: expected a run folder, or a file .safetensors",
        str(tmp_path): "has no weights: there is no finished checkpoint",
        f"{first.path}@bset": "expected RUN, RUN@best, RUN@EPOCH",
        f"{first.path}@7": "holds no checkpoint of epoch 7",
    }.items():
        with pytest.raises(ConfigError, match=said):
            make_plan(TrainConfig(dataset=tiny.DATASET, model=tiny.MODEL, init=spec))
    (tmp_path / "torn.safetensors").write_bytes(b"torn")
    with pytest.raises(ResumeError, match=r"torn.safetensors cannot be read as weights"):
        train_in_threads(config(init=str(tmp_path / "torn.safetensors")), folder="torn")


def test_a_run_that_goes_on_needs_its_first_weights_no_more(
    train_in_threads: Train, config: Config, tmp_path: Path
) -> None:
    """The file may be gone by then; to begin with others anew is refused."""
    _, first, trained = train_in_threads(config(epochs=1), folder="first")
    file = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(trained, file)
    record, folder, _ = train_in_threads(config(init=str(file), epochs=1), folder="next")
    file.unlink()
    longer, _, _ = train_in_threads(config(init=str(file), epochs=2), folder="next", resume=True)
    assert [row.epoch for row in longer.epochs] == [1, 2]
    with pytest.raises(ResumeError, match="--init"):
        resumed(Order(TrainConfig(init=str(first.path)), resume=folder.path), folder, record)


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_best_checkpoint_stays(ranks: int, train_in_threads: Train, config: Config) -> None:
    """Beside the newest two, whenever it was, also where --checkpoint-every leaves it out."""
    how = {"ranks": ranks, "topology": "allreduce"} if ranks > 1 else {}
    plan = config(epochs=7, lr=0.9, keep="best", checkpoint_every=3, **how)
    record, folder, _ = train_in_threads(plan)
    best = record.best.epoch
    assert best < 5, "a rate at which it becomes worse again"
    kept = [int(path.name.removeprefix("epoch-")) for path in finished(folder.checkpoints)]
    assert kept == [7, 6, best]
    found = find_weights(folder.path, "best")
    assert (found.epoch, found.accuracy) == (best, record.best.val_accuracy)
