"""What all ranks of a run know alike of it, so that any of them can write its record."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field

from pydantic import TypeAdapter, ValidationError

from rankwise.errors import ResumeError, one_line
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import EpochRow, Fault, Generation, Rank, Samples, Target, seconds_since, utc_before
from rankwise.training.goodput import Goodput

_EPOCHS = TypeAdapter(list[EpochRow])


@dataclass(frozen=True)
class SampleCounts:
    """Samples to train, samples trained, and those trained too often or not at all."""

    expected: int = 0
    trained: int = 0
    duplicated: int = 0
    lost: int = 0


@dataclass
class RunHistory:
    """What all ranks of a run know alike.

    `epochs` are over, `counts` has their samples by epoch, with those before a resume under 0. `rows` holds
    the rows of ranks as of the last record, `spares` those of ranks that stand by, and `dead` those of ranks
    that were lost, all by the numbers with which the ranks began. `losses` tells of the ranks that were lost;
    after the first `recovered` of them a round was committed again. The first sitting was asked for at
    `launched_at`; this sitting began at `started_at`, and the sittings before took `elapsed_before_s`.
    `first_step_s` is the time from the launch to the first step, None before it. `earlier` are generations
    of ranks that are over, of which the last wrote its last word `before_s` before this sitting began;
    `pause_s` is the time from then to the first step.
    """

    epochs: list[EpochRow]
    counts: dict[int, SampleCounts]
    spares: dict[int, Rank]
    losses: list[Fault]
    recovered: int
    launched_at: str
    started_at: str
    elapsed_before_s: float
    first_step_s: float | None
    goodput: Goodput
    earlier: list[Generation] = field(default_factory=list)
    before_s: float | None = None
    pause_s: float | None = None
    rows: dict[int, Rank] = field(default_factory=dict)
    dead: dict[int, Rank] = field(default_factory=dict)

    @classmethod
    def begin(
        cls, folder: RunFolder, start: Checkpoint | None, spares: list[Rank], *, ranks: int, age_s: float
    ) -> RunHistory:
        """As a sitting of `ranks` begins whose processes are `age_s` old: after `start`, if there is one,
        and the record of the sitting before. Raises ResumeError if their contents do not fit."""
        started_at = utc_before(age_s)
        before = folder.read() if start and folder.record.exists() else None
        launched_at = folder.launched_at or started_at
        notes = start.notes if start else {"epochs": [], "samples": {}}
        faults = before.faults if before else []
        losses = [_over(fault) for fault in faults if fault.action in ("continue", "restart")]
        try:
            return cls(
                epochs=_EPOCHS.validate_python(notes["epochs"]),
                counts={0: SampleCounts(**notes["samples"])},
                spares={row.rank: row for row in spares},
                losses=losses,
                recovered=len(losses),
                launched_at=(before.launched_at or before.started_at) if before else launched_at,
                started_at=started_at,
                elapsed_before_s=before.elapsed_before_s(started_at) if before else 0.0,
                first_step_s=before.first_step_s if before else None,
                earlier=before.as_earlier() if before else [],
                before_s=seconds_since(before.written_at) - age_s if before and before.written_at else None,
                goodput=Goodput.after(
                    before, ranks, notes.get("saved_at"), began_at=utc_before(age_s, "milliseconds")
                ),
            )
        except (KeyError, TypeError, ValidationError) as error:
            raise ResumeError(
                f"the notes of the checkpoint do not fit this rankwise: {one_line(error)[:200]}"
            ) from None

    @property
    def samples(self) -> Samples:
        """Over all epochs so far."""
        columns = zip(*map(astuple, self.counts.values()), strict=True)
        return Samples(**vars(SampleCounts(*map(sum, columns))))

    def target(self, accuracy: float | None) -> Target | None:
        """Whether the epochs so far reach an accuracy, None if the run has none to reach."""
        return Target.of(accuracy, self.epochs, self.first_step_s)

    def training_begins(self, now_s: float | None) -> None:
        """The first step of the sitting is next, `now_s` after its processes were started; None on a rank
        that comes in later."""
        if now_s is not None:
            self.goodput.training_begins(now_s)
            if self.before_s is not None:
                self.pause_s = self.before_s + now_s
        if self.first_step_s is None:
            self.first_step_s = seconds_since(self.launched_at)

    def add_epoch(self, row: EpochRow, counts: SampleCounts) -> None:
        """An epoch is over; if it was before, this one takes its place."""
        if self.epochs and self.epochs[-1].epoch == row.epoch:
            self.epochs.pop()
        self.epochs.append(row)
        self.counts[row.epoch] = counts

    def add_loss(self, fault: Fault, *, found_s: float, recovery_s: float) -> None:
        """A rank was lost, `found_s` after the sitting began, and going on without it took `recovery_s`."""
        row = self.rows.get(fault.rank)
        if row is not None:
            self.dead[fault.rank] = row.model_copy(update={"died_at_s": found_s})
        self.losses.append(_recovered_after(fault, recovery_s))

    def all_recovered(self, seconds: float | None = None) -> None:
        """A round is committed again, `seconds` after the last loss was found; None if there is no round to
        commit."""
        if seconds is not None:
            pending = self.losses[self.recovered :]
            self.losses[self.recovered :] = [_recovered_after(fault, seconds) for fault in pending]
        self.recovered = len(self.losses)

    def add_rows(self, live: list[Rank]) -> list[Rank]:
        """The rows of all ranks of the run, in the order of their numbers, of which these live."""
        its = {row.rank: row for row in live}
        self.rows |= its
        known = self.spares | self.dead | its
        return [known[rank] for rank in sorted(known)]


def _recovered_after(fault: Fault, seconds: float) -> Fault:
    """A fault from which the run recovered `seconds` after it was found."""
    after_s = seconds + (fault.detected_after_s or 0)
    return fault.model_copy(update={"recovered_after_s": after_s})


def _over(fault: Fault) -> Fault:
    """A fault of a sitting before, after which the run goes on now."""
    if fault.recovered_after_s is not None or fault.found_at is None:
        return fault
    return _recovered_after(fault, seconds_since(fault.found_at))
