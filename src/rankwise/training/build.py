"""A synchroniser from options: for a run, and for a loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Unpack

import numpy as np

from rankwise.comm import World
from rankwise.config import TrainConfig
from rankwise.data import partition
from rankwise.data.partition import Indices
from rankwise.data.sampler import Sampler
from rankwise.errors import ConfigError
from rankwise.strategies import entry_of, resolve
from rankwise.survival.fault_injection import NoFaults
from rankwise.training import batch_sizes, schedule
from rankwise.training.admission import JoinState
from rankwise.training.observer import Observer
from rankwise.training.options import LoopOptions
from rankwise.training.synchroniser import Synchroniser

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rankwise.models.replica import Replica


def dealing_of(
    config: TrainConfig, pool: Indices, labels: Indices
) -> Callable[[int, Sequence[int]], list[Indices]]:
    """The function (epoch, shares) -> shards, one per worker, over the samples `pool`, whose classes are
    `labels`."""
    assert config.strategy is not None
    replicates = entry_of(config.strategy).replicates

    def deal(epoch: int, shares: Sequence[int]) -> list[Indices]:
        if replicates:
            shards = partition.replicate(
                samples=len(pool), workers=len(shares), epoch=epoch, seed=config.seed
            )
        else:
            shards = partition.deal(
                config.shards, labels=labels, shares=shares, epoch=epoch, seed=config.seed
            )
        return [pool[shard] for shard in shards]

    return deal


def make_sampler(config: TrainConfig, pool: Indices, labels: Indices, rank: int) -> Sampler:
    """The sampler of `rank` for a resolved configuration."""
    assert config.strategy is not None
    return Sampler(
        dealing_of(config, pool, labels),
        rank=rank,
        first_worker=1 if config.has_master else 0,
        batch_sizes=batch_sizes.batch_sizes(config),
        sync_every=lambda epoch: _steps_per_round(config, epoch),
        keeps_global_batch=config.on_shrink == "keep-global-batch",
        syncs_every_step=entry_of(config.strategy).strategy.recovery.syncs_every_step,
    )


def _steps_per_round(config: TrainConfig, epoch: int) -> int | None:
    """Steps between synchronisations in an epoch, None for all of it."""
    if config.local_after is not None and epoch <= config.local_after * config.epochs:
        return 1
    return config.sync_every if isinstance(config.sync_every, int) else None


def make_replica(config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> Replica:
    """The replica of a rank for a resolved configuration."""
    from rankwise.models.average import Average
    from rankwise.models.replica import Replica

    average = None
    if config.averaged_weights != "none":
        average = Average(model, config.averaged_weights, decay=config.average_decay, epochs=config.epochs)
    return Replica(
        model,
        optimizer,
        share_optimizer_state=config.optimizer_state == "average",
        clip_norm=config.clip_norm,
        average=average,
    )


def build(
    config: TrainConfig,
    replica: Replica,
    pool: Indices,
    labels: Indices,
    world: World,
    *,
    faults: NoFaults | None = None,
    observer: Observer | None = None,
    join_state: JoinState | None = None,
) -> Synchroniser:
    """The synchroniser of a resolved configuration, over the samples `pool`, whose classes are `labels`. A
    rank that takes the place of a lost one begins from its `join_state`."""
    assert config.strategy is not None
    return Synchroniser(
        replica,
        entry_of(config.strategy).build(config),
        make_sampler(config, pool, labels, world.rank),
        world,
        rate_factor=schedule.scheduler(config),
        survives=config.on_failure == "continue" and world.size > 1,
        min_ranks=config.min_ranks,
        spares=config.spares,
        faults=faults,
        observer=observer,
        join_state=join_state,
    )


def synchronise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    samples: int,
    **options: Unpack[LoopOptions],
) -> Synchroniser:
    """Put a plain PyTorch loop in step with the other ranks of `world`.

    `samples` is the size of the training set. `options` are those of `rankwise train` that say how
    ranks work together (strategy, topology, sync_every, compress, optimizer_state, shards, batch_size,
    seed, on_failure and those of single strategies) and how the learning rate goes (epochs, schedule,
    lr_scaling, warmup, peak_at, final_lr_fraction, clip_norm), and averaged_weights; `LoopOptions` has them
    all. The rate itself is the optimiser's, and what an average holds is `replica.evaluated`.
    Raises ConfigError, one line, for an option that does not exist or does not fit.
    """
    config = resolve(TrainConfig(ranks=world.size, **options))
    schedule.check(config)
    batch_sizes.check(config)
    if config.balance == "measured":
        raise ConfigError("--balance measured is for rankwise train: give your loop the batches, N,N,...")
    if config.shards.startswith("dirichlet"):
        raise ConfigError("--shards dirichlet needs labels, which a loop of your own deals with itself")
    if samples < config.workers:
        raise ConfigError(f"{samples} samples cannot be dealt to {config.workers} workers: use fewer ranks")
    replica = make_replica(config, model, optimizer)
    return build(config, replica, np.arange(samples), np.zeros(samples, np.int64), world)
