"""Parameters that are not trained in the last epochs, which spares their backward pass.

FreezeOut: Brock et al. 2017, arXiv:1706.04983.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rankwise.errors import ConfigError


@dataclass(frozen=True)
class Freezing:
    """Prefix of names, and first epoch, of each part of `--freeze`; none if all parameters always train."""

    parts: tuple[tuple[str, int], ...] = ()

    @property
    def prefixes(self) -> list[str]:
        """What the names of those begin with that are frozen at some time."""
        return [prefix for prefix, _ in self.parts]

    def frozen_in(self, epoch: int) -> list[str]:
        """What the names of those that are frozen in an epoch begin with."""
        return [prefix for prefix, first in self.parts if epoch >= first]

    def check(self, model: str, names: Sequence[str]) -> None:
        """Raises ConfigError, one line, unless each part fits some of the trained parameters of `model` with
        these names, and some are left."""
        for prefix in self.prefixes:
            if not any(is_under(name, [prefix]) for name in names):
                raise ConfigError(
                    f"--freeze {self}: {model} trains no parameter whose name begins with "
                    f"{prefix}; it trains {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}"
                )
        if self.parts and all(is_under(name, self.prefixes) for name in names):
            raise ConfigError(f"--freeze {self} leaves nothing of {model} to train")

    def __str__(self) -> str:
        return ",".join(f"{prefix}:{first}" for prefix, first in self.parts) or "none"


@functools.cache
def parse_freeze(text: str) -> Freezing:
    """``none``, or ``NAME:EPOCH,...``. Raises ConfigError, one line."""
    if text == "none":
        return Freezing()
    found = []
    for part in text.split(","):
        prefix, _, first = part.partition(":")
        if not (prefix and first.isdecimal() and int(first) > 0):
            raise ConfigError(
                f"--freeze {text} was given, expected none, or NAME:EPOCH,..., e.g. blocks.0:6 for "
                "parameters of blocks.0 that stay as they are from epoch 6 on"
            )
        found.append((prefix, int(first)))
    return Freezing(tuple(found))


def is_under(name: str, prefixes: Iterable[str]) -> bool:
    """Whether a parameter's dotted name is one of these, or of a module with such a name."""
    return any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes)
