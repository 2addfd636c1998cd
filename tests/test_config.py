"""Options, their layers, and what is said of wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise import strategies
from rankwise.config import TrainConfig, preset_names, read_preset, read_toml
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "paramter-averaging"}, ["parameter-averaging"]),
        ({"strategy": "single", "ranks": 2}, ["--strategy single", "--ranks 2"]),
        ({"strategy": "parameter-averaging"}, ["--ranks 1 with a master"]),
        ({"topology": "master"}, ["--topology master", "single"]),
        ({"sync_every": 4}, ["--sync-every"]),
        ({"strategy": "gossip"}, ["gossip", "--ranks 1", "2 or more"]),
        ({"strategy": "easgd"}, ["--ranks 1 with a master"]),
        ({"strategy": "easgd", "ranks": 3, "topology": "allreduce"}, ["--topology allreduce", "master"]),
        ({"strategy": "gossip", "ranks": 3, "compress": "int8"}, ["--compress int8", "gossip", "allreduce"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "int9"}, ["int9", "int8"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "topk:2"}, ["topk:2", "at most 1"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "topk"}, ["topk", "topk:0.01"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "powersgd:0"}, ["powersgd:0", "at least 1"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "powersgd:1.5"}, ["powersgd:1.5"]),
        ({"strategy": "allreduce", "ranks": 3, "outer_lr": 1}, ["--outer-lr", "slowmo, diloco"]),
        ({"strategy": "allreduce", "ranks": 3, "bucket_mb": 1e9}, ["--bucket-mb", "MB of memory"]),
        ({"strategy": "allreduce", "ranks": 3, "optimizer_state": "reset"}, ["--optimizer-state reset"]),
        ({"strategy": "ddp", "ranks": 2, "sync_every": 4}, ["ddp", "--sync-every"]),
        ({"average_decay": 0.9}, ["--average-decay 0.9", "--averaged-weights"]),
        ({"strategy": "gossip", "ranks": 2, "averaged_weights": "ema"}, ["ema", "gossip", "allreduce"]),
        ({"strategy": "local-sgd", "ranks": 2, "averaged_weights": "lookahead"}, ["lookahead", "local-sgd"]),
        ({"strategy": "no_such_module:Thing", "ranks": 2}, ["no_such_module"]),
        ({"strategy": "collections:Counter", "ranks": 2}, ["collections:Counter", "Strategy"]),
        (
            {"strategy": "local-sgd", "ranks": 2, "compress": "sign", "optimizer_state": "average"},
            ["--compress", "--optimizer-state average"],
        ),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, object], words: list[str]) -> None:
    """Options that contradict each other are refused by name."""
    with pytest.raises(ConfigError) as caught:
        strategies.resolve(TrainConfig(**options))
    assert all(word in str(caught.value) for word in words), caught.value


def test_strategy_follows_the_ranks() -> None:
    """One rank trains alone; several average parameters with a master, each epoch."""
    assert strategies.resolve(TrainConfig()).strategy == "single"
    several = strategies.resolve(TrainConfig(ranks=4))
    assert (several.strategy, several.topology, several.sync_every, several.workers) == (
        "parameter-averaging",
        "master",
        "epoch",
        3,
    )
    assert strategies.resolve(several) == several


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    """Every recipe of the package is a configuration that resolves, and keeps all that it says."""
    recipe = read_preset(name)
    resolved = strategies.resolve(TrainConfig(**recipe))
    assert {option: getattr(resolved, option) for option in recipe} == recipe


def test_the_paper_preset_is_the_paper() -> None:
    """The preset `paper` holds the settings of the paper's Table 1 and of its code."""
    config = strategies.resolve(TrainConfig(**read_preset("paper")))
    assert (config.strategy, config.topology, config.shards) == ("parameter-averaging", "master", "fixed")
    assert (config.optimizer_state, config.threads, config.batch_size) == ("reset", "all", 16)


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
