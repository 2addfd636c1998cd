"""One rank's part in keeping step: the batches it trains, and `step()`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.config import TrainConfig
from rankwise.data import partition
from rankwise.data.sampler import Batch, Sampler
from rankwise.errors import ConfigError
from rankwise.strategies import STRATEGIES, resolve
from rankwise.strategies.base import State, Strategy
from rankwise.world import World

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rankwise.models.replica import Replica


SETTLE_ROUNDS = 1024
"""Rounds, of which all ranks make the same number, after which logs are compared: an epoch of nothing but
messages has no exchange at which the world could do it by itself."""


class Synchroniser:
    """Joins a replica, a strategy and a sampler. The only point of synchronisation is `step()`::

        for batch in synchroniser.batches(epoch):
            optimizer.zero_grad()
            loss_of(batch.indices).backward()
            synchroniser.step()          # in place of optimizer.step()

    Ranks without work (a master, a worker whose shard has run out) take their part in the rounds
    while they iterate, and their loop body is not run.
    """

    def __init__(self, replica: Replica, strategy: Strategy, sampler: Sampler, world: World) -> None:
        self.replica = replica
        self.world = world
        self.sampler = sampler
        self._strategy = strategy
        self._batch: Batch | None = None
        self._rounds = 0
        self.state: State = strategy.init(replica, world)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that this rank trains in `epoch`, each to be followed by one `step()`."""
        for batch in self.sampler.batches(epoch):
            if self.world.stopping:
                # Go straight to the round's end, where the others learn that the run is to stop.
                batch = Batch(epoch, batch.indices[:0], True, np.zeros(self.world.size))
            if not len(batch):
                self._step(batch)
                continue
            self._batch = batch
            yield batch
            if self._batch is not None:
                raise RuntimeError("a batch was not followed by step(), and ranks would lose step")

    def step(self) -> None:
        """Use the gradients of the current batch, and synchronise if the strategy has it due now."""
        if self._batch is None:
            raise RuntimeError("step() stands alone: call it once in each turn of a loop over batches()")
        batch, self._batch = self._batch, None
        self._step(batch)

    def _step(self, batch: Batch) -> None:
        self.state = self._strategy.step(self.state, self.replica, batch, self.world)
        self.world.timeline.step(batch.epoch, len(batch))
        self._rounds += batch.ends_round
        if batch.ends_round and self._rounds % SETTLE_ROUNDS == 0:
            self.world.settle()


def shards_of(config: TrainConfig, pool: partition.Indices, labels: partition.Indices) -> Any:
    """The function epoch -> shards (one a worker) over the samples `pool`, whose classes are `labels`."""
    assert config.strategy is not None
    replicates = STRATEGIES[config.strategy].strategy.replicates

    def deal(epoch: int) -> list[partition.Indices]:
        if replicates:
            shards = partition.replicate(
                samples=len(pool), workers=config.workers, epoch=epoch, seed=config.seed
            )
        else:
            shards = partition.deal(
                config.shards, labels=labels, workers=config.workers, epoch=epoch, seed=config.seed
            )
        return [pool[shard] for shard in shards]

    return deal


def make_sampler(
    config: TrainConfig, pool: partition.Indices, labels: partition.Indices, rank: int
) -> Sampler:
    """The sampler of `rank` for a resolved configuration."""
    return Sampler(
        shards_of(config, pool, labels),
        rank=rank,
        first_worker=1 if config.has_master else 0,
        batch_size=config.batch_size,
        sync_every=config.sync_every if isinstance(config.sync_every, int) else None,
    )


def synchronise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    samples: int,
    **options: Any,
) -> Synchroniser:
    """Put a plain PyTorch loop in step with the other ranks of `world`.

    `samples` is the size of the training set. `options` are those of `rankwise train` that say how
    ranks work together: strategy, topology, sync_every, optimizer_state, shards, batch_size, seed.
    Raises ConfigError, one line, for an option that does not exist or does not fit.
    """
    from rankwise.models.replica import Replica

    config = resolve(TrainConfig(ranks=world.size, **options))
    if config.shards.startswith("dirichlet"):
        raise ConfigError("--shards dirichlet needs labels, which a loop of your own deals with itself")
    if samples < config.workers:
        raise ConfigError(f"{samples} samples cannot be dealt to {config.workers} workers: use fewer ranks")
    assert config.strategy is not None
    pool = np.arange(samples)
    return Synchroniser(
        Replica(model, optimizer, share_optimizer_state=config.optimizer_state == "average"),
        STRATEGIES[config.strategy].build(config),
        make_sampler(config, pool, np.zeros(samples, np.int64), world.rank),
        world,
    )
