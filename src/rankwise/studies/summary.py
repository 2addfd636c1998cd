"""A study at its end, in the terminal or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from rankwise.studies.study import Reproduction


def summary(done: Reproduction) -> RenderableType:
    """The verdicts, and where the page is."""
    table = Table(box=None)
    for column in ("claim", "verdict"):
        table.add_column(column)
    for verdict in done.verdicts:
        table.add_row(verdict.claim, verdict.answer)
    return Group(table, Text(f"page: {done.page}"))


def to_json(done: Reproduction) -> str:
    """The verdicts with their evidence, the page, and the tables that a study hands on, as lists of rows."""
    content: dict[str, object] = {"page": str(done.page), "verdicts": [asdict(v) for v in done.verdicts]}
    if done.tables:
        content["tables"] = {grid.name: grid.to_rows() for grid in done.tables}
    return json.dumps(content, indent=1, allow_nan=False)
