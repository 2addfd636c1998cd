"""The progress bar of all commands: what is done now, the bar, and what its user has to say beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

PERCENT = "{task.percentage:>3.0f}%"


def make_bar(console: Console, *columns: str | ProgressColumn) -> Progress:
    """A bar behind its task's description, and columns behind the bar: formats of a rich task, or rich's own.

    Where `console` is not a terminal, nothing is shown.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        *(TextColumn(column) if isinstance(column, str) else column for column in columns),
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=20,
    )


@contextlib.contextmanager
def showing_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for longer work that reports (what, done, total); it appears with the first report."""
    bar = make_bar(console, PERCENT, TimeRemainingColumn())
    tasks: dict[str, TaskID] = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bar.start()
            tasks[what] = bar.add_task(what)
            if not console.is_terminal:
                console.print(what, markup=False, highlight=False)
        bar.update(tasks[what], completed=done, total=total)

    try:
        yield report
    finally:
        bar.stop()
