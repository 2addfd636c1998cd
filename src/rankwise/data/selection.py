"""Which samples of a dataset a run trains on, and which it validates on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rankwise.config import TrainConfig
from rankwise.data.dataset import Dataset, Split
from rankwise.data.partition import Indices
from rankwise.errors import ConfigError


@dataclass(frozen=True)
class Selection:
    """`train_pool` are indices into the training split, `val_pool` into `validation`."""

    train_pool: Indices
    validation: Split
    val_pool: Indices


def select(config: TrainConfig, dataset: Dataset, *, workers: int = 1) -> Selection:
    """What the options choose. Raises ConfigError if one of the `workers` would go without a sample."""
    everything = np.arange(len(dataset.train))
    if config.validation_split is None:
        if not len(dataset.test):
            raise ConfigError(
                f"{dataset.name} has no images to validate on: hold some out with --validation-split 0.1"
            )
        train_pool, validation, val_pool = everything, dataset.test, np.arange(len(dataset.test))
    else:
        train_pool, val_pool = _hold_out(everything, config.validation_split, config.seed)
        validation = dataset.train
    train_pool = at_most(train_pool, config.train_limit, config.seed)
    if len(train_pool) < workers:
        raise ConfigError(
            f"{workers} workers were asked for, but there are {len(train_pool)} training samples: "
            "every worker needs one, use fewer --ranks"
        )
    return Selection(train_pool, validation, at_most(val_pool, config.val_limit, config.seed))


def _hold_out(pool: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """A seeded split into what trains and what validates, each at least one sample."""
    if len(pool) < 2:
        raise ConfigError(f"--validation-split needs at least 2 training samples, there are {len(pool)}")
    order = np.random.default_rng([seed, 6]).permutation(pool)
    held = min(max(round(len(pool) * fraction), 1), len(pool) - 1)
    return np.sort(order[held:]), np.sort(order[:held])


def at_most(pool: Indices, limit: int | None, seed: int) -> Indices:
    """A seeded choice of `limit` of these samples, or all of them."""
    if limit is None or limit >= len(pool):
        return pool
    return np.sort(np.random.default_rng([seed, 7]).permutation(pool)[:limit])
