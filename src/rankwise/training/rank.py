"""One run on one rank: builds all parts from its plan, and trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from rankwise import data, models
from rankwise.comm import World
from rankwise.data import resizing
from rankwise.data.dataset import Dataset
from rankwise.data.feed import feed
from rankwise.data.fingerprint import fingerprint
from rankwise.data.selection import Selection, at_most, select
from rankwise.errors import ConfigError, ModelError
from rankwise.models.optimizers import make_optimizer
from rankwise.models.replica import Replica
from rankwise.models.rest import packed, rest_of
from rankwise.models.whitening import whiten
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record, Seen
from rankwise.runs.weights import Weights
from rankwise.training import batch_sizes, compile
from rankwise.training.admission import NotNeeded
from rankwise.training.book import Book
from rankwise.training.build import build, make_replica
from rankwise.training.folder_book import FolderBook
from rankwise.training.loop import ImageJob, train
from rankwise.training.set_up import Say
from rankwise.training.settled import Settled

WHITENING_BATCH = 250
"""Images whose patches are in memory at once."""

_SEEDING = threading.Lock()
"""Ranks that are threads share torch's generator: each seeds it and draws its weights in one go."""


def run(
    plan: RunPlan,
    world: World,
    folder: RunFolder,
    *,
    say: Say,
    start: Checkpoint | None = None,
    is_refilled: bool = False,
) -> Record:
    """Train as `plan` says, as one rank of `world`; all ranks call it together, with the same plan.

    With `start` the run goes on after that checkpoint. Where it `is_refilled`, the launcher has others take
    over if too few ranks are left, which train on until then. `say` gets remarks for the user, on rank 0
    only. Returns the final record. Raises UsageError before training; after it began Interrupted, on
    all ranks at once and with the record written, or the error of the rank on which it happened.
    """
    book = FolderBook(plan, world, folder, say=say, start=start)
    try:
        return _run(plan, world, folder, book, say=say, begins=start is None, is_refilled=is_refilled)
    finally:
        book.close()


def get_ready(plan: RunPlan) -> None:
    """Have in memory what a run needs, on a rank that is to take over later: libraries, data, kernels.

    It makes what `run` makes anew, and throws it away: the network and a step of it cost a rank most when it
    makes them for the first time.
    """
    dataset = data.prepare_of(plan, lambda *_: None)
    chosen = select(plan, dataset, workers=plan.workers)
    _make_replica(plan, dataset, chosen, begins=False)


def _run(
    plan: RunPlan,
    world: World,
    folder: RunFolder,
    book: FolderBook,
    *,
    say: Say,
    begins: bool,
    is_refilled: bool,
) -> Record:
    world.ledger.enter("data")
    dataset = data.prepare_of(plan, _announcer(say))
    world.ledger.enter("startup")
    torch.backends.mkldnn.set_flags(plan.onednn)  # type: ignore[no-untyped-call]
    chosen = select(plan, dataset, workers=plan.workers)
    # Also of a spare, which then is there at once when it is needed.
    replica = _make_replica(plan, dataset, chosen, begins=begins)
    compiled = compile.choose_compile(
        plan,
        replica,
        world,
        image_shape=dataset.image_shape,
        classes=len(dataset.classes),
        samples=len(chosen.train_pool),
        say=book.say,
    )
    sizes = batch_sizes.choose_batch_sizes(
        plan,
        replica,
        world,
        image_shape=dataset.image_shape,
        classes=len(dataset.classes),
        say=book.say,
    )
    plan = Settled(book.threads, compiled, sizes).in_force(plan)
    try:
        book.come_in(plan, Seen.of(dataset))
    except NotNeeded:
        return folder.read()
    job = _make_job(plan, dataset, chosen, replica, world, book, is_refilled=is_refilled)
    book.begin(job)
    train(job, book)
    return book.complete()


def _announcer(say: Say) -> Callable[[str, int, int], None]:
    """Says once what is being done, on the rank that decodes the dataset while the others wait."""
    said: set[str] = set()

    def announce(what: str, done: int, total: int) -> None:
        if what not in said:
            said.add(what)
            say(what)

    return announce


def _make_replica(plan: RunPlan, dataset: Dataset, chosen: Selection, *, begins: bool) -> Replica:
    shape, classes = dataset.image_shape, len(dataset.classes)
    smaller = [resizing.shape_at(height, shape) for height, _ in plan.resizing.stages]
    with _SEEDING:
        torch.default_generator.manual_seed(plan.seed)
        trial = models.trial_of(
            plan.model,
            shape,
            classes,
            takes=smaller,
            memory_format=plan.memory_format,
            precision=plan.precision,
        )
        model = trial.model
    if plan.whitening:
        seen = at_most(chosen.train_pool, plan.whitening, plan.seed)
        whiten(model, (images for images, _ in feed(dataset.train, seen, WHITENING_BATCH)))
    if plan.init is not None and begins:
        # Over whitened patches: as those are not trained, what the weights have been trained for is right.
        Weights(Path(plan.init)).load_into(model, f"--model {plan.model}")
    if plan.memory_format == "channels-last":
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks it
    plan.freezing.check(plan.model, [name for name, p in model.named_parameters() if p.requires_grad])
    with _SEEDING:
        for tried in (shape, *smaller):
            trial.train(tried)
        needs_pairs = not all(trial.trains_on_one(tried) for tried in (shape, *smaller))
    if plan.averaged_weights != "none" and not trial.copies:
        raise ModelError(
            f"the model {plan.model} cannot be copied, as --averaged-weights {plan.averaged_weights} needs: "
            "a copy fails, or calls the model itself (keep no functions of its own layers in it)"
        )
    packed(rest_of(model))  # or the first checkpoint would fail
    return make_replica(plan, model, make_optimizer(plan, model), needs_pairs=needs_pairs)


def _make_job(
    plan: RunPlan,
    dataset: Dataset,
    chosen: Selection,
    replica: Replica,
    world: World,
    book: Book,
    *,
    is_refilled: bool,
) -> ImageJob:
    synchroniser = build(
        plan,
        replica,
        chosen.train_pool,
        dataset.train.labels[chosen.train_pool],
        world,
        faults=book.faults(replica),
        observer=book.observer,
        join_state=book.join_state,
        is_refilled=is_refilled,
    )
    if replica.needs_pairs and book.join_state is None and synchroniser.sampler.least_batch(1) == 1:
        balanced = plan.balance != "none" and 1 in plan.batch_sizes
        given = f"--balance {plan.balance}" if balanced else f"--batch-size {plan.batch_size}"
        larger = "give each worker a batch of 2 or more" if balanced else "use a larger --batch-size"
        raise ConfigError(
            f"{given} makes a batch of one of the {len(chosen.train_pool)} training samples, on which model "
            f"{plan.model} cannot be trained, as BatchNorm cannot: {larger}, or another --train-limit"
        )
    return ImageJob(
        plan,
        synchroniser,
        train=dataset.train,
        validation=chosen.validation,
        val_pool=chosen.val_pool,
        pool=chosen.train_pool,
        progress=book.progress,
        data=fingerprint(dataset.train),
    )
