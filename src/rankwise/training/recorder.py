"""Writes down what happens to a run while it goes on: record, metrics, checkpoints, timelines, trackers."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rankwise.comm import World
from rankwise.plan import RunPlan
from rankwise.runs import resize
from rankwise.runs.checkpoint_names import best_epoch
from rankwise.runs.checkpoint_writer import CheckpointWriter
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import (
    SCHEMA_VERSION,
    Clock,
    EpochRow,
    Fault,
    Host,
    Outcome,
    Rank,
    Record,
    Seen,
    seconds_since,
    utc_before,
)
from rankwise.runs.trackers import NoTracker, Say, Tracker, open_tracker
from rankwise.survival import causes
from rankwise.survival.watchdog import Watchdog
from rankwise.system import machine
from rankwise.training import accounting
from rankwise.training.cadence import Cadence
from rankwise.training.goodput import add_goodput
from rankwise.training.history import RunHistory, SampleCounts
from rankwise.training.job import Job, Take, Taken
from rankwise.training.observer import Recovered


@dataclass(frozen=True)
class EpochResult:
    """An epoch, alike on all ranks. `last` says that the run ends with it. It began at the monotonic second
    `start_s`."""

    epoch: EpochRow
    counts: SampleCounts
    last: bool
    start_s: float


class Recorder:
    """Observes a run on one rank, and writes it down in the run folder.

    `threads` are this rank's, `hosts` those of the world. `resumed_from` is the epoch after which the sitting
    goes on, None for a new run. `seen` are the images, if they are known. `say` gets remarks for the user.
    Raises UsageError if the tracker that `config` names cannot be opened.
    """

    def __init__(
        self,
        config: RunPlan,
        world: World,
        folder: RunFolder,
        history: RunHistory,
        watchdog: Watchdog,
        *,
        threads: int,
        hosts: list[Host],
        resumed_from: int | None,
        say: Say,
        seen: Seen | None = None,
    ) -> None:
        self._config = config
        self._seen = seen
        self._world = world
        self._folder = folder
        self.history = history
        self._watchdog = watchdog
        self._threads = threads
        self._resumed_from = resumed_from
        self._say = say
        self._environment = accounting.environment(world, hosts)
        self._cadence = Cadence(config.checkpoints, world)
        self._said_nowhere = False
        change = resize.read_resize(folder.resize)
        self._takes_over = change is not None and change.state == "handing over"
        self._checkpoints = CheckpointWriter(
            folder.checkpoints,
            config.checkpoint_keep,
            folder.require_part,
            keeps_best=config.keep == "best",
        )
        self._tracker: Tracker = NoTracker()
        if world.rank == 0:
            folder.keep_metrics(history.epochs)
            folder.tell_ranks(world.size)
            self._open_tracker()

    def settle(self, config: RunPlan) -> None:
        """The plan, of which a program has said more."""
        self._config = config

    def training_begins(self, *, joins: bool) -> None:
        """The first step of the sitting is next, or of a rank that `joins` it later. Where the sitting takes
        a run over from ranks that trained until just now, what was start-up is a pause."""
        ledger = self._world.ledger
        self.history.training_begins(None if joins else ledger.close().wall_ns / 1e9)
        if self._takes_over and not joins:
            ledger.move("startup", "recovery", ledger.spent_ns["startup"])

    def recovered(self, event: Recovered) -> None:
        """Ranks were lost, and the others go on. The rank that is now rank 0 writes the folder."""
        self._watchdog.forget(event.lost)
        self._folder.require_part()
        self._checkpoints.give_up()
        self._cadence.begin_anew()
        of_all = causes.find_crashes(self._folder, event.lost)
        if of_all is not None:
            raise of_all
        history, progress = self.history, event.progress
        now_s = self._world.ledger.close().wall_ns / 1e9
        for member in event.lost:
            fault = causes.explain(
                self._folder,
                member,
                history.losses,
                epoch=progress.epoch,
                action="continue",
                ago_s=event.seconds,
            )
            history.add_loss(fault, found_s=now_s - event.seconds, recovery_s=event.seconds)
        history.goodput.recovered(event, now_s)
        if progress.closed:
            history.all_recovered()  # there is no round to commit
        lost = ", ".join(f"rank {member}{self._why(member)}" for member in event.lost)
        new = ", ".join(f"rank {member}" for member in event.new)
        in_place = f", with {new} in place" if new else ""
        self._say(
            f"lost {lost} in epoch {progress.epoch}: {self._world.size} go on{in_place}, "
            f"after {1e3 * event.seconds:.0f} ms"
        )
        if self._world.rank == 0:
            self._folder.tell_ranks(self._world.size)
            if isinstance(self._tracker, NoTracker):
                self._open_tracker()

    def committed(self, seconds: float) -> None:
        """A round is committed again."""
        self.history.all_recovered(seconds)

    def epoch_over(self, job: Job, result: EpochResult) -> None:
        """Count the epoch in, save it, and write it down; all ranks together."""
        self._tell_of_commit()
        number = result.epoch.epoch
        row = result.epoch.model_copy(update={"since_launch_s": seconds_since(self.history.launched_at)})

        def add() -> None:
            wall_s = time.monotonic() - result.start_s
            self.history.add_epoch(row.model_copy(update={"wall_s": wall_s}), result.counts)

        add()
        every = self._config.checkpoints
        if every.unit == "epochs":
            due = number % every.count == 0
        else:
            due = self._cadence.is_due(number, result.epoch.steps)
        due = due or result.last
        if due or (self._config.keep == "best" and self._is_best(number)):
            self.save_checkpoint(job, number)
            add()  # the checkpoint takes part of the epoch too, but what it holds is without that part
        if self._world.rank == 0:
            self._folder.keep_metrics(self.history.epochs)
            with self._world.ledger.phase("instrument"):
                self._tracker.epoch(self.history.epochs[-1])
        self.write(job, "running", ended=number)

    def _tell_of_commit(self) -> None:
        """What ranks that took over trained first is committed: who asked for them waits for that."""
        if self._takes_over:
            told = self._world.rank != 0 or resize.tell(self._folder.resize, "done")
            self._takes_over = not told  # again, if the disk is full just now

    def _is_best(self, number: int) -> bool:
        """Whether no epoch before was as good."""
        return best_epoch((row.epoch, row.val_accuracy) for row in self.history.epochs) == number

    def round_over(self, job: Job, epoch: int, step: int, take: Take) -> None:
        """Save the run inside the epoch if that is due; all ranks together. Says so, once, where that cannot
        be. Raises StorageError."""
        self._tell_of_commit()
        every = self._config.checkpoints
        if every.unit == "epochs" or not self._cadence.is_due(epoch, step) or self._save_inside(job, take):
            return
        if not self._said_nowhere:
            self._said_nowhere = True
            self._say(
                f"--checkpoint-every {self._config.checkpoint_every} writes none inside of epoch {epoch}, as "
                "no run could go on from the middle of a stream"
            )

    def stopped(self, job: Job, take: Take) -> bool:
        """Save the run where it is, if that can be; all ranks together. Returns whether it can. Raises
        StorageError."""
        is_saved = self._save_inside(job, take)
        self._checkpoints.finish(self._world)
        return is_saved

    def _save_inside(self, job: Job, take: Take) -> bool:
        with self._world.ledger.phase("checkpoint"):
            taken = take()
        if taken is not None:
            self.save_checkpoint(job, len(self.history.epochs), taken)
        return taken is not None

    def save_checkpoint(self, job: Job, epoch: int, inside: Taken | None = None) -> None:
        """Write the checkpoint of `epoch`, or of a place inside the next one; all ranks together. Raises
        StorageError."""
        place, of_all = inside or (None, None)
        synchroniser = job.synchroniser
        workers = self._world.size - job.first_worker
        writers = {"keep": workers, "average": 1, "reset": 0}[self._config.optimizer_state]
        worker = job.worker
        if synchroniser.shares_optimizer:
            writers, worker = 1, self._world.rank
        with self._world.ledger.phase("checkpoint"), synchroniser.faults.during("checkpoint"):
            self._checkpoints.save(
                epoch,
                synchroniser.replica,
                self._world,
                worker=worker,
                writers=writers if workers > 1 else 1,
                memory=synchroniser.state.memory,
                notes={
                    "epochs": [row.model_dump() for row in self.history.epochs],
                    "samples": self.history.samples.model_dump(),
                    "rounds": synchroniser.state.rounds,
                    "saved_at": utc_before(0, "milliseconds"),
                    "config": self._config.model_dump(mode="json"),
                    **job.notes,
                    **({"inside": of_all} if of_all else {}),
                },
                place=place,
            )
            if epoch == 0 and place is None:
                self._checkpoints.finish(self._world)  # a run that has a record can be resumed

    def complete(self, job: Job) -> Record:
        """Write the last record, and the last checkpoint again if it was lost with a rank; all together.
        Raises StorageError."""
        if any(self._world.allgather_object(self._checkpoints.gave_up)):
            self.save_checkpoint(job, self.history.epochs[-1].epoch)
        return self.write(job, "completed")

    def write(
        self, job: Job, outcome: Outcome, message: str | None = None, *, ended: int | None = None
    ) -> Record:
        """Gather all ranks' ledgers and write record and timelines; all ranks together.

        `ended` is the epoch that ends with it. Raises StorageError, and SupersededError if the run was
        started again without this rank.
        """
        self._world.reconcile()
        if outcome != "running":
            with self._world.ledger.phase("checkpoint"):
                self._checkpoints.finish(self._world)
            self._world.reconcile()  # no later one will find out what was waiting in the first
        self._save_timeline(job, ended)
        measured = dict(job.synchroniser.state.measured)
        mine = accounting.rank_row(self._world, job.role, self._threads, measured)
        record = self._record([Rank(**row) for row in self._world.allgather_object(mine)], outcome, message)
        if self._world.rank == 0:
            with self._world.ledger.phase("checkpoint"):
                self._folder.write(record)
            if outcome != "running":
                self._folder.progress.unlink(missing_ok=True)
                self._folder.beats.unlink(missing_ok=True)
                self._folder.forget_ranks()
                self._tracker.finish(record)
        return record

    def _record(self, live: list[Rank], outcome: Outcome, message: str | None) -> Record:
        """The run so far, by the rows of the ranks that live, in rank order."""
        history = self.history
        rows = history.add_rows(live)
        wall_s = live[0].wall_ns / 1e9
        return Record(
            schema_version=SCHEMA_VERSION,
            rankwise_version=machine.version_of("rankwise"),
            started_at=history.started_at,
            launched_at=history.launched_at,
            first_step_s=history.first_step_s,
            wall_s=wall_s,
            written_at=utc_before(0, "milliseconds"),
            elapsed_s=history.elapsed_before_s + wall_s,
            outcome=outcome,
            message=message,
            resumed_from_epoch=self._resumed_from,
            config=self._config.recorded(),
            environment=self._environment,
            seen=self._seen,
            epochs=history.epochs,
            target=history.target(self._config.target_accuracy),
            ranks=rows,
            generation=history.earlier[-1].number + 1 if history.earlier else 0,
            pause_s=history.pause_s,
            earlier=history.earlier,
            clock=Clock(
                error_bound_ns=self._world.clock_error_ns, violations=self._world.exchange_log.violations
            ),
            cpu_percent=accounting.cpu_percent(rows, self._environment.hosts),
            efficiency=add_goodput(accounting.efficiency(rows), history.goodput, wall_s, history.losses),
            samples=history.samples,
            faults=self._faults(),
        )

    def _faults(self) -> list[Fault]:
        """All faults so far, in the order of their epochs."""
        if not self._config.fault:
            return self.history.losses
        faults = [*self.history.losses, *causes.harmless_faults(self._folder)]
        return sorted(faults, key=lambda fault: fault.epoch)

    def _why(self, member: int) -> str:
        """Why a rank ended, in brackets, if it is known."""
        words = self._folder.read_words(member)
        return f" ({words['message']})" if words else ""

    def _open_tracker(self) -> None:
        self._tracker = open_tracker(self._config, self._folder, self.history.epochs, self._say)

    def _save_timeline(self, job: Job, ended: int | None) -> None:
        world, ledger = self._world, self._world.ledger
        if ended is not None:
            world.timeline.epoch(ended)
        with ledger.phase("instrument"):
            world.timeline.save(
                self._folder.timeline_of(world.number),
                rank=world.number,
                role=job.role,
                host=machine.host_name(),
                to_common=world.since_start,
                regions=world.exchange_log.regions.recent,
            )
