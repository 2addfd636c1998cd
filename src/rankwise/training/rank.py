"""One run on one rank: builds all parts from its plan, and trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from rankwise import data, models
from rankwise.comm import World
from rankwise.data import resizing
from rankwise.data.dataset import Dataset
from rankwise.data.feed import feed
from rankwise.data.fingerprint import fingerprint, of_pool
from rankwise.data.selection import Selection, at_most, select
from rankwise.errors import ConfigError, Interrupted, ModelError, ResumeError
from rankwise.models.optimizers import make_optimizer
from rankwise.models.replica import Replica
from rankwise.models.rest import packed, rest_of
from rankwise.models.whitening import whiten
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Record, Seen
from rankwise.runs.weights import Weights
from rankwise.survival.watchdog import Watchdog
from rankwise.system import machine
from rankwise.training import batch_sizes, compile
from rankwise.training.accounting import standing_by
from rankwise.training.admission import JoinState, NotNeeded, come_in
from rankwise.training.build import build, make_replica
from rankwise.training.inside import restore_generators
from rankwise.training.loop import Job, UnderWay, train
from rankwise.training.observer import Observer
from rankwise.training.recorder import Recorder
from rankwise.training.set_up import Say, begin_history, by_rank_0, faults_of, share_threads, watchdog_of
from rankwise.training.settled import Settled

WHITENING_BATCH = 250
"""Images whose patches are in memory at once."""

_SEEDING = threading.Lock()
"""Ranks that are threads share torch's generator: each seeds it and draws its weights in one go."""


def run(
    plan: RunPlan, world: World, folder: RunFolder, *, say: Say, start: Checkpoint | None = None
) -> Record:
    """Train as `plan` says, as one rank of `world`; all ranks call it together, with the same plan.

    With `start` the run goes on after that checkpoint. `say` gets remarks for the user, on rank 0
    only. Returns the final record. Raises UsageError before training; after it began Interrupted, on
    all ranks at once and with the record written, or the error of the rank on which it happened.
    """
    # From before anything is built: a rank that hangs there is waited for in the first exchange.
    with watchdog_of(plan, folder, world) as watchdog:
        return _run(plan, world, folder, watchdog, say=say, start=start)


def get_ready(plan: RunPlan) -> None:
    """Have in memory what a run needs, on a rank that is to take over later: libraries, data, kernels.

    It makes what `run` makes anew, and throws it away: the network and a step of it cost a rank most when it
    makes them for the first time.
    """
    dataset = data.prepare_of(plan, lambda *_: None)
    chosen = select(plan, dataset, workers=plan.workers)
    _make_replica(plan, dataset, chosen, begins=False)


def _run(
    plan: RunPlan, world: World, folder: RunFolder, watchdog: Watchdog, *, say: Say, start: Checkpoint | None
) -> Record:
    ledger = world.ledger
    announce = _announcer(say)
    say = by_rank_0(say, world)
    world.cross_check = plan.cross_check
    ledger.enter("data")
    dataset = data.prepare_of(plan, announce)
    ledger.enter("startup")
    threads, hosts = share_threads(plan, world, say)
    spares = standing_by(plan, world, threads)
    torch.backends.mkldnn.set_flags(plan.onednn)  # type: ignore[no-untyped-call]
    machine.keep_freed_memory()
    chosen = select(plan, dataset, workers=plan.workers)
    # Also of a spare, which then is there at once when it is needed.
    replica = _make_replica(plan, dataset, chosen, begins=start is None)
    compiled = compile.choose_compile(
        plan,
        replica,
        world,
        image_shape=dataset.image_shape,
        classes=len(dataset.classes),
        samples=len(chosen.train_pool),
        say=say,
    )
    sizes = batch_sizes.choose_batch_sizes(
        plan,
        replica,
        world,
        image_shape=dataset.image_shape,
        classes=len(dataset.classes),
        say=say,
    )
    plan = Settled(threads, compiled, sizes).in_force(plan)
    watchdog.steps_begin()
    try:
        join_state = come_in(world, plan.ranks)
    except NotNeeded:
        return folder.read()
    recorder = Recorder(
        plan,
        world,
        folder,
        join_state.history if join_state else begin_history(folder, start, spares, world),
        watchdog,
        threads=threads,
        hosts=hosts,
        resumed_from=start.epoch if start else None,
        say=say,
        seen=Seen.of(dataset),
    )
    job = _make_job(plan, dataset, chosen, replica, world, folder, recorder, join_state)
    return _train(job, recorder, world, start, join_state, folder)


