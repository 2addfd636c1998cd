"""One run on one rank: builds all parts from its plan, and trains."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch

from rankwise import data, models
from rankwise.comm import World
from rankwise.data import resizing
from rankwise.data.dataset import Dataset
from rankwise.data.feed import feed
from rankwise.data.selection import Selection, at_most, select
from rankwise.errors import ConfigError, Interrupted, ModelError
from rankwise.models.optimizers import make_optimizer
from rankwise.models.replica import Replica
from rankwise.models.rest import packed, rest_of
from rankwise.models.whitening import whiten
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Host, Rank, Record
from rankwise.survival.fault_injection import Faults, NoFaults
from rankwise.survival.hangs import Limits
from rankwise.survival.harm import ProcessHarm, ThreadHarm
from rankwise.survival.watchdog import Watchdog
from rankwise.system import machine
from rankwise.training import batch_sizes, compile, cpu_threads
from rankwise.training.accounting import standing_by
from rankwise.training.admission import JoinState, stand_by
from rankwise.training.build import build, make_replica
from rankwise.training.history import RunHistory
from rankwise.training.loop import Job, train
from rankwise.training.observer import Observer
from rankwise.training.recorder import Recorder
from rankwise.training.settled import Settled

Say = Callable[[str], None]

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
    ledger = world.ledger
    announce = _announcer(say)
    say = _by_rank_0(say, world)
    world.cross_check = plan.cross_check
    ledger.enter("data")
    dataset = data.prepare(
        plan.dataset, data_dir=plan.data_dir, cache_dir=plan.cache_dir, on_progress=announce
    )
    ledger.enter("startup")
    threads, hosts = _share_threads(plan, world, say)
    spares = standing_by(plan, world, threads)
    torch.backends.mkldnn.set_flags(plan.onednn)  # type: ignore[no-untyped-call]
    machine.keep_freed_memory()
    chosen = select(plan, dataset, workers=plan.workers)
    # Also of a spare, which then is there at once when it is needed.
    replica = _make_replica(plan, dataset, chosen)
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
    world.set_aside(plan.ranks)
    with _watchdog(plan, folder, world) as watchdog:
        join_state = None
        if world.rank < 0:
            world.survives = True  # no rank needs it yet
            join_state = stand_by(world)
            if join_state is None:
                return folder.read()
        recorder = Recorder(
            plan,
            world,
            folder,
            join_state.history if join_state else _begin_history(folder, start, spares, world),
            watchdog,
            threads=threads,
            hosts=hosts,
            resumed_from=start.epoch if start else None,
            say=say,
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
    if join_state is not None:
        first = join_state.progress.epoch
        world.timeline.begin()
    else:
        if start is None:
            recorder.save_checkpoint(job, 0)
        else:
            synchroniser.resume(start, job.worker)
        first = start.epoch + 1 if start else 1
        recorder.write(job, "running")
        ledger.enter("other")
        world.reconcile()  # so that no waiting from before is found out in the first epoch
        world.timeline.begin()
    world.survives = synchroniser.survives
    recorder.history.training_begins()
    target = recorder.history.target(job.config.target_accuracy)
    try:
        if target is None or not target.reached:
            train(job, first, recorder)
    except Interrupted as stop:
        message = f"{stop}; go on with: rankwise train --resume {folder.path}"
        recorder.write(job, "interrupted", message)
        raise Interrupted(message) from None
    record = synchroniser.retry_until_all(lambda: recorder.complete(job), fill=False)
    world.survives = False
    return record


def _begin_history(
    folder: RunFolder, start: Checkpoint | None, spares: list[Rank], world: World
) -> RunHistory:
    return RunHistory.begin(folder, start, spares, age_s=world.ledger.close().wall_ns / 1e9)


def _by_rank_0(say: Say, world: World) -> Say:
    """Says what this rank has to say while it is rank 0."""

    def speak(line: str) -> None:
        if world.rank == 0:
            say(line)

    return speak


def _announcer(say: Say) -> Callable[[str, int, int], None]:
    """Says once what is being done, on the rank that decodes the dataset while the others wait."""
    said: set[str] = set()

    def announce(what: str, done: int, total: int) -> None:
        if what not in said:
            said.add(what)
            say(what)

    return announce


def _share_threads(plan: RunPlan, world: World, say: Say) -> tuple[int, list[Host]]:
    """Set this rank's arithmetic threads; returns them, and the hosts of the world in rank order."""
    works = world.rank < plan.ranks
    mine = cpu_threads.here(trains=works and not (plan.has_master and world.rank == 0))
    ranks: list[cpu_threads.RankPlacement] = world.allgather_object(mine)
    threads = cpu_threads.share_threads(ranks, plan.threads)
    for warning in cpu_threads.oversubscribed(ranks, threads):
        say(warning)
    slow = sorted({rank.host for rank in ranks if not rank.multiplies_bf16})
    if plan.precision == "bf16" and slow:
        say(
            f"--precision bf16 is slow here: {', '.join(slow)} has no instructions for bfloat16 and goes "
            "by way of float32, which --precision fp32 does at once"
        )
    if not works:  # it will take the place of one that trains, most likely
        threads[world.rank] = min(n for n, rank in zip(threads, ranks, strict=True) if rank.trains)
    torch.set_num_threads(threads[world.rank])
    models_of = {rank.host: rank.cpu_model for rank in ranks}
    hosts = [
        Host(
            name=name, cores=cores, ranks=sum(rank.host == name for rank in ranks), cpu_model=models_of[name]
        )
        for name, cores in cpu_threads.cores_of_hosts(ranks).items()
    ]
    return threads[world.rank], hosts


