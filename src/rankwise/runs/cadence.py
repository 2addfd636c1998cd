"""How often checkpoints are written."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from rankwise.errors import ConfigError

UNITS: dict[str, Literal["epochs", "steps", "s"]] = {
    "": "epochs",
    "epoch": "epochs",
    "epochs": "epochs",
    "step": "steps",
    "steps": "steps",
    "s": "s",
}


@dataclass(frozen=True)
class Every:
    """`count` epochs, steps of the worker that makes the most, or seconds."""

    count: int
    unit: Literal["epochs", "steps", "s"]

    @property
    def epochs(self) -> int:
        """Epochs from one checkpoint to the next, if they go by epochs; otherwise 1, as a guess."""
        return self.count if self.unit == "epochs" else 1


@functools.cache
def parse_every(text: str | int) -> Every:
    """``2`` or ``2epochs``, ``500steps``, ``60s``. Raises ConfigError, one line, for anything else."""
    found = re.fullmatch(r"(\d{1,12}) ?([a-z]*)", str(text).strip())
    if found is None or found[2] not in UNITS or not int(found[1]):
        raise ConfigError(
            f"--checkpoint-every {text} was given, expected a whole number from 1 of epochs, steps or "
            "seconds, such as 2epochs, 500steps or 60s; a bare number counts epochs"
        )
    return Every(int(found[1]), UNITS[found[2]])
