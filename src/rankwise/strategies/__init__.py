"""Ways to keep ranks in step: one dict name -> strategy. Importing this does not import torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, unknown_name
from rankwise.strategies.averaging import ParameterAveraging, Replication
from rankwise.strategies.base import State, Strategy
from rankwise.strategies.single import Single
from rankwise.strategies.stopwatch import PaperStopwatch


@dataclass(frozen=True)
class Entry:
    """A strategy's class, its topologies (the first is the default) and what else it is made of."""

    strategy: type[Strategy]
    topologies: tuple[str, ...]
    sync_every: int | str | None
    options: tuple[str, ...] = field(default=())

    def build(self, config: TrainConfig) -> Strategy:
        """The strategy with this configuration's options."""
        values: dict[str, Any] = {name: getattr(config, name) for name in self.options}
        return self.strategy(**values)


_AVERAGING = {
    "topologies": ("master", "allreduce"),
    "sync_every": "epoch",
    "options": ("topology", "optimizer_state"),
}

STRATEGIES: dict[str, Entry] = {
    "single": Entry(Single, topologies=(), sync_every=None),
    "replication": Entry(Replication, **_AVERAGING),  # type: ignore[arg-type]
    "parameter-averaging": Entry(ParameterAveraging, **_AVERAGING),  # type: ignore[arg-type]
    "paper-stopwatch": Entry(PaperStopwatch, **_AVERAGING | {"topologies": ("master",)}),  # type: ignore[arg-type]
}


def resolve(config: TrainConfig) -> TrainConfig:
    """Fill in what depends on the strategy: its name, topology and interval. Raises ConfigError."""
    name = config.strategy or ("single" if config.ranks == 1 else "parameter-averaging")
    if name not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", name, STRATEGIES))
    entry = STRATEGIES[name]
    topology = config.topology or (entry.topologies[0] if entry.topologies else None)
    if topology is not None and topology not in entry.topologies:
        allowed = " or ".join(entry.topologies) or "none"
        raise ConfigError(f"--topology {topology} was given, but --strategy {name} takes {allowed}")
    if name == "single" and config.ranks > 1:
        raise ConfigError(
            f"--strategy single trains on one rank, but --ranks {config.ranks} was given: "
            "leave out --strategy, or use --ranks 1"
        )
    if name == "single" and config.sync_every is not None:
        raise ConfigError("--sync-every was given, but --strategy single has nobody to synchronise with")
    if topology == "master" and config.ranks == 1:
        raise ConfigError(
            "--ranks 1 with a master leaves nobody to train: use --ranks 2 or more, or --topology allreduce"
        )
    sync_every = config.sync_every or entry.sync_every
    return TrainConfig(
        **{**config.model_dump(), "strategy": name, "topology": topology, "sync_every": sync_every}
    )


__all__ = ["STRATEGIES", "Entry", "State", "Strategy", "resolve"]
