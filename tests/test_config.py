"""Options, their layers, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.config import TrainConfig, read_preset, read_toml
from rankwise.errors import ConfigError


def test_defaults_are_the_papers() -> None:
    """Without options a run has the paper's settings, on one rank."""
    config = TrainConfig()
    assert (config.dataset, config.model, config.batch_size, config.epochs) == (
        "cifar10",
        "paper-cnn",
        16,
        25,
    )
    assert (config.lr, config.momentum, config.optimizer) == (0.001, 0.9, "sgd")


def test_layers() -> None:
    """What is given wins over the first layer, which wins over the next, which wins over defaults."""
    config = TrainConfig(lr=1.0).over({"lr": 2.0, "epochs": 3}, {"epochs": 4, "batch_size": 5})
    assert (config.lr, config.epochs, config.batch_size, config.momentum) == (1.0, 3, 5, 0.9)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, ["--batch-size", "0", "greater than or equal to 1"]),
        ({"epochs": -1}, ["--epochs", "-1"]),
        ({"lr": "fast"}, ["--lr", "fast", "number"]),
        ({"lr": float("nan")}, ["--lr", "nan"]),
        ({"lr": 0}, ["--lr", "0", "greater than 0"]),
        ({"momentum": 1}, ["--momentum", "less than 1"]),
        ({"topology": "star"}, ["--topology", "'master', 'allreduce'", "'complete'"]),
        ({"sync_every": "never"}, ["--sync-every", "integer", "'epoch'"]),
        ({"sync_every": 0}, ["--sync-every", "0", "greater than 0"]),
        ({"threads": 0}, ["--threads", "0", "'auto' or 'all'"]),
        ({"target_accuracy": 94}, ["--target-accuracy", "94", "less than or equal to 1"]),
        ({"validation_split": 1.0}, ["--validation-split"]),
        ({"learning_rate": 1}, ["learning_rate"]),
        ({"batchsize": 1}, ["batchsize", "batch_size"]),
    ],
)
def test_wrong_values_get_one_clear_line(options: dict[str, object], words: list[str]) -> None:
    """A wrong value is one line that names the option, what was given and what was expected."""
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**options)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_toml_files(tmp_path: Path) -> None:
    """A TOML file takes the options' names with dashes or underscores."""
    path = tmp_path / "run.toml"
    path.write_text('batch-size = 4\ntrain_limit = 10\nsync-every = "epoch"\n')
    assert read_toml(path) == {"batch_size": 4, "train_limit": 10, "sync_every": "epoch"}


@pytest.mark.parametrize("content", ["epochs = ", "epoch = 3", b"\xff\xfe", None])
def test_bad_toml_files(tmp_path: Path, content: str | bytes | None) -> None:
    """A file that is missing, no TOML, no text, or with an unknown option is refused with its path."""
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"run\.toml"):
        read_toml(path)


def test_unknown_preset() -> None:
    """An unknown preset is answered with the nearest name."""
    with pytest.raises(ConfigError, match="did you mean 'paper'"):
        read_preset("papers")
