"""The loop of `rankwise train` on one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from rankwise.data.augmentation import Augmentation
from rankwise.data.dataset import Split
from rankwise.data.feed import Feed, feed
from rankwise.data.fingerprint import of_pool
from rankwise.data.partition import Indices
from rankwise.errors import DivergedError, Interrupted, ResumeError
from rankwise.models.evaluation import score
from rankwise.models.precision import autocast
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.progress import NoProgress
from rankwise.training.book import Book
from rankwise.training.counting import count_samples
from rankwise.training.history import SampleCounts
from rankwise.training.job import Job, Taken

EVALUATION_BATCH, SMALL = 500, 32
"""Images of SMALL x SMALL pixels in a forward pass of the evaluation; fewer of larger ones."""


@dataclass
class UnderWay:
    """What a rank has of the epoch under way: the sum of the losses of `samples` samples, for how many
    `seconds` it was trained, and the last step's `rate`, if there was one. `draw_on` brings the generators of
    random numbers to where they were, before it goes on."""

    total: float = 0.0
    samples: int = 0
    rate: float | None = None
    seconds: float = 0.0
    draw_on: Callable[[], None] | None = None


@dataclass
class ImageJob(Job):
    """Everything that one rank of `rankwise train` trains with.

    `train` and `validation` are whole splits; the sampler's indices point into the first, and `val_pool`
    holds those of the second that all ranks evaluate together. `pool` are the indices of the samples
    that are trained. `data` is a fingerprint of the training split.
    """

    train: Split
    validation: Split
    val_pool: Indices
    pool: Indices
    progress: NoProgress
    data: str = ""
    under_way: UnderWay = field(default_factory=UnderWay)

    @property
    def notes(self) -> dict[str, Any]:
        """Which samples the run trains on."""
        return {"data": self.data}

    def count(self, epoch: int) -> SampleCounts:
        """The samples of an epoch; all ranks together."""
        synchroniser = self.synchroniser
        expected = np.zeros(len(self.train.labels), np.int64)
        expected[self.pool] = synchroniser.sampler.samples(epoch) // len(self.pool)
        counts = np.bincount(synchroniser.trained(), minlength=len(expected))
        return count_samples(synchroniser.world, counts, expected, self.config.seed)

    def take(self, elapsed_s: float) -> Taken | None:
        inside, its = self.synchroniser.inside, self.under_way
        if not inside.is_a_place:
            return None
        notes = {"total": its.total, "samples": its.samples, "rate": its.rate, "elapsed": elapsed_s}
        place, of_all = inside.take(self.how, notes)
        return place, {**of_all, "samples": of_pool(self.pool)}

    def resume(self, start: Checkpoint) -> None:
        """Raises ResumeError if the checkpoint is of a run with other training samples."""
        if start.notes.get("data", self.data) != self.data:
            raise ResumeError(
                f"{start.path} was trained on other samples than {self.config.dataset} has now: give the "
                "data that it had, or start a new run"
            )
        found = of_pool(self.pool)
        expected = str(start.inside["samples"]) if start.inside else found
        if expected != found:
            raise ResumeError(
                f"{start.path} is from inside an epoch of {expected.split()[0]} training samples, and these "
                f"are {found.split()[0]} or others: leave --train-limit, --validation-split and --seed as "
                "they were"
            )

    def resume_inside(
        self, start: Checkpoint, found: Sequence[Mapping[str, Any]], draw_on: Callable[[], None]
    ) -> None:
        self.under_way = UnderWay(
            sum(its["total"] for its in found),
            sum(its["samples"] for its in found),
            next((its["rate"] for its in found if its["rate"] is not None), None),
            max((its.get("elapsed", 0.0) for its in found), default=0.0),
            draw_on,
        )


def train(job: ImageJob, book: Book) -> None:
    """Train from the first epoch that is not over to the last, or to the target accuracy; all ranks call it
    together. Raises DivergedError, Interrupted, and RankLost where a lost rank ends the run."""
    for number in range(book.epochs_over + 1, job.config.epochs + 1):
        if book.is_at_target:
            return
        book.begin_epoch(number)
        job.progress.add(job.under_way.samples, job.under_way.total)
        try:
            if job.synchroniser.retry_until_all(partial(whole_epoch, job, book, number)):
                return
        except Interrupted:
            raise book.interrupted() from None
        job.under_way = UnderWay()


def whole_epoch(job: ImageJob, book: Book, epoch: int) -> bool:
    """Train an epoch, or what is left of it, evaluate the network, and write it down. Returns whether the run
    ends with it; if a rank is lost meanwhile, it is made again."""
    train_epoch(job, epoch)
    began_s = time.monotonic()
    evaluation = evaluate(job, epoch) if is_evaluated(job.config, epoch) else None
    evaluation_s = time.monotonic() - began_s
    found, counts, seconds = summarise(job, epoch, evaluation), job.count(epoch), job.under_way.seconds
    last = epoch == job.config.epochs
    return book.epoch_over(epoch, found, counts, seconds, last=last, evaluation_s=evaluation_s)


def train_epoch(job: ImageJob, epoch: int) -> None:
    """One pass over this rank's share, or over what is left of it; adds to what is under way."""
    began_s = time.monotonic()
    config, synchroniser, under_way = job.config, job.synchroniser, job.under_way
    model = synchroniser.model
    ledger = synchroniser.world.ledger

    ledger.enter("data")
    # Every random number is drawn from seed, epoch and worker, or sample: a resumed run draws the same ones.
    seed = np.random.SeedSequence([config.seed, epoch, job.worker or 0]).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(seed[0]))  # ranks compute on CPUs: of no other device's
    if under_way.draw_on is not None:
        under_way.draw_on()
    augmentation = Augmentation(config.seed, epoch, config.flip, config.translate, config.cutout)
    batches = Feed(
        job.train,
        synchroniser.sampler.shard(epoch),
        augmentation=augmentation,
        height=config.resizing.height_in(epoch),
    )
    arithmetic = autocast(config.precision)
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
    under_way.seconds += time.monotonic() - began_s
    under_way.draw_on = None


def is_evaluated(config: RunPlan, epoch: int) -> bool:
    """Whether the network is evaluated after an epoch."""
    return epoch % config.evaluate_every == 0 or epoch == config.epochs


def evaluate(job: ImageJob, epoch: int) -> tuple[float, int]:
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


def summarise(job: ImageJob, epoch: int, evaluation: tuple[float, int] | None) -> dict[str, Any]:
    """What all ranks found in an epoch, by the names of the record; without an `evaluation` none was due. All
    ranks together. Raises DivergedError if the validation loss is not a number."""
    under_way, synchroniser = job.under_way, job.synchroniser
    val_loss_sum, correct = evaluation or (0.0, 0)
    sums = np.array([under_way.total, under_way.samples, val_loss_sum, correct], np.float64)
    synchroniser.world.allreduce(sums)
    if not math.isfinite(sums[2]):
        raise DivergedError(f"the validation loss is {sums[2]} after epoch {epoch}: try a smaller --lr")
    # A sitting that found all steps made has an optimiser whose rate nobody has set yet.
    rate = under_way.rate
    found = {
        "train_loss": sums[0] / sums[1] if sums[1] else None,  # all that trained in it were lost since
        "steps": synchroniser.sampler.steps(epoch),
        "learning_rate": synchroniser.replica.optimizer.param_groups[0]["lr"] if rate is None else rate,
    }
    if evaluation is not None:
        n = len(job.val_pool)
        found |= {"val_loss": sums[2] / n, "val_accuracy": sums[3] / n}
    return found
