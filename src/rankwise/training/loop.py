"""The loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional as F

from rankwise.comm import World
from rankwise.data.augmentation import Augmentation
from rankwise.data.dataset import Split
from rankwise.data.feed import Feed, feed
from rankwise.data.fingerprint import of_pool
from rankwise.data.partition import Indices
from rankwise.data.sampler import Batch
from rankwise.errors import DivergedError, Interrupted
from rankwise.models.evaluation import score
from rankwise.models.precision import autocast
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Place
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Epoch, Evaluated, Role
from rankwise.training.synchroniser import Synchroniser

EVALUATION_BATCH, SMALL = 500, 32
"""Images of SMALL x SMALL pixels in a forward pass of the evaluation; fewer of larger ones."""

Taken = tuple[Place, dict[str, Any]]
"""A rank's place inside an epoch, and what all ranks note alike."""

Take = Callable[[], Taken | None]
"""Takes it, if a run could go on from there."""


@dataclass(frozen=True)
class Job:
    """Everything that one rank trains with.

    `train` and `validation` are whole splits; the sampler's indices point into the first, and `val_pool`
    holds those of the second that all ranks evaluate together. `pool` are the indices of the samples
    that are trained. `data` is a fingerprint of the training split.
    """

    config: RunPlan
    synchroniser: Synchroniser
    train: Split
    validation: Split
    val_pool: Indices
    pool: Indices
    progress: ProgressFile
    data: str = ""

    @property
    def worker(self) -> int | None:
        """This rank's number among the workers, None for a master. It changes when ranks are lost."""
        world = self.synchroniser.world
        worker = world.rank - self.first_worker
        return worker if worker >= 0 else None

    @property
    def first_worker(self) -> int:
        """The lowest rank that trains; a master that is alone does."""
        return int(self.config.has_master and self.synchroniser.world.size > 1)

    @property
    def role(self) -> Role:
        """What this rank is in the record."""
        return "master" if self.worker is None else "worker"

    @property
    def notes(self) -> dict[str, Any]:
        """What a checkpoint is to know besides: which samples the run trains on."""
        return {"data": self.data}

    @property
    def how(self) -> dict[str, Any]:
        """How the ranks keep in step, and what an epoch is made of."""
        names = ("strategy", "topology", "sync_every", "local_after", "optimizer_state", "compress")
        return {name: getattr(self.config, name) for name in names}

    def take(self, under_way: UnderWay) -> Taken | None:
        """This rank's place in the epoch under way, and what all ranks note alike, if a run could go on from
        there; all ranks together."""
        inside = self.synchroniser.inside
        if not inside.is_a_place:
            return None
        place, of_all = inside.take(self.how, under_way.notes)
        return place, {**of_all, "samples": of_pool(self.pool)}

    def expected(self, epoch: int) -> Indices:
        """How often an epoch shall train each sample of the training split."""
        counts = np.zeros(len(self.train.labels), np.int64)
        counts[self.pool] = self.synchroniser.sampler.samples(epoch) // len(self.pool)
        return counts


@dataclass(frozen=True)
class EpochResult:
    """An epoch, alike on all ranks.

    `expected` is the number of samples to train, `duplicated` and `lost` count those that were trained too
    often and too seldom. `last` says that the run ends with it. It began at the monotonic second `start_s`.
    """

    epoch: Epoch
    expected: int
    duplicated: int
    lost: int
    last: bool
    start_s: float


class EpochObserver(Protocol):
    """Gets a report of each epoch; what else happens to a run goes to an `observer.Observer`."""

    def epoch_over(self, job: Job, result: EpochResult) -> None:
        """An epoch is over. If a rank is lost meanwhile, the same epoch may be reported again, and counts in
        place of the first."""

    def round_over(self, job: Job, epoch: int, step: int, take: Take) -> None:
        """A round is committed, with which this many steps of an epoch are over, and others are left. `take`
        gives the place."""

    def stopped(self, job: Job, take: Take) -> bool:
        """All ranks stop in this epoch, together. Where a rank is lost meanwhile, it is reported again."""


