"""One rank's part in keeping step: the batches it trains, and `step()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.checkpoint import Checkpoint
from rankwise.config import TrainConfig
from rankwise.data import partition
from rankwise.data.sampler import Batch, Sampler
from rankwise.errors import ConfigError
from rankwise.schedule import scheduler
from rankwise.strategies import entry_of, resolve
from rankwise.strategies.base import State, Strategy
from rankwise.world import World

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rankwise.models.replica import Replica, Snapshot


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
    while they iterate, and their loop body is not run. `rate_factor` says, from how many epochs are over,
    what the learning rates that the optimiser came with are multiplied by.

    With `undoable` the last step that was committed can be taken back by `undo`.
    """

    def __init__(
        self,
        replica: Replica,
        strategy: Strategy,
        sampler: Sampler,
        world: World,
        *,
        rate_factor: Callable[[float], float] | None = None,
        undoable: bool = False,
    ) -> None:
        self.replica = replica
        self.world = world
        self.sampler = sampler
        self._strategy = strategy
        self._batch: Batch | None = None
        self._rounds = 0
        self._rate_factor = rate_factor
        self._rates = [group["lr"] for group in replica.optimizer.param_groups]
        self._undoable = undoable
        self._before: tuple[State, Snapshot] | None = None
        self.state: State = strategy.init(replica, world)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that this rank trains in `epoch`, each to be followed by one `step()`."""
        self.state = self._strategy.open_epoch(self.state, self.replica, self.world)
        for batch in self.sampler.batches(epoch):
            if self.world.stopping:
                # Go straight to the round's end, where the others learn that the run is to stop.
                if not batch.ends_round:
                    continue
                batch = replace(batch, indices=batch.indices[:0], share=0.0)
            self._set_rates(batch.position)
            self._strategy.expect(self.state, self.replica, batch, self.world)
            if not len(batch):
                self._step(batch)
                continue
            self._batch = batch
            yield batch
            if self._batch is not None:
                raise RuntimeError("a batch was not followed by step(), and ranks would lose step")
        weights = self.sampler.weights(epoch)
        self.state = self._strategy.close_epoch(self.state, self.replica, weights, self.world)

    def step(self) -> None:
        """Use the gradients of the current batch, and synchronise if the strategy has it due now."""
        if self._batch is None:
            raise RuntimeError("step() stands alone: call it once in each turn of a loop over batches()")
        batch, self._batch = self._batch, None
        self._step(batch)

    def resume(self, checkpoint: Checkpoint, worker: int | None) -> None:
        """Go on from a checkpoint; `worker` is this rank's number among workers, None for a master."""
        checkpoint.restore(self.replica, 0 if self.shares_optimizer else worker)
        memory, rounds = checkpoint.memory_of(self.world.rank), checkpoint.notes.get("rounds", 0)
        self.state = replace(self.state, memory=memory, rounds=rounds)

    @property
    def model(self) -> nn.Module:
        """What a loop calls: the replica's model, unless the strategy wraps it, as ddp does."""
        return self.replica.module

    @property
    def shares_optimizer(self) -> bool:
        """Whether rank 0's optimiser state is that of all ranks."""
        return self._strategy.shares_optimizer

    def undo(self) -> None:
        """Take the last committed step back: replica and state are as they were when its exchange began."""
        if self._before is None:
            raise RuntimeError("there is no step to undo")
        self.state, snapshot = self._before
        snapshot.restore()
        self._before = None

    def _step(self, batch: Batch) -> None:
        strategy, replica, world = self._strategy, self.replica, self.world
        self.state = strategy.train(self.state, replica, batch, world)
        if batch.ends_round:
            if self._undoable:
                with world.ledger.phase("recovery"):
                    self._before = self.state, replica.snapshot()
            prepared = strategy.prepare(self.state, replica, batch, world)
            self.state = strategy.commit(self.state, replica, prepared, world)
        world.timeline.step(batch.epoch, len(batch))
        self._rounds += batch.ends_round
        if batch.ends_round and self._rounds % SETTLE_ROUNDS == 0:
            world.settle()

    def _set_rates(self, position: float) -> None:
        if self._rate_factor is not None:
            factor = self._rate_factor(position)
            for group, rate in zip(self.replica.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor


def shards_of(config: TrainConfig, pool: partition.Indices, labels: partition.Indices) -> Any:
    """The function epoch -> shards (one a worker) over the samples `pool`, whose classes are `labels`."""
    assert config.strategy is not None
    replicates = entry_of(config.strategy).replicates

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
        sync_every=lambda epoch: _steps_a_round(config, epoch),
    )


def _steps_a_round(config: TrainConfig, epoch: int) -> int | None:
    """Steps between synchronisations in an epoch, None for all of it."""
    if config.local_after is not None and epoch <= config.local_after * config.epochs:
        return 1
    return config.sync_every if isinstance(config.sync_every, int) else None


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
    ranks work together (strategy, topology, sync_every, compress, optimizer_state, shards, batch_size,
    seed and those of single strategies) and how the learning rate goes (epochs, schedule, lr_scaling,
    warmup, clip_norm); the rate itself is the optimiser's.
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
        Replica(
            model,
            optimizer,
            share_optimizer_state=config.optimizer_state == "average",
            clip_norm=config.clip_norm,
        ),
        entry_of(config.strategy).build(config),
        make_sampler(config, pool, np.zeros(samples, np.int64), world.rank),
        world,
        rate_factor=scheduler(config),
    )
