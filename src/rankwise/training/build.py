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
from rankwise.plan import RunPlan, resolve
from rankwise.survival.fault_injection import NoFaults
from rankwise.training import schedule
from rankwise.training.admission import JoinState
from rankwise.training.agreement import require_same_model, require_same_options
from rankwise.training.observer import Observer
from rankwise.training.options import LoopOptions
from rankwise.training.synchroniser import Synchroniser

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rankwise.models.replica import Replica


def dealing_of(
    plan: RunPlan, pool: Indices, labels: Indices, *, least: int = 1
) -> Callable[[int, Sequence[int]], list[Indices]]:
    """The function (epoch, shares) -> shards, one per worker and of at least so many samples if there are
    enough, over the samples `pool`, whose classes are `labels`."""
    how, replicates = plan.dealing, plan.entry.replicates

    def deal(epoch: int, shares: Sequence[int]) -> list[Indices]:
        if replicates:
            shards = partition.replicate(samples=len(pool), workers=len(shares), epoch=epoch, seed=plan.seed)
        else:
            shards = partition.deal(
                how, labels=labels, shares=shares, epoch=epoch, seed=plan.seed, least=least
            )
        return [pool[shard] for shard in shards]

    return deal


def make_sampler(
    plan: RunPlan, pool: Indices, labels: Indices, rank: int, *, needs_pairs: bool = False
) -> Sampler:
    """The sampler of `rank` over the samples `pool`, whose classes are `labels`; with `needs_pairs` it gives
    no batch of one sample that it can do without."""
    return Sampler(
        dealing_of(plan, pool, labels, least=2 if needs_pairs else 1),
        rank=rank,
        first_worker=1 if plan.has_master else 0,
        batch_sizes=plan.batch_sizes,
        sync_every=lambda epoch: _steps_per_round(plan, epoch),
        keeps_global_batch=plan.on_shrink == "keep-global-batch",
        syncs_every_step=plan.entry.strategy.recovery.syncs_every_step,
        needs_pairs=needs_pairs,
    )


def _steps_per_round(plan: RunPlan, epoch: int) -> int | None:
    """Steps between synchronisations in an epoch, None for all of it."""
    if plan.local_after is not None and epoch <= plan.local_after * plan.epochs:
        return 1
    return plan.sync_every if isinstance(plan.sync_every, int) else None


def make_replica(
    plan: RunPlan, model: nn.Module, optimizer: torch.optim.Optimizer, *, needs_pairs: bool = False
) -> Replica:
    """The replica of a rank, whose model perhaps cannot train on a single sample (`needs_pairs`)."""
    from rankwise.models.average import Average
    from rankwise.models.replica import Replica

    average = None
    if plan.averaged_weights != "none" and plan.average_decay is not None:
        average = Average(model, plan.averaged_weights, decay=plan.average_decay, epochs=plan.epochs)
    return Replica(
        model,
        optimizer,
        share_optimizer_state=plan.optimizer_state == "average",
        clip_norm=plan.clip_norm,
        average=average,
        needs_pairs=needs_pairs,
    )


def build(
    plan: RunPlan,
    replica: Replica,
    pool: Indices,
    labels: Indices,
    world: World,
    *,
    faults: NoFaults | None = None,
    observer: Observer | None = None,
    join_state: JoinState | None = None,
    is_refilled: bool = False,
) -> Synchroniser:
    """The synchroniser of a plan, over the samples `pool`, whose classes are `labels`. A rank that takes the
    place of a lost one begins from its `join_state`. With fewer ranks left than the plan wants the run ends,
    unless it `is_refilled`."""
    return Synchroniser(
        replica,
        plan.entry.build(plan),
        make_sampler(plan, pool, labels, world.rank, needs_pairs=replica.needs_pairs),
        world,
        rate_factor=schedule.scheduler(plan),
        survives=plan.on_failure == "continue" and world.size > 1,
        min_ranks=1 if is_refilled else plan.min_ranks,
        spares=plan.spares,
        keeps_copies=plan.keep_copies,
        faults=faults,
        observer=observer,
        join_state=join_state,
    )


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a model normalises by its batch, for which one sample may be too few."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in model.modules())


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
    Ranks compare what they were given: options, and names, shapes and order of parameters and buffers.
    Raises ConfigError, one line, for an option that does not exist, does not fit, or differs between ranks,
    and ModelError for a model that cannot be kept in step, or differs.
    """
    require_same_options(world, {"samples": samples, **options})
    plan = resolve(TrainConfig(ranks=world.size, **options))
    if plan.balance == "measured":
        raise ConfigError("--balance measured is for rankwise train: give your loop the batches, N,N,...")
    if plan.dealing.kind == "dirichlet":
        raise ConfigError("--shards dirichlet needs labels, which a loop of your own deals with itself")
    if samples < plan.workers:
        raise ConfigError(f"{samples} samples cannot be dealt to {plan.workers} workers: use fewer ranks")
    require_same_model(world, model, optimizer)
    replica = make_replica(plan, model, optimizer, needs_pairs=has_batch_norm(model))
    return build(plan, replica, np.arange(samples), np.zeros(samples, np.int64), world)
