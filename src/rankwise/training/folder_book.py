"""Writing a run down in its folder, whosever loop trains, and going on with what stands there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted, OutOfStepError
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Epoch, Evaluated, Record, Seen
from rankwise.survival.fault_injection import NoFaults
from rankwise.system import machine
from rankwise.training.accounting import standing_by
from rankwise.training.admission import come_in
from rankwise.training.book import Book
from rankwise.training.history import SampleCounts
from rankwise.training.inside import restore_generators
from rankwise.training.job import Job, Taken
from rankwise.training.kept_place import place_in
from rankwise.training.place import Place
from rankwise.training.recorder import EpochResult, Recorder
from rankwise.training.set_up import Say, begin_history, by_rank_0, faults_of, share_threads, watchdog_of

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

NO_PLACE = (
    "where a run cannot go on (in a stream, among ranks that are rounds apart, or behind a loop that was "
    "left), and which goes on from its last checkpoint"
)


class FolderBook(Book):
    """Writes the run of one rank into `folder`, and goes on after the checkpoint `start`; all ranks together.

    Until it is closed the ranks of a host watch each other, from before anything is built: a rank that hangs
    there is waited for in the first exchange. `threads` are this rank's, and `say` gets remarks for the user
    while this is rank 0. `epochs` were asked for, None if a program says how many. What is built before
    `come_in` a spare has too.
    """

    def __init__(
        self,
        plan: RunPlan,
        world: World,
        folder: RunFolder,
        *,
        say: Say,
        start: Checkpoint | None,
        epochs: int | None = None,
    ) -> None:
        super().__init__()
        self._plan = plan
        self._world = world
        self._folder = folder
        self._start = start
        self.epochs_asked = epochs
        self._watchdog = watchdog_of(plan, folder, world)
        self._watchdog.__enter__()
        world.cross_check = plan.cross_check
        self.say = by_rank_0(say, world)
        self.threads, self._hosts = share_threads(plan, world, self.say)
        machine.keep_freed_memory()
        self._job: Job | None = None
        self._elapsed_s = self._began_s = 0.0
        self._epoch = 1

    def come_in(self, plan: RunPlan, seen: Seen | None = None) -> None:
        """Open the record of the plan as the ranks have settled it, and of the images that were `seen`.

        A spare waits here until it takes the place of a lost rank. Raises UsageError if the folder, or the
        tracker that the plan names, cannot be opened, and NotNeeded on a spare that nobody needs.
        """
        world, folder, start = self._world, self._folder, self._start
        self._plan = plan
        spares = standing_by(plan, world, self.threads)
        self.join_state = joins = come_in(world, plan.ranks)
        if joins is None:
            history = begin_history(folder, start, spares, world)
        elif isinstance(joins.history, Place):
            self.go_on_at(joins.history)
            history = joins.history.history
        else:
            self.epochs_over = joins.progress.epoch - 1
            history = joins.history
        if start and joins is None:
            self.epochs_over, self.draws = start.epoch, list(start.notes.get("draws", []))
            self.places = list(start.notes.get("places", []))
            if start.inside is not None and plan.program:
                self.go_on_at(place_in(start, 0, ()))
        self._recorder = Recorder(
            plan,
            world,
            folder,
            history,
            self._watchdog,
            threads=self.threads,
            hosts=self._hosts,
            resumed_from=start.epoch if start else None,
            say=self.say,
            seen=seen,
        )
        self.observer = self._recorder
        self.progress = ProgressFile(folder.progress, world.number, plan.processes)
        self._epoch = self.epochs_over + 1

    @property
    def is_at_target(self) -> bool:
        target = self._recorder.history.target(self._plan.target_accuracy)
        return target is not None and target.reached

    def faults(self, replica: Replica) -> NoFaults:
        return faults_of(self._plan, self._folder, self._world, replica.poison)

    def begin(self, job: Job) -> None:
        world, recorder, start = self._world, self._recorder, self._start
        self._job = job
        if self.join_state is None:
            if start is None:
                recorder.save_checkpoint(job, 0)
            else:
                self._go_on(job, start)
            recorder.write(job, "running")
            world.ledger.enter("other")
            world.reconcile()  # so that no waiting from before is found out in the first epoch
        job.synchroniser.at_commit = self._round_over
        world.timeline.begin()
        world.survives = job.synchroniser.survives
        recorder.training_begins(joins=self.join_state is not None)
        self._watchdog.steps_begin()

    def _go_on(self, job: Job, start: Checkpoint) -> None:
        """Be where the run was, which may be inside an epoch."""
        job.resume(start)
        job.synchroniser.resume(start, job.worker)
        if start.inside is not None:
            found = job.synchroniser.resume_inside(start, job.how)
            job.resume_inside(start, found, partial(restore_generators, start, self._world.rank))
            self._elapsed_s = max((float(its.get("elapsed", 0.0)) for its in found), default=0.0)

    def _round_over(self, batch: Batch) -> None:
        job = self._job
        if batch.rounds_left and job is not None:  # otherwise the epoch, or a pass of it, is over soon
            self._recorder.round_over(job, self._epoch, job.steps_before + batch.step, self._take)

    def _take(self) -> Taken | None:
        assert self._job is not None
        return self._job.take(time.monotonic() - self._began_s)

    def settle(self, **options: Any) -> None:
        self._plan = self._plan.with_options(**options)
        self._recorder.settle(self._plan)

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._began_s = time.monotonic() - self._elapsed_s
        self._elapsed_s = 0.0
        self.progress.start(epoch)

    def epoch_over(
        self,
        epoch: int,
        found: Mapping[str, Any],
        counts: SampleCounts,
        seconds: float,
        *,
        last: bool,
        evaluation_s: float | None = None,
    ) -> bool:
        assert self._job is not None
        if evaluation_s is None:
            evaluation_s = time.monotonic() - self._began_s - seconds
        slowest = np.array([seconds, evaluation_s])
        self._world.allreduce(slowest, op="max")
        row = Epoch(
            epoch=epoch,
            train_samples=counts.trained,
            wall_s=0.0,
            train_s=max(float(slowest[0]), 1e-9),
            evaluation_s=float(slowest[1]),
            **found,
        )
        if row.val_accuracy is not None:
            row = Evaluated(**dict(row))
        target = self._plan.target_accuracy
        last = last or (target is not None and row.val_accuracy is not None and row.val_accuracy >= target)
        self._recorder.epoch_over(self._job, EpochResult(row, counts, last, self._began_s))
        return last

    def interrupted(self) -> Interrupted:
        job, recorder = self._job, self._recorder
        command = "run" if self._plan.program else "train"
        go_on = f"go on with: rankwise {command} --resume {self._folder.path}"
        message = f"stopped in epoch {self._epoch}; {go_on}"
        if job is not None:
            if not job.synchroniser.retry_until_all(lambda: recorder.stopped(job, self._take), fill=False):
                message = f"stopped in epoch {self._epoch}, {NO_PLACE}; {go_on}"
            recorder.write(job, "interrupted", message)
        return Interrupted(message)

    def complete(self) -> Record:
        """The run is at its end: write the last record; all ranks together. Raises OutOfStepError if no step
        was made."""
        job, recorder = self._job, self._recorder
        if job is None:
            raise OutOfStepError(
                "the program made a Run and no turn of it: loop over run.epochs(n), or run.steps(n)"
            )
        record = job.synchroniser.retry_until_all(lambda: recorder.complete(job), fill=False)
        self._world.survives = False
        return record

    def close(self) -> None:
        """Watch no more, and end what was started for the loop."""
        if self._job is not None:
            self._job.close()
        self._watchdog.__exit__(None, None, None)
