"""Keeps record, metrics and checkpoints while a run goes on."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass, field
from importlib import metadata

from pydantic import TypeAdapter, ValidationError

from rankwise.comm import World
from rankwise.config import TrainConfig
from rankwise.errors import ResumeError, one_line
from rankwise.runs.checkpoint import Checkpoint
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
    Role,
    Samples,
    Target,
    seconds_since,
    utc_before,
)
from rankwise.runs.trackers import NoTracker, Say, open_tracker
from rankwise.survival import causes
from rankwise.survival.fault_injection import DEADLY, read_marks
from rankwise.system import machine
from rankwise.training import accounting
from rankwise.training.loop import EpochResult, Job

_EPOCHS = TypeAdapter(list[EpochRow])


@dataclass
class _Tally:
    """Sample counts over all epochs so far."""

    expected: int = 0
    trained: int = 0
    duplicated: int = 0
    lost: int = 0


@dataclass
class RunHistory:
    """What all recorders of a run know alike: the epochs so far and their tallies by number; the rows of
    ranks that stand by, of all when they were told last, and of those that were lost; the losses, of which
    the first `told` are known to be over; and when the run was asked for and began."""

    epochs: list[EpochRow]
    tallies: dict[int, _Tally]
    spares: dict[int, Rank]
    losses: list[Fault]
    started_at: str
    launched_at: str
    elapsed_before_s: float
    first_step_s: float | None
    rows: dict[int, Rank] = field(default_factory=dict)
    dead: dict[int, Rank] = field(default_factory=dict)
    told: int = 0


class Recorder:
    """Keeps record, metrics and checkpoints while a run goes on."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        folder: RunFolder,
        job: Job,
        threads: int,
        hosts: list[Host],
        spares: list[Rank],
        start: Checkpoint | None,
        history: RunHistory | None,
        say: Say,
    ) -> None:
        self._config = config
        self._world = world
        self._folder = folder
        self._job = job
        self._threads = threads
        self._start = start
        self._environment = accounting.environment(world, hosts)
        self.history = history or self._open_books(spares)
        self._checkpoints = CheckpointWriter(folder.checkpoints, config.checkpoint_keep, folder.require_part)
        self._say = say
        if world.rank == 0:
            folder.keep_metrics(self.history.epochs)
        self._tracker = (
            open_tracker(config, folder, self.history.epochs, say) if world.rank == 0 else NoTracker()
        )

    def _open_books(self, spares: list[Rank]) -> RunHistory:
        """At the start of a sitting, by what a checkpoint and the record of the one before tell."""
        started_at = utc_before(self._world.ledger.close().wall_ns / 1e9)
        before = self._folder.read() if self._start and self._folder.record.exists() else None
        notes = self._start.notes if self._start else {"epochs": [], "samples": {}}
        faults = before.faults if before else []
        survived = [_recovered(fault) for fault in faults if fault.action in ("continue", "restart")]
        try:
            return RunHistory(
                epochs=_EPOCHS.validate_python(notes["epochs"]),
                tallies={0: _Tally(**notes["samples"])},
                spares={row.rank: row for row in spares},
                losses=survived,
                told=len(survived),
                started_at=started_at,
                launched_at=(
                    (before.launched_at or before.started_at)
                    if before
                    else self._folder.launched_at or started_at
                ),
                first_step_s=before.first_step_s if before else None,
                elapsed_before_s=before.elapsed_before_s(started_at) if before else 0.0,
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise ResumeError(
                f"the notes of the checkpoint do not fit this rankwise: {one_line(error)[:200]}"
            ) from None

    @property
    def target(self) -> Target | None:
        """Whether the epochs so far reach the accuracy that the run is to stop at, None if there is none."""
        return Target.of(self._config.target_accuracy, self.history.epochs, self.history.first_step_s)

    def before_first_step(self) -> None:
        """Training begins, or goes on."""
        if self.history.first_step_s is None:
            self.history.first_step_s = seconds_since(self.history.launched_at)

    def after_epoch(self, result: EpochResult, start_s: float) -> None:
        """Count the epoch in, save it, and write it down; all ranks together.

        If a rank is lost meanwhile it comes again with the same epoch, which then takes the place of the
        first.
        """
        number = result.epoch.epoch
        epoch = result.epoch.model_copy(update={"since_launch_s": seconds_since(self.history.launched_at)})
        if self.history.epochs and self.history.epochs[-1].epoch == number:
            self.history.epochs.pop()
        self.history.tallies[number] = _Tally(
            self._job.synchroniser.sampler.samples(number),
            result.epoch.train_samples,
            result.duplicated,
            result.lost,
        )
        self.history.epochs.append(epoch.model_copy(update={"wall_s": time.monotonic() - start_s}))
        if number % self._config.checkpoint_every == 0 or result.last:
            self.save_checkpoint(number)
            # The checkpoint itself takes part of the epoch: what it holds is without that part.
            self.history.epochs[-1] = epoch.model_copy(update={"wall_s": time.monotonic() - start_s})
        if self._world.rank == 0:
            self._folder.keep_metrics(self.history.epochs)
            with self._world.ledger.phase("instrument"):
                self._tracker.epoch(self.history.epochs[-1])
        self.write("running", ended=number)

    def after_recovery(self, lost: list[int], new: list[int], seconds: float) -> None:
        """Ranks were lost, and the others go on, with new ones in their place; who is rank 0 now keeps the
        folder."""
        self._folder.require_part()
        self._checkpoints.give_up()
        position = self._job.synchroniser.progress
        now_s = self._world.ledger.close().wall_ns / 1e9
        for member in lost:
            row = self.history.rows.get(member)
            if row is not None:
                self.history.dead[member] = row.model_copy(update={"died_at_s": now_s - seconds})
            fault = causes.explain(
                self._folder,
                member,
                self.history.losses,
                epoch=position.epoch,
                action="continue",
                ago_s=seconds,
            )
            after_s = seconds + (fault.detected_after_s or 0)
            self.history.losses.append(fault.model_copy(update={"recovered_after_s": after_s}))
        if position.closed:
            self.history.told = len(self.history.losses)  # there is no round to commit
        in_place = f", with {_named(new)} in place" if new else ""
        self._say(
            f"lost {', '.join(f'rank {member}{self._why(member)}' for member in lost)} in epoch "
            f"{position.epoch}: {self._world.size} go on{in_place}, after {1e3 * seconds:.0f} ms"
        )
        if self._world.rank == 0 and isinstance(self._tracker, NoTracker):
            self._tracker = open_tracker(self._config, self._folder, self.history.epochs, self._say)

    def after_next_commit(self, seconds: float) -> None:
        """A round is committed again, so many seconds after a loss was found."""
        for place, fault in enumerate(self.history.losses):
            if place >= self.history.told:
                after_s = seconds + (fault.detected_after_s or 0)
                self.history.losses[place] = fault.model_copy(update={"recovered_after_s": after_s})
        self.history.told = len(self.history.losses)

    def _why(self, member: int) -> str:
        """Why a rank ended, in brackets, if it is known."""
        words = self._folder.read_words(member)
        return f" ({words['message']})" if words else ""

    def _faults(self) -> list[Fault]:
        """All so far: ranks that were lost, and what was injected and did not end its rank."""
        if not self._config.fault:
            return self.history.losses
        marks = [mark for mark in read_marks(self._folder.faults) if mark.kind not in DEADLY]
        harmless = [
            Fault(
                rank=mark.rank,
                kind=mark.kind,
                epoch=mark.epoch,
                step=mark.step,
                action="dropped" if mark.kind == "nan" else "none",
            )
            for mark in marks
        ]
        return sorted([*self.history.losses, *harmless], key=lambda fault: fault.epoch)

    def save_checkpoint(self, epoch: int) -> None:
        """Write the checkpoint of `epoch`; all ranks together."""
        synchroniser = self._job.synchroniser
        workers = self._world.size - self._job.first_worker
        writers = {"keep": workers, "average": 1, "reset": 0}[self._config.optimizer_state]
        worker = self._job.worker
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
                    "samples": vars(self._tally()),
                    "rounds": synchroniser.state.rounds,
                    "config": self._config.model_dump(mode="json"),
                },
            )
            if epoch == 0:
                self._checkpoints.finish(self._world)  # a run that has a record can be resumed

    def write(self, outcome: Outcome, message: str | None = None, *, ended: int | None = None) -> Record:
        """Gather all ranks' ledgers and write record and timelines; all ranks together.

        `ended` is the epoch that ends with it.
        """
        self._world.reconcile()
        if outcome != "running":
            with self._world.ledger.phase("checkpoint"):
                self._checkpoints.finish(self._world)
            self._world.reconcile()  # nobody will tell later what was waiting in the first one
        self._save_timeline(ended)
        world, measured = self._world, dict(self._job.synchroniser.state.measured)
        mine = accounting.rank_row(world, self._role, self._threads, measured)
        live = [Rank(**row) for row in world.allgather_object(mine)]
        self.history.rows |= {row.rank: row for row in live}
        told = self.history.spares | self.history.dead | {row.rank: row for row in live}
        rows = [told[rank] for rank in sorted(told)]
        record = Record(
            schema_version=SCHEMA_VERSION,
            rankwise_version=metadata.version("rankwise"),
            started_at=self.history.started_at,
            launched_at=self.history.launched_at,
            first_step_s=self.history.first_step_s,
            wall_s=live[0].wall_ns / 1e9,
            elapsed_s=self.history.elapsed_before_s + live[0].wall_ns / 1e9,
            outcome=outcome,
            message=message,
            resumed_from_epoch=self._start.epoch if self._start else None,
            config=self._config.model_dump(mode="json"),
            environment=self._environment,
            epochs=self.history.epochs,
            target=self.target,
            ranks=rows,
            clock=Clock(
                error_bound_ns=self._world.clock_error_ns, violations=self._world.exchange_log.violations
            ),
            cpu_percent=accounting.cpu_percent(rows, self._environment.hosts),
            efficiency=accounting.efficiency(rows),
            samples=Samples(**vars(self._tally())),
            faults=self._faults(),
        )
        if self._world.rank == 0:
            with self._world.ledger.phase("checkpoint"):
                self._folder.write(record)
            if outcome != "running":
                self._folder.progress.unlink(missing_ok=True)
                self._folder.beats.unlink(missing_ok=True)
                self._tracker.finish(record)
        return record

    def complete(self) -> Record:
        """Write the last record, and the last checkpoint again if it was lost with a rank; all together."""
        if any(self._world.allgather_object(self._checkpoints.gave_up)):
            self.save_checkpoint(self.history.epochs[-1].epoch)
        return self.write("completed")

    def _tally(self) -> _Tally:
        """Over all epochs so far."""
        return _Tally(
            *(sum(column) for column in zip(*map(astuple, self.history.tallies.values()), strict=True))
        )

    @property
    def _role(self) -> Role:
        return "master" if self._job.worker is None else "worker"

    def _save_timeline(self, ended: int | None) -> None:
        world, ledger = self._world, self._world.ledger
        if ended is not None:
            world.timeline.epoch(ended)
        with ledger.phase("instrument"):
            world.timeline.save(
                self._folder.timeline_of(world.number),
                rank=world.number,
                role=self._role,
                host=machine.host_name(),
                to_common=world.since_start,
            )


def _named(members: list[int]) -> str:
    return ", ".join(f"rank {member}" for member in members)


def _recovered(fault: Fault) -> Fault:
    """A fault after which the run goes on now."""
    if fault.recovered_after_s is not None or fault.found_at is None:
        return fault
    after_s = seconds_since(fault.found_at) + (fault.detected_after_s or 0)
    return fault.model_copy(update={"recovered_after_s": after_s})
