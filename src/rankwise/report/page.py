"""A page made of blocks: one HTML file that holds all it needs and sends no request.

Charts are Vega-Lite specifications, drawn in the reader's browser by Vega-Embed, whose JavaScript is
written into the page. Whatever comes from outside is text: no block takes HTML.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import vl_convert
from jinja2 import Environment, PackageLoader, StrictUndefined

from rankwise.errors import StorageError, UsageError
from rankwise.system.files import write_atomically

Spec = dict[str, Any]

# Okabe and Ito's colour-blind-safe palette, the light ones darkened so that they stand out on white too.
BLUE, ORANGE, GREEN, VERMILION, PURPLE, SKY, YELLOW = (
    "#1f7fc4",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#b5659a",
    "#4ba3d9",
    "#c2a800",
)
GREY = "#8a8f98"
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, YELLOW, GREY)

_INK = "currentColor"  # the page's text colour, so that charts follow light, dark and print
_CONFIG: Spec = {
    "background": None,
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "mark": {"color": BLUE},
    "axis": {
        "labelColor": _INK,
        "titleColor": _INK,
        "gridColor": _INK,
        "domainColor": _INK,
        "tickColor": _INK,
        "gridOpacity": 0.12,
        "domainOpacity": 0.4,
        "tickOpacity": 0.4,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "labelOverlap": True,
        "labelSeparation": 8,
    },
    "legend": {
        "labelColor": _INK,
        "titleColor": _INK,
        "labelFontSize": 12,
        "titleFontSize": 12,
        "titleFontWeight": "normal",
        "orient": "top",
        "direction": "horizontal",
        "symbolType": "square",
        "symbolStrokeWidth": 0,
        "labelLimit": 220,
    },
    "title": {"color": _INK, "fontSize": 13, "fontWeight": 600, "anchor": "start"},
    "text": {"color": _INK, "fontSize": 12},
    "rule": {"color": _INK},
    "range": {"category": list(PALETTE)},
}


@dataclass(frozen=True)
class Link:
    """A link inside a paragraph or a table; it leads to the web or to a file beside the page."""

    text: str
    href: str

    def __post_init__(self) -> None:
        scheme, colon, _ = self.href.partition(":")
        if colon and "/" not in scheme and scheme not in ("https", "http"):
            raise ValueError(f"a link leads to http(s) or to a file beside the page, not to {self.href!r}")


Text = str | tuple[str | Link, ...]
"""Words, with links between them where there are any."""

Cell = str | int | float | bool | Link | None
"""A number is right-aligned and shown with four digits or more; None is shown as missing."""


@dataclass(frozen=True)
class Paragraph:
    """Plain words, after a lead in bold where there is one."""

    kind: ClassVar = "paragraph"
    text: Text
    lead: str = ""


@dataclass(frozen=True)
class Notice:
    """Something is missing, or to be careful about."""

    kind: ClassVar = "notice"
    text: Text


@dataclass(frozen=True)
class Number:
    """A number that is read at a glance: its name, its value with its unit, and a remark."""

    name: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Numbers:
    """A few numbers side by side."""

    kind: ClassVar = "numbers"
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Table:
    """Rows of cells; `folded` ones are shown when the reader opens their caption."""

    kind: ClassVar = "table"
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A Vega-Lite specification of a single view or of layers, as wide as its place.

    The caption says what is seen, `alt` the same to who cannot see it. `table` holds the chart's numbers
    for reading; without it they are the rows of ``spec["data"]["values"]``.
    """

    kind: ClassVar = "chart"
    spec: Spec
    caption: str
    alt: str
    table: Table | None = None

    @property
    def numbers(self) -> Table:
        """The chart's numbers as a folded table."""
        if self.table:
            return self.table
        values = self.spec["data"]["values"]
        columns = tuple(values[0]) if values else ()
        rows = tuple(tuple(row.get(column) for column in columns) for row in values)
        return Table(columns, rows, "The numbers of this chart", folded=True)

    @property
    def complete_spec(self) -> Spec:
        """The specification as the browser gets it: with the page's look and the chart's description."""
        frame = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
        return {"config": _CONFIG, "description": self.alt, **frame, **self.spec}


@dataclass(frozen=True)
class Row:
    """Blocks side by side, below each other where there is no room."""

    kind: ClassVar = "row"
    blocks: tuple[Block, ...]


Block = Paragraph | Notice | Numbers | Table | Chart | Row


@dataclass(frozen=True)
class Section:
    """A part of a page under its own title."""

    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Page:
    """A page: what it is about, in one sentence or two, and its sections."""

    title: str
    lead: Text
    sections: tuple[Section, ...] = ()

    def to_html(self) -> str:
        """The page as one HTML document."""
        templates = Environment(
            loader=PackageLoader("rankwise.report", "assets"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        templates.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
        templates.filters |= {"cell": _cell, "is_number": _is_number, "parts": _parts}
        return templates.get_template("page.html").render(page=self, library=_library())

    def write(self, path: Path) -> None:
        """Write the page into a file. Raises UsageError if it cannot be written."""
        try:
            write_atomically(path, self.to_html().encode())
        except StorageError as error:
            raise UsageError(f"{error}; choose another --output") from None


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as JavaScript that makes `vegaEmbed` known; a second's work."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _parts(text: Text) -> tuple[str | Link, ...]:
    return (text,) if isinstance(text, str) else text


def _is_number(cell: Cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _cell(cell: Cell) -> str:
    match cell:
        case None:
            return "–"
        case bool():
            return "yes" if cell else "no"
        case int():
            return f"{cell:,}"
        case float():
            return f"{cell:,.0f}" if abs(cell) >= 1_000 else f"{cell:.4g}"
        case Link():
            return cell.text
    return cell
