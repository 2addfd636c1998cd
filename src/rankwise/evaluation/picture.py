"""A confusion matrix as a picture, drawn by Vega-Lite as a report's charts are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import vl_convert

from rankwise.errors import StorageError, UsageError
from rankwise.evaluation.scores import Evaluation
from rankwise.report.page import BLUE, Spec
from rankwise.system.files import write_atomically

MOST_CLASSES = 40
"""Classes in a picture that can still be read."""

SUFFIXES = (".svg", ".png")


def check_picture(path: Path) -> None:
    """Raises UsageError, before anything is computed, for a kind of picture that there is not."""
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"--output {path} was given, expected a picture that ends in {' or '.join(SUFFIXES)}"
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path} was given, but there is no folder {path.absolute().parent}")


def draw(found: Evaluation, path: Path) -> None:
    """Write the picture. Raises UsageError if it cannot be written."""
    spec = matrix(found)
    if path.suffix.lower() == ".png":
        content = vl_convert.vegalite_to_png(spec, scale=2)
    else:
        content = vl_convert.vegalite_to_svg(spec).encode()
    try:
        write_atomically(path, content)
    except StorageError as error:
        raise UsageError(f"{error}; choose another --output") from None


def matrix(found: Evaluation) -> Spec:
    """Rows are what images are, columns what they are taken for; each row adds up to 100%. Of many classes
    those that are mistaken most."""
    shown = _shown(found)
    names = _distinct([found.classes[at] for at in shown])
    values: list[dict[str, Any]] = []
    for at, name in zip(shown, names, strict=True):
        row = found.confusion[at]
        for other, taken in zip(shown, names, strict=True):
            part = float(row[other] / row.sum()) if row.sum() else 0.0
            values.append({"true": name, "taken for": taken, "count": int(row[other]), "part": part})
    few = len(shown) <= 20
    left_out = "" if len(shown) == len(found.classes) else f", the {len(shown)} classes mistaken most"
    place: Spec = {
        "y": {"field": "true", "type": "nominal", "sort": names, "title": "is", "axis": {"grid": False}},
        "x": {
            "field": "taken for",
            "type": "nominal",
            "sort": names,
            "title": "is taken for",
            "axis": {"grid": False, "labelAngle": -45},
        },
    }
    text: Spec = {
        "mark": {"type": "text", "fontSize": 11},
        "encoding": {
            "text": {"field": "count", "type": "quantitative"},
            "color": {"condition": {"test": "datum.part > 0.5", "value": "white"}, "value": "#222222"},
            "opacity": {"condition": {"test": "datum.count > 0", "value": 1}, "value": 0},
        },
    }
    tiles: Spec = {
        "mark": {"type": "rect", "stroke": "#dddddd", "strokeWidth": 0.5},
        "encoding": {
            "color": {
                "field": "part",
                "type": "quantitative",
                "scale": {"domain": [0, 1], "range": ["#ffffff", BLUE], "interpolate": "rgb"},
                "legend": {"title": "of its row", "format": "%"},
            }
        },
    }
    return {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "background": "white",
        "config": {"font": "sans-serif", "view": {"stroke": None}},
        "title": {
            "text": f"{found.accuracy:.2%} of {found.samples:,} right{left_out}",
            "subtitle": found.subject,
            "anchor": "start",
        },
        "data": {"values": values},
        "width": {"step": 34 if few else 16},
        "height": {"step": 34 if few else 16},
        "encoding": place,
        "layer": [tiles, text] if few else [tiles],
    }


def _shown(found: Evaluation) -> list[int]:
    """The classes of the picture, in their order."""
    if len(found.classes) <= MOST_CLASSES:
        return list(range(len(found.classes)))
    wrong = found.confusion - np.diag(found.confusion.diagonal())
    mistaken = wrong.sum(0) + wrong.sum(1)
    return sorted(np.argsort(-mistaken, kind="stable")[:MOST_CLASSES].tolist())


def _distinct(names: list[str]) -> list[str]:
    """Names short enough for an axis, and no two alike."""
    short = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
    return [name if short.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(short)]
