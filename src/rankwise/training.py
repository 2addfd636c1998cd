"""The loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from rankwise.config import TrainConfig
from rankwise.data.dataset import Split
from rankwise.data.feed import feed
from rankwise.data.partition import Indices
from rankwise.errors import DivergedError
from rankwise.progress import Progress
from rankwise.record import Epoch
from rankwise.strategies.synchroniser import Synchroniser

EVALUATION_BATCH = 500
"""Samples a forward pass of the evaluation; a matter of speed alone."""


@dataclass(frozen=True)
class Job:
    """Everything that one rank trains with.

    `train` and `validation` are whole splits; the sampler's indices point into the first, and
    `val_pool` holds those of the second that this rank evaluates. `worker` counts the ranks that
    train, None for a master. `expected` [n] says how often an epoch shall train each sample.
    """

    config: TrainConfig
    synchroniser: Synchroniser
    train: Split
    validation: Split
    val_pool: Indices
    worker: int | None
    expected: Indices
    progress: Progress


@dataclass(frozen=True)
class EpochResult:
    """An epoch, what went wrong in its sample count, and whether it is the last one of the run."""

    epoch: Epoch
    duplicated: int
    lost: int
    last: bool


def train(job: Job, first_epoch: int, after_epoch: Callable[[EpochResult, float], None]) -> None:
    """Train from `first_epoch` to the last, or to the target accuracy; all ranks call it together.

    `after_epoch` gets each epoch's result, alike on all ranks, and the monotonic second at which
    the epoch started. Raises DivergedError, Interrupted.
    """
    for number in range(first_epoch, job.config.epochs + 1):
        start_s = time.monotonic()
        loss_sum, counts = train_epoch(job, number)
        train_s = time.monotonic() - start_s
        result = summarise(job, number, loss_sum, counts, evaluate(job), train_s)
        after_epoch(result, start_s)
        if result.last:
            return


def train_epoch(job: Job, epoch: int) -> tuple[float, Indices]:
    """One pass over this rank's share.

    Returns the sum of the losses of its samples, and how often it trained each sample [n].
    """
    config, synchroniser = job.config, job.synchroniser
    model, optimizer = synchroniser.model, synchroniser.replica.optimizer
    ledger = synchroniser.world.ledger

    ledger.enter("data")
    # Every random number is drawn from seed, epoch and worker: a resumed run draws the same ones.
    seed = np.random.SeedSequence([config.seed, epoch, job.worker or 0]).generate_state(2, np.uint64)
    torch.manual_seed(int(seed[0]))
    batches = feed(
        job.train,
        synchroniser.sampler.shard(epoch),
        config.batch_size,
        flip=config.flip,
        crop_padding=config.crop_padding,
        generator=torch.Generator().manual_seed(int(seed[1])),
    )
    loss_sum = 0.0
    trained: list[Indices] = []
    job.progress.start(epoch)
    model.train()

    ledger.enter("other")
    for step, batch in enumerate(synchroniser.batches(epoch), start=1):
        ledger.enter("data")
        images, labels = next(batches)

        ledger.enter("forward")
        loss = F.cross_entropy(model(images), labels)

        ledger.enter("backward")
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        value = loss.item()
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss is {value} in epoch {epoch}, step {step}: try a smaller --lr than {config.lr}"
            )

        ledger.enter("optimizer")
        synchroniser.step()

        ledger.enter("other")
        loss_sum += value * len(batch)
        trained.append(batch.indices)
        job.progress.add(len(batch), value * len(batch))
    counts = (
        np.bincount(np.concatenate(trained), minlength=len(job.expected)) if trained else 0 * job.expected
    )
    return loss_sum, counts


def evaluate(job: Job) -> tuple[float, int]:
    """Sum of the losses and number of right answers on this rank's share of the validation samples."""
    model = job.synchroniser.replica.model
    loss_sum, correct = 0.0, 0
    with job.synchroniser.world.ledger.phase("evaluation"), torch.inference_mode():
        model.eval()
        for images, labels in feed(job.validation, job.val_pool, EVALUATION_BATCH):
            scores = model(images)
            loss_sum += F.cross_entropy(scores, labels, reduction="sum").item()
            correct += int((scores.argmax(1) == labels).sum())
    return loss_sum, correct


def summarise(
    job: Job, epoch: int, loss_sum: float, counts: Indices, evaluation: tuple[float, int], train_s: float
) -> EpochResult:
    """Add up what all ranks did in the epoch."""
    world = job.synchroniser.world
    val_loss_sum, correct = evaluation
    sums = np.array([loss_sum, val_loss_sum, correct, len(job.val_pool)], np.float64)
    world.allreduce(sums)
    trained, duplicated, lost = count_samples(job, counts)
    slowest = np.array([train_s])
    world.allreduce(slowest, op="max")
    if not math.isfinite(sums[1]):
        raise DivergedError(f"the validation loss is {sums[1]} after epoch {epoch}: try a smaller --lr")
    row = Epoch(
        epoch=epoch,
        train_loss=sums[0] / trained,
        val_loss=sums[1] / sums[3],
        val_accuracy=sums[2] / sums[3],
        train_samples=trained,
        steps=job.synchroniser.sampler.steps(epoch),
        learning_rate=job.synchroniser.replica.optimizer.param_groups[0]["lr"],
        wall_s=0.0,
        train_s=float(slowest[0]),
    )
    target = job.config.target_accuracy
    last = epoch == job.config.epochs or (target is not None and row.val_accuracy >= target)
    return EpochResult(row, duplicated, lost, last)


def count_samples(job: Job, counts: Indices) -> tuple[int, int, int]:
    """How many samples all ranks trained in an epoch, how many of them too often, and how many too seldom.

    `counts` [n] says how often this rank trained each sample. To prove that the sum over all ranks is
    what it should be, 8 bytes are enough: each sample has a random 64-bit number, and the sums of the
    numbers trained and expected agree, modulo 2**64, only for the same samples. If they do not, the
    counts themselves are added up.
    """
    numbers = np.random.default_rng(job.config.seed).integers(2**64, size=len(counts), dtype=np.uint64)
    fingerprint = np.array([np.sum(numbers * counts.astype(np.uint64))])
    job.synchroniser.world.allreduce(fingerprint)
    if fingerprint[0] == np.sum(numbers * job.expected.astype(np.uint64)):
        return int(job.expected.sum()), 0, 0
    total = counts.copy()
    job.synchroniser.world.allreduce(total)
    surplus = total - job.expected
    return int(total.sum()), int(surplus.clip(min=0).sum()), int(-surplus.clip(max=0).sum())
