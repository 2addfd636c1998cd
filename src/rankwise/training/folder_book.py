"""Writing a loop of a user's own down in a run folder, as `rankwise train` writes its runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted, OutOfStepError
from rankwise.models.loop_replica import LoopReplica
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Epoch, Evaluated, Record, Role
from rankwise.survival.fault_injection import NoFaults
from rankwise.system import machine
from rankwise.training.accounting import standing_by
from rankwise.training.admission import come_in
from rankwise.training.book import Book
from rankwise.training.inside import How, restore_generators
from rankwise.training.kept_place import arrays_of, notes_of, place_in
from rankwise.training.loop import EpochResult, Taken
from rankwise.training.place import Place
from rankwise.training.recorder import Recorder
from rankwise.training.set_up import Say, begin_history, by_rank_0, faults_of, share_threads, watchdog_of
from rankwise.training.synchroniser import Synchroniser
from rankwise.training.turns import Turns

HOW = ("strategy", "topology", "sync_every", "local_after", "optimizer_state", "compress", "on_shrink")
"""The options by which the turns of an epoch are cut, and ranks keep in step."""

NO_PLACE = (
    "where a run cannot go on (in a stream, or in a round of local steps), and which goes on from its last "
    "checkpoint"
)


@dataclass(frozen=True)
class LoopJob:
    """What a user's loop trains with, as far as it is written down."""

    turns: Turns
    how: How
    first_worker: int = 0
    role: Role = "worker"

    @property
    def synchroniser(self) -> Synchroniser:
        """Keeps it in step."""
        return self.turns.synchroniser

    @property
    def worker(self) -> int | None:
        """Its number among the ranks, all of which train."""
        return self.turns.world.rank

    @property
    def notes(self) -> dict[str, Any]:
        """How many passes are over, how many epochs' samples each loader has drawn for them, and where its
        stream goes on."""
        loaders = self.turns.loaders
        draws, places = [its.draws_so_far for its in loaders], [its.place_so_far for its in loaders]
        return {"passes": self.turns.passes, "draws": draws, "places": places}

    def take(self, began_s: float) -> Taken | None:
        """This rank's place in the epoch that began at the monotonic second `began_s`, and what all ranks
        note alike, if a run could go on from there; all ranks together."""
        place = self.turns.place
        if place is None:
            return None
        notes = notes_of(place, {"elapsed": time.monotonic() - began_s})
        inside = self.synchroniser.inside
        taken, of_all = inside.take(self.how, notes, arrays_of(place, self.turns.world.rank))
        before = sum(its.trained for its in place.counts.values())
        return taken, {**of_all, "trained": of_all["trained"] + before}


