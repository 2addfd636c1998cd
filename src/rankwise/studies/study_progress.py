"""What a person sees of a study while it runs: one bar over all its runs, or a line per run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import TaskID

from rankwise.report.progress_bar import PERCENT, make_bar
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import read_progress
from rankwise.runs.record import Record


@dataclass(frozen=True)
class Pace:
    """What was expected of the runs so far, and what they took, in seconds: how wrong expectation is."""

    expected_s: float = 0.0
    taken_s: float = 0.0

    def after(self, expected_s: float, taken_s: float) -> Pace:
        """The pace with one more run (or a part of one)."""
        return Pace(self.expected_s + expected_s, self.taken_s + taken_s)

    def seconds_for(self, expected_s: float) -> float:
        """How many seconds work of `expected_s` expected seconds will take."""
        return expected_s * (self.taken_s / self.expected_s if self.expected_s else 1.0)


class StudyProgress:
    """Shows a study on `console`; used as a context manager.

    `expected_s` are the expected seconds of each run, in their order. The time left learns from
    the runs that are finished.
    """

    def __init__(self, console: Console, expected_s: Sequence[float]) -> None:
        self._console = console
        self._expected_s = expected_s
        self._pace = Pace()
        self._done = 0
        self._kept = 0
        self._began_s = 0.0
        self._task = TaskID(0)
        self._bar = make_bar(console, PERCENT, "{task.fields[left]}") if console.is_terminal else None

    def __enter__(self) -> StudyProgress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=sum(self._expected_s), left="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def keep(self, record: Record) -> None:
        """The next run was finished by an earlier command."""
        self._kept += 1
        self._count(sum(row.wall_s for row in record.epochs))

    def start(self, name: str) -> None:
        """The next run begins."""
        if self._kept:
            self.say(f"{self._kept} of {len(self._expected_s)} runs are finished already: kept")
            self._kept = 0
        self._began_s = time.monotonic()
        self._show(f"{name}: starting ranks", 0.0)

    def look(self, name: str, folder: RunFolder, epochs: int, samples_per_epoch: int) -> None:
        """Show how far the running run is, by what it leaves in its folder."""
        standing = read_progress(folder.progress)
        if standing is None:
            return
        trained = (standing.epoch - 1) * samples_per_epoch + standing.samples
        rows = folder.read_metrics()
        evaluated = [row["val_accuracy"] for row in rows if row["val_accuracy"] is not None]
        losses = [row["val_loss"] for row in rows if row["val_loss"] is not None]
        state = f"{name}: epoch {standing.epoch}/{epochs}"
        if evaluated:
            state += f", accuracy {evaluated[-1]:.1%}"
        elif losses:
            state += f", held-out loss {losses[-1]:.3f}"
        self._show(state, min(1.0, trained / (epochs * samples_per_epoch)))

    def finish(self, name: str, record: Record) -> None:
        """The running run is finished."""
        took_s = time.monotonic() - self._began_s
        self._count(took_s)
        self._tell(f"{name}: {_result(record)}, {took_s:.0f} s")

    def fail(self, name: str, message: str) -> None:
        """The running run has failed for good."""
        self._count(time.monotonic() - self._began_s)
        self.say(f"{name} failed: {message}")

    def _count(self, taken_s: float) -> None:
        self._pace = self._pace.after(self._expected_s[self._done], taken_s)
        self._done += 1

    def _tell(self, line: str) -> None:
        if not self._bar:
            total = len(self._expected_s)
            left = self._left_text(sum(self._expected_s[self._done :]))
            self.say(f"[{self._done:>{len(str(total))}}/{total}] {line}; {left}")

    def _show(self, state: str, fraction: float) -> None:
        if not self._bar:
            return
        run_s = self._expected_s[self._done]
        done_s = sum(self._expected_s[: self._done]) + fraction * run_s
        self._bar.update(
            self._task,
            completed=done_s,
            description=f"run {self._done + 1} of {len(self._expected_s)}  {state}",
            left=self._left_text(sum(self._expected_s) - done_s),
        )

    def _left_text(self, expected_s: float) -> str:
        return f"about {in_words(self._pace.seconds_for(expected_s))} left"


def _result(record: Record) -> str:
    """What a run came to, in words: its best accuracy, or the last loss of one that has no accuracy."""
    losses = [row.val_loss for row in record.epochs if row.val_loss is not None]
    if losses and not record.evaluated:
        return f"held-out loss {losses[-1]:.3f}"
    best = max((row.val_accuracy for row in record.evaluated), default=0.0)
    return f"best accuracy {best:.2%}"


def in_words(seconds: float) -> str:
    """A duration as a person says it."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"
