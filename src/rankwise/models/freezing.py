"""Parameters that are not trained in the last epochs, which spares their backward pass.

FreezeOut: Brock et al. 2017, arXiv:1706.04983.
"""

from __future__ import annotations

from collections.abc import Iterable

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError


def frozen_in(config: TrainConfig, epoch: int) -> list[str]:
    """What the names of those that are frozen in an epoch begin with."""
    return [prefix for prefix, first in stages(config) if epoch >= first]


def stages(config: TrainConfig) -> list[tuple[str, int]]:
    """Prefix and first epoch of each part of `--freeze`. Raises ConfigError."""
    if config.freeze == "none":
        return []
    found = []
    for part in config.freeze.split(","):
        prefix, _, first = part.partition(":")
        if not (prefix and first.isdecimal() and int(first) > 0):
            raise ConfigError(
                f"--freeze {config.freeze} was given, expected none, or NAME:EPOCH,..., e.g. blocks.0:6 for "
                "parameters of blocks.0 that stay as they are from epoch 6 on"
            )
        found.append((prefix, int(first)))
    return found


def check(config: TrainConfig, names: Iterable[str]) -> None:
    """Raises ConfigError, one line, unless each part of `--freeze` fits some of the trained parameters with
    these names, and some are left."""
    names = list(names)
    prefixes = [prefix for prefix, _ in stages(config)]
    for prefix in prefixes:
        if not any(is_under(name, [prefix]) for name in names):
            raise ConfigError(
                f"--freeze {config.freeze}: {config.model} trains no parameter whose name begins with "
                f"{prefix}; it trains {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
            )
    if prefixes and all(is_under(name, prefixes) for name in names):
        raise ConfigError(f"--freeze {config.freeze} leaves nothing of {config.model} to train")


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a parameter's dotted name is one of these, or of a module with such a name."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