@dataclass
class UnderWay:
    """What a rank has of the epoch under way: the sum of the losses of `samples` samples. The epoch began at
    the monotonic second `start_s`, if it has not stood still since. `rate` is the last step's, if there was
    one."""

    start_s: float
    total: float = 0.0
    samples: int = 0
    rate: float | None = None

    @property
    def notes(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        seconds = time.monotonic() - self.start_s
        return {"total": self.total, "samples": self.samples, "seconds": seconds, "rate": self.rate}

    @classmethod
    def of(cls, notes: Sequence[Mapping[str, Any]]) -> UnderWay:
        """What a checkpoint kept of one rank, or several."""
        return cls(
            time.monotonic() - max((its["seconds"] for its in notes), default=0.0),
            sum(its["total"] for its in notes),
            sum(its["samples"] for its in notes),
            next((its["rate"] for its in notes if its["rate"] is not None), None),
        )


def train(
    job: Job,
    first_epoch: int,
    observer: EpochObserver,
    begun: UnderWay | None = None,
    draw_on: Callable[[], None] | None = None,
) -> None:
    """Train from `first_epoch`, which may have `begun`, to the last, or to the target accuracy; all ranks
    call it together. `draw_on` brings the generators of random numbers to where they were in it.

    `observer` gets a report of each epoch. Raises DivergedError, Interrupted, and RankLost where a
    lost rank ends the run.
    """
    synchroniser = job.synchroniser
    for number in range(first_epoch, job.config.epochs + 1):
        under_way, begun = begun or UnderWay(time.monotonic()), None

        def whole_epoch(number: int = number, under_way: UnderWay = under_way) -> bool:
            nonlocal draw_on
            train_epoch(job, number, under_way, draw_on)
            draw_on = None
            train_s = time.monotonic() - under_way.start_s
            evaluation = evaluate(job, number) if is_evaluated(job.config, number) else None
            evaluation_s = time.monotonic() - under_way.start_s - train_s
            result = summarise(job, number, under_way, evaluation, train_s, evaluation_s)
            observer.epoch_over(job, result)
            return result.last

        def round_over(batch: Batch, under_way: UnderWay = under_way) -> None:
            if batch.rounds_left:  # otherwise the epoch is over soon
                observer.round_over(job, batch.epoch, batch.step, partial(job.take, under_way))

        synchroniser.at_commit = round_over
        try:
            if synchroniser.retry_until_all(whole_epoch):
                return
        except Interrupted:
            take = partial(job.take, under_way)
            synchroniser.retry_until_all(partial(observer.stopped, job, take), fill=False)
            raise


def train_epoch(job: Job, epoch: int, under_way: UnderWay, draw_on: Callable[[], None] | None = None) -> None:
    """One pass over this rank's share, or over what is left of it; adds to what is under way."""
    config, synchroniser = job.config, job.synchroniser
    model = synchroniser.model
    ledger = synchroniser.world.ledger

    ledger.enter("data")
    # Every random number is drawn from seed, epoch and worker, or sample: a resumed run draws the same ones.
    seed = np.random.SeedSequence([config.seed, epoch, job.worker or 0]).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(seed[0]))  # ranks compute on CPUs: of no other device's
    if draw_on is not None:
        draw_on()
    augmentation = Augmentation(config.seed, epoch, config.flip, config.translate, config.cutout)
    batches = Feed(
        job.train,
        synchroniser.sampler.shard(epoch),
        augmentation=augmentation,
        height=config.resizing.height_in(epoch),
    )
    arithmetic = autocast(config.precision)
    job.progress.start(epoch)
    job.progress.add(under_way.samples, under_way.total)
    model.train()
    synchroniser.replica.freeze(config.freezing.frozen_in(epoch))

    ledger.enter("other")
    for step, batch in enumerate(synchroniser.batches(epoch), start=1):
        ledger.enter("data")
        images, labels = batches.take(batch.indices)

        ledger.enter("forward")
        with arithmetic:
            loss = F.cross_entropy(model(images), labels, label_smoothing=config.label_smoothing)

        ledger.enter("backward")
        synchroniser.replica.forget_gradients()
        torch.autograd.backward(loss)
        value = loss.item()
        if not math.isfinite(value):
            synchroniser.drop(
                f"the loss is {value} in epoch {epoch}, step {step}: try a smaller --lr than {config.lr}"
            )
            continue

        ledger.enter("optimizer")
        synchroniser.step()

        ledger.enter("other")
        under_way.total += value * len(batch)
        under_way.samples += len(batch)
        under_way.rate = synchroniser.replica.optimizer.param_groups[0]["lr"]
        job.progress.add(len(batch), value * len(batch))


def is_evaluated(config: RunPlan, epoch: int) -> bool:
    """Whether the network is evaluated after an epoch."""
    return epoch % config.evaluate_every == 0 or epoch == config.epochs


