"""What a person sees while a run goes on, read from the run folder alone."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from rankwise.report import words
from rankwise.report.progress_bar import make_bar
from rankwise.runs.folder import RunFolder
from rankwise.runs.progress import read_progress
from rankwise.survival.beats import Slow, slow_ranks

REFRESH_S = 0.25


class Display:
    """A live bar on a terminal, one line per epoch elsewhere; used as a context manager.

    It runs beside the ranks, in the launcher or in a thread of the only rank, and polls the folder:
    ranks never print. Without `epochs` the record tells how many there are. A rank that has been in one phase
    for `slow_after_s` seconds is shown as slow.
    """

    def __init__(
        self,
        folder: RunFolder,
        console: Console,
        *,
        epochs: int,
        samples_per_epoch: int,
        live: bool,
        epochs_done: int = 0,
        slow_after_s: float = math.inf,
    ) -> None:
        self._folder = folder
        self._console = console
        self._epochs = epochs
        self._samples_per_epoch = samples_per_epoch
        self._bar = _bar(console) if live else None
        self._task = TaskID(0)
        self._shown = epochs_done
        self._accuracy = ""
        self._slow_after_s = slow_after_s
        self._said_s: dict[tuple[int, str], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="display", daemon=True)

    def __enter__(self) -> Display:
        if self._bar:
            self._bar.start()
            total = self._epochs * self._samples_per_epoch or None  # a program does not say beforehand
            done = self._shown * self._samples_per_epoch
            self._task = self._bar.add_task("starting ranks", total=total, completed=done, rate="", state="")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._poll()
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Show a line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _watch(self) -> None:
        while not self._over.wait(REFRESH_S):
            self._poll(slow_ranks(self._folder.beats, self._slow_after_s))

    def _poll(self, slow: Sequence[Slow] = ()) -> None:
        new = self._new_epochs()
        if new and not self._epochs:
            self._epochs = self._folder.epochs_to_come()
        for row in new:
            if row["val_accuracy"] is not None:
                self._accuracy = f"accuracy {row['val_accuracy']:.1%}"
            if not self._bar:
                self.say(epoch_line(row, self._epochs))
        for each in slow:
            # Again only where it has become twice as slow: each batch of an evaluation may be.
            if each.seconds >= 2 * self._said_s.get((each.rank, each.phase), 0.0):
                self._said_s[each.rank, each.phase] = each.seconds
                self.say(str(each))
        if self._bar:
            self._move(self._bar)

    def _move(self, bar: Progress) -> None:
        standing = read_progress(self._folder.progress)
        if standing is None:
            return
        speed = bar.tasks[0].speed
        loss = "" if standing.loss is None else f"loss {standing.loss:.3f}"
        bar.update(
            self._task,
            completed=(standing.epoch - 1) * self._samples_per_epoch + standing.samples,
            description=f"epoch {_of(standing.epoch, self._epochs)}",
            rate=f"{speed:,.0f} samples/s" if speed else "",
            state=f"{loss}  {self._accuracy}".strip(),
        )

    def _new_epochs(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl that are whole and were not shown yet."""
        rows = self._folder.read_metrics()
        # A resumed run starts the file anew with the epochs of its checkpoint: the rest comes again.
        self._shown = min(self._shown, rows[-1]["epoch"] if rows else 0)
        new = [row for row in rows if row["epoch"] > self._shown]
        self._shown += len(new)
        return new


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in one line of text."""
    evaluated = "" if row["val_loss"] is None else f"val loss {row['val_loss']:.4f}  "
    if row["val_accuracy"] is not None:
        evaluated += f"accuracy {row['val_accuracy']:.2%}  "
    return (
        f"epoch {_of(row['epoch'], epochs)}  train loss {words.loss(row['train_loss'])}  "
        f"{evaluated}{row['wall_s']:.1f} s  "
        f"{row['train_samples'] / row['train_s']:,.0f} samples/s"
    )


def _of(epoch: int, epochs: int) -> str:
    """An epoch of so many, if that is known."""
    return f"{epoch:>{len(str(epochs))}}/{epochs}" if epochs else str(epoch)


def _bar(console: Console) -> Progress:
    rate, state = "{task.fields[rate]}", "{task.fields[state]}"
    return make_bar(console, rate, state, TimeElapsedColumn(), "left", TimeRemainingColumn())
