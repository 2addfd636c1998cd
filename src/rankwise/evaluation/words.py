"""An evaluation for the terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table

from rankwise.evaluation.scores import ClassScores, Evaluation, Guess
from rankwise.evaluation.trained import TrainedRun

MOST_ROWS = 30


def heading(run: TrainedRun) -> str:
    """Which weights were looked at."""
    weights = run.weights
    what = "the averaged weights" if weights.averaged else "the weights"
    then = "" if weights.accuracy is None else f" (validation accuracy then {weights.accuracy:.2%})"
    when = f"after epoch {weights.epoch}" if weights.is_of_whole_epoch else "on the way through an epoch"
    return f"{run.plan.model} with {what} of {run.path} {when}{then}"


def scores(found: Evaluation) -> RenderableType:
    """Accuracy, loss, and each class; of many classes those that are found least."""
    table = Table(title=f"{found.subject}: accuracy {found.accuracy:.2%}, loss {found.loss:.4f}")
    table.add_column("class")
    for column in ("images", "found", "rightly taken for it"):
        table.add_column(column, justify="right")
    table.add_column("most often mistaken for")
    rows = list(enumerate(found.by_class))
    if len(rows) > MOST_ROWS:
        with_images = [row for row in rows if row[1].recall is not None]
        rows = sorted(with_images, key=lambda row: row[1].recall or 0.0)[:MOST_ROWS]
        table.caption = f"the {len(rows)} of {len(found.classes)} classes that are found least"
    for at, each in rows:
        table.add_row(*_cells(found, at, each))
    return Group(table)


def _cells(found: Evaluation, at: int, each: ClassScores) -> tuple[str, ...]:
    others = found.confusion[at].copy()
    others[at] = 0
    worst = int(others.argmax())
    mistaken = f"{found.classes[worst]} ({others[worst]:,})" if others[worst] else ""
    return each.name, f"{each.samples:,}", _part(each.recall), _part(each.precision), mistaken


def _part(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def guesses(found: list[Guess]) -> RenderableType:
    """What each image is taken for."""
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("is taken for")
    table.add_column("probability", justify="right")
    table.add_column("or")
    for each in found:
        (name, probability), *others = each.top
        also = ", ".join(f"{other} {chance:.1%}" for other, chance in others[:2])
        table.add_row(each.file, name, f"{probability:.1%}", also)
    return table