def evaluate(job: Job, epoch: int) -> tuple[float, int]:
    """The sum of the losses and the number of right answers on this rank's share of the validation samples,
    after an epoch."""
    tta = job.config.tta if epoch >= job.config.tta_from_epoch else "none"
    model, world = job.synchroniser.replica.evaluated, job.synchroniser.world
    evaluators = 1 if job.config.has_master else world.size
    shares = np.array_split(job.val_pool, evaluators)
    mine = shares[world.rank] if world.rank < evaluators else job.val_pool[:0]
    loss_sum, correct = 0.0, 0
    with (
        world.ledger.phase("evaluation"),
        job.synchroniser.faults.during("evaluation"),
        torch.no_grad(),  # tables that a model makes in inference mode could not be trained with
        autocast(job.config.precision),
    ):
        model.eval()
        for images, labels in feed(job.validation, mine, evaluation_batch(job.validation)):
            world.ledger.enter("evaluation")  # a sign of life
            scores = score(model, images, tta, job.config.tta_below)
            loss_sum += F.cross_entropy(scores, labels, reduction="sum").item()
            correct += int((scores.argmax(1) == labels).sum())
    return loss_sum, correct


def evaluation_batch(split: Split) -> int:
    """Images in a forward pass of the evaluation: as many as have the pixels of EVALUATION_BATCH small ones,
    so that memory, and the time between two signs of life, do not grow with the images."""
    _, height, width, _ = split.images.shape
    return max(1, min(EVALUATION_BATCH, EVALUATION_BATCH * SMALL**2 // int(height * width)))


def summarise(
    job: Job,
    epoch: int,
    under_way: UnderWay,
    evaluation: tuple[float, int] | None,
    train_s: float,
    evaluation_s: float,
) -> EpochResult:
    """Add up what all ranks did in the epoch under way; without an `evaluation` none was due. Raises
    DivergedError if the validation loss is not a number."""
    world = job.synchroniser.world
    val_loss_sum, correct = evaluation or (0.0, 0)
    sums = np.array([under_way.total, under_way.samples, val_loss_sum, correct], np.float64)
    world.allreduce(sums)
    expected = job.expected(epoch)
    counts = np.bincount(job.synchroniser.trained(), minlength=len(expected))
    trained, duplicated, lost = count_samples(world, counts, expected, job.config.seed)
    slowest = np.array([train_s, evaluation_s])
    world.allreduce(slowest, op="max")
    if not math.isfinite(sums[2]):
        raise DivergedError(f"the validation loss is {sums[2]} after epoch {epoch}: try a smaller --lr")
    # A sitting that found all steps made has an optimiser whose rate nobody has set yet.
    rate = under_way.rate
    if rate is None:  # of a rank that had none to make
        rate = job.synchroniser.replica.optimizer.param_groups[0]["lr"]
    row = Epoch(
        epoch=epoch,
        train_loss=sums[0] / sums[1] if sums[1] else None,  # all that trained in it were lost since
        train_samples=trained,
        steps=job.synchroniser.sampler.steps(epoch),
        learning_rate=rate,
        wall_s=0.0,
        train_s=float(slowest[0]),
        evaluation_s=float(slowest[1]),
    )
    last = epoch == job.config.epochs
    if evaluation is not None:
        n, target = len(job.val_pool), job.config.target_accuracy
        row = Evaluated(**{**dict(row), "val_loss": sums[2] / n, "val_accuracy": sums[3] / n})
        last = last or (target is not None and row.val_accuracy >= target)
    samples = job.synchroniser.sampler.samples(epoch)
    return EpochResult(row, samples, duplicated, lost, last, under_way.start_s)


def count_samples(world: World, counts: Indices, expected: Indices, seed: int) -> tuple[int, int, int]:
    """How many samples all ranks trained in an epoch, how many of them too often, and how many too seldom.

    `counts` [n] says how often this rank trained each sample, `expected` [n] how often all should. To
    prove that what all ranks trained is that, 8 bytes are enough: each sample has a random 64-bit
    number, and the sums of the numbers trained and expected agree, modulo 2**64, only for the same
    samples. If they do not, the counts themselves are added up.
    """
    numbers = np.random.default_rng(seed).integers(2**64, size=len(counts), dtype=np.uint64)
    fingerprint = np.array([np.sum(numbers * counts.astype(np.uint64))])
    world.allreduce(fingerprint)
    if fingerprint[0] == np.sum(numbers * expected.astype(np.uint64)):
        return int(expected.sum()), 0, 0
    total = counts.copy()
    world.allreduce(total)
    surplus = total - expected
    return int(total.sum()), int(surplus.clip(min=0).sum()), int(-surplus.clip(max=0).sum())
