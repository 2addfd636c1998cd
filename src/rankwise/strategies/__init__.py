"""Ways to keep ranks in step: one dict name -> strategy. Importing this does not import torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, unknown_name
from rankwise.strategies.asynchronous import EASGD, Downpour
from rankwise.strategies.averaging import ParameterAveraging
from rankwise.strategies.base import State, Strategy
from rankwise.strategies.ddp import DDP
from rankwise.strategies.gossip import Gossip
from rankwise.strategies.gradients import GradientAveraging
from rankwise.strategies.hierarchical import Hierarchical
from rankwise.strategies.paper_exchange import PaperExchange
from rankwise.strategies.recovery import Recovery
from rankwise.strategies.single import Single
from rankwise.strategies.traffic import Barrier, Collective, Messages, ModelSize, Neighbours, Server, Traffic
from rankwise.system.user_code import import_from

OPTIONS = {
    "optimizer_state": "keep",
    "compress": "none",
    "local_after": None,
    "outer_lr": None,
    "outer_momentum": None,
    "elasticity": None,
    "max_staleness": None,
    "bucket_mb": None,
    "sync_across_hosts": None,
}
"""Options that only some strategies take, each with the value that asks for nothing."""


@dataclass(frozen=True)
class Entry:
    """A strategy under one of its names.

    It takes those of OPTIONS for which the class has a field, without what it `hides`. `settings` are
    values of fields under this name, which the user's options override. `topologies` (the first is the
    default) and `sync_every` are the class's own unless given. With `replicates` every worker trains on all
    samples instead of a shard; with `local_after` all epochs before that part of the run are synchronous.
    """

    strategy: type[Strategy[Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    topologies: tuple[str, ...] = ()
    sync_every: int | str | None = None
    replicates: bool = False
    local_after: float | None = None
    hides: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "topologies", self.topologies or self.strategy.topologies)
        object.__setattr__(self, "sync_every", self.sync_every or self.strategy.sync_every)

    def takes(self, option: str) -> bool:
        """Whether an option of OPTIONS means anything to it."""
        if option == "local_after":
            return self.local_after is not None
        return option in self._fields and option not in self.hides

    def build(self, config: TrainConfig) -> Strategy[Any]:
        """The strategy with this configuration's options."""
        given = {name: getattr(config, name, None) for name in self._fields if name not in self.hides}
        chosen = {name: value for name, value in given.items() if value is not None}
        return self.strategy(**{**self.settings, **chosen})

    @property
    def _fields(self) -> list[str]:
        return [field.name for field in dataclasses.fields(self.strategy)]  # type: ignore[arg-type]


_OUTER = ("outer_lr", "outer_momentum")
_LOCAL: dict[str, Any] = {"topologies": ("allreduce", "master"), "sync_every": 8}

STRATEGIES: dict[str, Entry] = {
    "single": Entry(Single),
    "parameter-averaging": Entry(ParameterAveraging, hides=_OUTER),
    "replication": Entry(ParameterAveraging, replicates=True, hides=_OUTER),
    "paper-stopwatch": Entry(PaperExchange, hides=(*_OUTER, "compress")),
    "allreduce": Entry(GradientAveraging, topologies=("allreduce",)),
    "gradient-server": Entry(GradientAveraging, topologies=("master",), hides=("bucket_mb",)),
    "local-sgd": Entry(ParameterAveraging, **_LOCAL, hides=_OUTER),
    "post-local-sgd": Entry(ParameterAveraging, **_LOCAL, hides=_OUTER, local_after=0.5),
    "slowmo": Entry(ParameterAveraging, {"outer_lr": 1.0, "outer_momentum": 0.7, "by_rate": True}, **_LOCAL),
    "diloco": Entry(
        ParameterAveraging,
        {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov_outside": True},
        **_LOCAL | {"sync_every": 32},
    ),
    "two-level": Entry(Hierarchical, hides=_OUTER),
    "easgd": Entry(EASGD),
    "downpour": Entry(Downpour),
    "gossip": Entry(Gossip),
    "ddp": Entry(DDP),
}


def entry_of(name: str) -> Entry:
    """The strategy of this name, or a user's own, ``module:Class``. Raises ConfigError."""
    if name in STRATEGIES:
        return STRATEGIES[name]
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise ConfigError(unknown_name("strategy", name, [*STRATEGIES, "module:Class"]))
    found = import_from(name, "strategy", ConfigError)
    fits = isinstance(found, type) and issubclass(found, Strategy) and dataclasses.is_dataclass(found)
    if not fits:
        raise ConfigError(
            f"--strategy {name}: expected a dataclass that is a rankwise.strategies.Strategy, got {found!r}"
        )
    _require_new_names(name, found)
    return Entry(found)


_OLD_NAMES: dict[str, tuple[object, str]] = {
    "survives": (False, "recovery = Recovery.FAIL_STOP"),
    "syncs_every_step": (True, "recovery = Recovery.ROLL_BACK"),
    "in_lockstep": (True, "recovery = Recovery.ROLL_BACK"),
    "synchronous": (False, "recovery = Recovery.ASYNCHRONOUS"),
    "in_step": (False, "recovery = Recovery.ASYNCHRONOUS"),
    "keeps_local_work": (False, "recovery = Recovery.DROP_ROUND"),
}
"""Attributes that strategies had, each with the value that said something, and what says it now."""


def _require_new_names(name: str, strategy: type[Strategy[Any]]) -> None:
    """Raises ConfigError for a user's strategy that is written for an older rankwise."""
    missing = object()
    if (arrays := getattr(strategy, "alike", missing)) is not missing:
        raise ConfigError(
            f"--strategy {name}: alike = {arrays!r} was given, which is replicated now: write "
            f"replicated = {arrays!r}"
        )
    for old, (value, new) in _OLD_NAMES.items():
        if (given := getattr(strategy, old, missing)) is not missing:
            write = f"write {new}" if given == value else "leave it out"
            raise ConfigError(
                f"--strategy {name}: {old} = {given!r} was given, which is part of recovery now: {write}"
            )


__all__ = [
    "OPTIONS",
    "STRATEGIES",
    "Barrier",
    "Collective",
    "Entry",
    "Messages",
    "ModelSize",
    "Neighbours",
    "Recovery",
    "Server",
    "State",
    "Strategy",
    "Traffic",
    "entry_of",
]
