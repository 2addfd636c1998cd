"""What the pages of all studies say alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rankwise.report import run_tables
from rankwise.report.page import Block, Paragraph
from rankwise.report.runs import Run
from rankwise.runs.record import Record


def how_to_run(command: str, more: str = "") -> Paragraph:
    """What runs a study again, and `more` to say of it."""
    text = (
        f"{command}, with --output and this folder, keeps what is finished here, runs what is missing, and "
        "writes this page anew."
    )
    return Paragraph(f"{text} {more}".rstrip())


def machines(records: Sequence[Record]) -> Iterable[Block]:
    """What all runs ran on, as the one with the most ranks saw it; nothing without runs."""
    if records:
        yield from run_tables.environments([Run("all runs", max(records, key=lambda run: len(run.ranks)))])


def options(given: Mapping[str, object]) -> str:
    """Options as they are typed."""
    return ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in given.items())