class FolderBook(Book):
    """Writes the run of one rank into `folder`, and goes on after the checkpoint `start`; all ranks together.
    Until it is closed the ranks of a host watch each other.

    `epochs` were asked for, None if the program says how many. A spare waits here until it takes the place
    of a lost rank. Raises UsageError if the folder, or the tracker that the plan names, cannot be opened, and
    SystemExit on a spare that nobody needs.
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
        self._plan = plan
        self._world = world
        self._folder = folder
        self._start = start
        self._watchdog = watchdog_of(plan, folder, world)
        self._watchdog.__enter__()
        world.cross_check = plan.cross_check
        say = by_rank_0(say, world)
        threads, hosts = share_threads(plan, world, say)
        machine.keep_freed_memory()
        spares = standing_by(plan, world, threads)
        super().__init__(join_state := come_in(world, plan.ranks))
        place: Place | None = join_state.history if join_state else None
        self._recorder = Recorder(
            plan,
            world,
            folder,
            place.history if place else begin_history(folder, start, spares, world),
            self._watchdog,
            threads=threads,
            hosts=hosts,
            resumed_from=start.epoch if start else None,
            say=say,
        )
        self.observer = self._recorder
        self.epochs_asked = epochs
        if start and not join_state:
            self.epochs_over, self.draws = start.epoch, list(start.notes.get("draws", []))
            self.places = list(start.notes.get("places", []))
            if start.inside is not None:
                self.go_on_at(place_in(start, 0, ()))
        self._job: LoopJob | None = None
        self._elapsed_s = 0.0
        self._epoch = self.epochs_over + 1
        self._began_s = 0.0

    def faults(self, replica: LoopReplica) -> NoFaults:
        return faults_of(self._plan, self._folder, self._world, replica.poison)

    def begin(self, turns: Turns) -> None:
        world, recorder = self._world, self._recorder
        self._job = job = LoopJob(turns, {name: getattr(self._plan, name) for name in HOW})
        turns.progress = ProgressFile(self._folder.progress, world.number, self._plan.processes)
        if self.join_state is None:
            if self._start is None:
                recorder.save_checkpoint(job, 0)
            else:
                turns.synchroniser.resume(self._start, job.worker)
                turns.passes = int(self._start.notes.get("passes", 0))
                if self._start.inside is not None:
                    self._go_on_inside(turns, self._start, job.how)
            recorder.write(job, "running")
            world.ledger.enter("other")
            world.reconcile()  # so that no waiting from before is found out in the first epoch
        turns.synchroniser.at_commit = self._round_over
        world.timeline.begin()
        world.survives = turns.synchroniser.survives
        recorder.training_begins(joins=self.join_state is not None)
        self._watchdog.steps_begin()

    def _go_on_inside(self, turns: Turns, start: Checkpoint, how: How) -> None:
        """Be on the way to where the run was inside an epoch."""
        rank = self._world.rank
        found = turns.synchroniser.resume_inside(start, how)
        turns.come_in(place_in(start, rank, found), partial(restore_generators, start, rank))
        self._elapsed_s = max((float(its.get("elapsed", 0.0)) for its in found), default=0.0)

    def _round_over(self, batch: Batch) -> None:
        if batch.rounds_left and self._job is not None:
            self._recorder.round_over(self._job, self._epoch, self._job.turns.steps_made, self._take)

    def _take(self) -> Taken | None:
        assert self._job is not None
        return self._job.take(self._began_s)

    def epochs_come(self, epochs: int) -> None:
        self._settle(epochs=epochs)

    def begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._began_s = time.monotonic() - self._elapsed_s
        self._elapsed_s = 0.0
        if self._job and self._job.turns.progress:
            self._job.turns.progress.start(epoch)

    def epoch_over(self, epoch: int, metrics: dict[str, float], *, last: bool) -> bool:
        assert self._job is not None
        turns = self._job.turns
        if turns.batch_size is not None and not self._plan.said:
            self._settle(batch_size=turns.batch_size, said=("batch_size",))
        counts = turns.count()
        all_s = time.monotonic() - self._began_s
        slowest = np.array([turns.seconds, all_s - turns.seconds])
        self._world.allreduce(slowest, op="max")
        row = Epoch(
            epoch=epoch,
            train_loss=metrics.get("loss"),
            val_loss=metrics.get("val_loss"),
            val_accuracy=metrics.get("val_accuracy"),
            train_samples=counts.trained,
            steps=turns.steps_made,
            learning_rate=turns.learning_rate,
            wall_s=0.0,
            train_s=max(float(slowest[0]), 1e-9),
            evaluation_s=float(slowest[1]),
            metrics=metrics,
        )
        if row.val_loss is not None and row.val_accuracy is not None:
            row = Evaluated(**dict(row))
        target = self._plan.target_accuracy
        last = last or (target is not None and row.val_accuracy is not None and row.val_accuracy >= target)
        result = EpochResult(row, counts.expected, counts.duplicated, counts.lost, last, self._began_s)
        self._recorder.epoch_over(self._job, result)
        return last

    def interrupted(self) -> Interrupted:
        job, recorder = self._job, self._recorder
        go_on = f"go on with: rankwise run --resume {self._folder.path}"
        message = f"stopped in epoch {self._epoch}; {go_on}"
        if job is not None:
            if not job.synchroniser.retry_until_all(lambda: recorder.stopped(job, self._take), fill=False):
                message = f"stopped in epoch {self._epoch}, {NO_PLACE}; {go_on}"
            recorder.write(job, "interrupted", message)
        return Interrupted(message)

    def complete(self) -> Record:
        """The program is at its end: write the last record; all ranks together. Raises OutOfStepError if no
        turn was made."""
        job, recorder = self._job, self._recorder
        if job is None:
            raise OutOfStepError(
                "the program made a Run and no turn of it: loop over run.epochs(n), or run.steps(n)"
            )
        record = job.synchroniser.retry_until_all(lambda: recorder.complete(job), fill=False)
        self._world.survives = False
        return record

    def _settle(self, **options: Any) -> None:
        """The program has said more of the plan."""
        self._plan = self._plan.with_options(**options)
        self._recorder.settle(self._plan)

    def close(self) -> None:
        """Watch no more, and end what the loop's loaders have started."""
        for loader in self._job.turns.loaders if self._job else ():
            loader.close()
        self._watchdog.__exit__(None, None, None)
