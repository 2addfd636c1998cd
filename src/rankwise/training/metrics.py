"""What a loop logs: means over the samples of all ranks, by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rankwise.comm import World
from rankwise.errors import ConfigError, OutOfStepError

Sums = dict[str, tuple[float, float]]
"""By name the sum of values times their weights, and the sum of the weights."""


class Metrics:
    """The values that one rank logs in an epoch.

    They belong to turns, known by increasing numbers, with others for what comes between two passes: a turn
    that begins again forgets what was logged in it before, and in later ones.
    """

    def __init__(self) -> None:
        self._turns: dict[float, Sums] = {0: {}}
        self._open = self._turns[0]

    def begin_epoch(self) -> None:
        """Nothing is logged yet."""
        self._turns = {}
        self.begin(0)

    def begin(self, turn: float) -> None:
        """A turn begins, or again."""
        for number in [number for number in self._turns if number >= turn]:
            del self._turns[number]
        if len(self._turns) > KEPT:
            first, second = sorted(self._turns)[:2]
            self._turns[second] = added(self._turns.pop(first), self._turns[second])
        self._open = self._turns[turn] = {}

    def go_on(self, turn: float, sums: Mapping[str, tuple[float, float]]) -> None:
        """Be behind a turn by whose end this had been logged."""
        self.begin(turn)
        self._open |= sums
        self.begin(turn + 0.5)

    def add(self, weight: float, values: Mapping[str, Any]) -> None:
        """Log values, numbers or tensors of one, each with this weight."""
        found = self._open
        for name, value in values.items():
            total, weights = found.get(name, NOTHING)
            found[name] = total + weighted(number_of(value, name), weight), weights + weight

    def last(self, name: str) -> float:
        """The sum of what was logged by this name in the turn that began last."""
        return self._open.get(name, NOTHING)[0]

    def sums(self, until: float = math.inf) -> Sums:
        """Of all turns of the epoch up to this one."""
        total: Sums = {}
        for number, its in self._turns.items():
            if number <= until:
                total = added(total, its)
        return total


KEPT = 2
"""Turns that may be made again."""

NOTHING = (0.0, 0.0)


def number_of(value: Any, name: str) -> float:
    """What is logged by a name. Raises ConfigError for what is no number."""
    try:
        return value.item() if hasattr(value, "item") else float(value)
    except (TypeError, ValueError, RuntimeError):
        shape = getattr(value, "shape", None)
        what = repr(value) if shape is None else f"a {type(value).__name__} of shape {list(shape)}"
        raise ConfigError(f"{name}={what} was given, expected a number or a tensor of one") from None


def weight_of(weight: float) -> float:
    """By how much something counts. Raises ConfigError for what is no number from 0."""
    number = number_of(weight, "weight")
    if not 0 <= number < math.inf:
        raise ConfigError(f"weight={number} was given, expected a number from 0")
    return number


def weighted(number: float, weight: float) -> float:
    """A number as it counts: not at all without weight, also if it is none, as a mean over nothing."""
    return number * weight if weight else 0.0


def added(first: Sums, second: Sums) -> Sums:
    """Both together."""
    total = dict(first)
    for name, (value, weight) in second.items():
        before = total.get(name, NOTHING)
        total[name] = before[0] + value, before[1] + weight
    return total


def means(sums: Sums, world: World) -> dict[str, float]:
    """The means over what all ranks have logged; all ranks together. Raises OutOfStepError if they logged
    other names."""
    names = sorted(sums)
    for rank, theirs in enumerate(world.allgather_object(names)):
        if theirs != names:
            ours, its = (", ".join(found) or "nothing" for found in (names, theirs))
            raise OutOfStepError(
                f"rank {world.rank} has logged {ours} in this epoch and rank {rank} {its}: log the same "
                "names on all ranks"
            )
    flat = np.array([sums[name] for name in names], np.float64).reshape(-1)
    if flat.size:
        world.allreduce(flat)
    return {
        name: value / weight if weight else float("nan")
        for name, (value, weight) in zip(names, flat.reshape(-1, 2).tolist(), strict=True)
    }