def _make_replica(plan: RunPlan, dataset: Dataset, chosen: Selection) -> Replica:
    shape, classes = dataset.image_shape, len(dataset.classes)
    smaller = [resizing.shape_at(height, shape) for height, _ in plan.resizing.stages]
    with _SEEDING:
        torch.manual_seed(plan.seed)
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
        faults=_faults(plan, folder, world, replica),
        observer=observer,
        join_state=join_state,
    )
    if replica.needs_pairs and join_state is None and synchroniser.sampler.least_batch(1) == 1:
        raise ConfigError(
            f"--batch-size {plan.batch_size} makes a batch of one of the {len(chosen.train_pool)} training "
            f"samples, on which model {plan.model} cannot be trained, as BatchNorm cannot: use a larger "
            "--batch-size, or another --train-limit"
        )
    return Job(
        config=plan,
        synchroniser=synchroniser,
        train=dataset.train,
        validation=chosen.validation,
        val_pool=chosen.val_pool,
        pool=chosen.train_pool,
        progress=ProgressFile(folder.progress, world.number, plan.processes),
    )


def _watchdog(plan: RunPlan, folder: RunFolder, world: World) -> Watchdog:
    limits = Limits(plan.hang_timeout or math.inf, plan.step_timeout or math.inf)
    if world.in_threads:
        limits = Limits()  # ranks that are threads are one process: none of them can be ended alone
    return Watchdog(folder, rank=world.number, ranks=plan.processes, ledger=world.ledger, limits=limits)


def _faults(plan: RunPlan, folder: RunFolder, world: World, replica: Replica) -> NoFaults:
    if not plan.fault:
        return NoFaults()
    if any(fault.kind == "cut" for fault in plan.planned_faults) and not machine.can_cut_links():
        raise ConfigError("--fault cut takes links down, which needs the program ip and CAP_NET_ADMIN")
    return Faults(
        plan.planned_faults,
        folder.faults,
        rank=world.number,
        seed=plan.seed,
        exchanges=world,
        harm=ThreadHarm() if world.in_threads else ProcessHarm(),
        poison=replica.poison,
    )
