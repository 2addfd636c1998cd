"""A comparison of runs for the terminal, and as markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from textwrap import wrap

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rankwise.report.comparison import Comparison

CELL = 16
"""Characters after which a name is broken in the terminal, so that several runs stand side by side."""


def terminal(comparison: Comparison, width: int) -> RenderableType:
    """A column for each run; as many beside each other as fit into `width` characters."""
    label_width = max(len(column.title) for column in comparison.shown)
    blocks: list[list[_Cells]] = [[]]
    left = width - label_width
    for name, row in zip(comparison.names, comparison.rows, strict=True):
        cells = _Cells(
            "\n".join(wrap(name, CELL)),
            ["\n".join(wrap(comparison.text(column, row), CELL)) for column in comparison.shown],
        )
        if blocks[-1] and left < cells.width:
            blocks.append([])
            left = width - label_width
        blocks[-1].append(cells)
        left -= cells.width
    parts: list[RenderableType] = [Text(line) for line in [comparison.shared_line()] if line]
    for block in blocks:
        table = Table(box=None, pad_edge=False)
        table.add_column("", no_wrap=True)
        for cells in block:
            table.add_column(cells.head, justify="right", no_wrap=True)
        for number, column in enumerate(comparison.shown):
            table.add_row(column.title, *(cells.values[number] for cells in block))
        parts += [Text(""), table]
    return Group(*parts)


@dataclass(frozen=True)
class _Cells:
    """A run's column in the terminal."""

    head: str
    values: Sequence[str]

    @property
    def width(self) -> int:
        """In characters, with the gap before it."""
        return 2 + max(len(line) for cell in (self.head, *self.values) for line in cell.splitlines())


def markdown(comparison: Comparison) -> str:
    """A table with a line for each run, below the settings that they share."""
    head = ["run", *(column.title for column in comparison.shown)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    for name, row in zip(comparison.names, comparison.rows, strict=True):
        lines.append([name, *(comparison.text(column, row) for column in comparison.shown)])
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    shared = comparison.shared_line()
    return f"{shared}\n\n{table}" if shared else table


def as_csv(comparison: Comparison) -> str:
    """A line for each run, all columns, raw values; empty where a run has none."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *(column.key for column in comparison.columns)])
    for name, row in zip(comparison.names, comparison.rows, strict=True):
        writer.writerow([name, *row.values()])
    return text.getvalue().rstrip("\n")


def as_json(comparison: Comparison) -> str:
    """All columns of all runs, raw, and the warnings."""
    rows = [{"run": name, **row} for name, row in zip(comparison.names, comparison.rows, strict=True)]
    return json.dumps({"runs": rows, "warnings": comparison.warnings}, indent=1)


WRITERS: dict[str, Callable[[Comparison], str]] = {"markdown": markdown, "csv": as_csv, "json": as_json}
"""The formats for other programs, by name."""