def _train(
    job: Job,
    recorder: Recorder,
    world: World,
    start: Checkpoint | None,
    join_state: JoinState | None,
    folder: RunFolder,
) -> Record:
    """From the first epoch that is not over to the last."""
    ledger, synchroniser = world.ledger, job.synchroniser
    begun: UnderWay | None = None
    draw_on: Callable[[], None] | None = None
    if join_state is not None:
        first = join_state.progress.epoch
        world.timeline.begin()
    else:
        if start is None:
            recorder.save_checkpoint(job, 0)
        else:
            require_same_data(start, job)
            synchroniser.resume(start, job.worker)
            if start.inside is not None:
                begun = UnderWay.of(synchroniser.resume_inside(start, job.how))
                draw_on = partial(restore_generators, start, world.rank)
        first = start.epoch + 1 if start else 1
        recorder.write(job, "running")
        ledger.enter("other")
        world.reconcile()  # so that no waiting from before is found out in the first epoch
        world.timeline.begin()
    world.survives = synchroniser.survives
    recorder.training_begins(joins=join_state is not None)
    target = recorder.history.target(job.config.target_accuracy)
    try:
        if target is None or not target.reached:
            train(job, first, recorder, begun, draw_on)
    except Interrupted as stop:
        message = f"{stop}; go on with: rankwise train --resume {folder.path}"
        recorder.write(job, "interrupted", message)
        raise Interrupted(message) from None
    record = synchroniser.retry_until_all(lambda: recorder.complete(job), fill=False)
    world.survives = False
    return record


def require_same_data(start: Checkpoint, job: Job) -> None:
    """Raises ResumeError if a checkpoint is of a run with other training samples."""
    if start.notes.get("data", job.data) != job.data:
        raise ResumeError(
            f"{start.path} was trained on other samples than {job.config.dataset} has now: give the data "
            "that it had, or start a new run"
        )
    found = of_pool(job.pool)
    expected = str(start.inside["samples"]) if start.inside else found
    if expected != found:
        raise ResumeError(
            f"{start.path} is from inside an epoch of {expected.split()[0]} training samples, and these are "
            f"{found.split()[0]} or others: leave --train-limit, --validation-split and --seed as they were"
        )


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
    folder: RunFolder,
    observer: Observer | None = None,
    join_state: JoinState | None = None,
) -> Job:
    synchroniser = build(
        plan,
        replica,
        chosen.train_pool,
        dataset.train.labels[chosen.train_pool],
        world,
        faults=faults_of(plan, folder, world, replica.poison),
        observer=observer,
        join_state=join_state,
    )
    if replica.needs_pairs and join_state is None and synchroniser.sampler.least_batch(1) == 1:
        balanced = plan.balance != "none" and 1 in plan.batch_sizes
        given = f"--balance {plan.balance}" if balanced else f"--batch-size {plan.batch_size}"
        larger = "give each worker a batch of 2 or more" if balanced else "use a larger --batch-size"
        raise ConfigError(
            f"{given} makes a batch of one of the {len(chosen.train_pool)} training samples, on which model "
            f"{plan.model} cannot be trained, as BatchNorm cannot: {larger}, or another --train-limit"
        )
    return Job(
        config=plan,
        synchroniser=synchroniser,
        train=dataset.train,
        validation=chosen.validation,
        val_pool=chosen.val_pool,
        pool=chosen.train_pool,
        progress=ProgressFile(folder.progress, world.number, plan.processes),
        data=fingerprint(dataset.train),
    )
