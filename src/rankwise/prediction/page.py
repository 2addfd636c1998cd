"""A prediction for people: a table for the terminal, and a page with curves."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable

from rankwise.prediction.interval import LEVEL, Doubt
from rankwise.prediction.points import Point
from rankwise.prediction.predict import UNKNOWN, Prediction
from rankwise.report.charts.learning import HEIGHT
from rankwise.report.page import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    YELLOW,
    Chart,
    Number,
    Numbers,
    Page,
    Paragraph,
    Row,
    Section,
    Spec,
    Table,
)
from rankwise.report.words import count, duration, percent

COLOURS = {
    "compute": BLUE,
    "cores": SKY,
    "waiting": ORANGE,
    "transfer": VERMILION,
    "master": YELLOW,
    "evaluation": PURPLE,
    "checkpoint": GREEN,
    "other": GREY,
}
"""Of each part of an epoch."""

COLUMNS = (
    "ranks",
    "hosts",
    "epoch",
    "from",
    "to",
    "images/s",
    "eff.",
    "wait",
    "MB sent",
    "MB RAM",
    "most of it",
)


def terminal(prediction: Prediction) -> RenderableType:
    """A table of the points, with what it was made from and what it does not know."""
    title = f"An epoch of {prediction.about}, predicted from {prediction.source}"
    table = RichTable(box=SIMPLE_HEAD, padding=0)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[-1] else "right", no_wrap=True)
    for point in prediction.points:
        table.add_row(*_cells(point))
    return Group(title, table, *_sentences(prediction))


def page(prediction: Prediction) -> Page:
    """The page about a prediction."""
    best = prediction.best
    glance = Numbers(
        (
            Number("best number of ranks", f"{best.ranks:,}", "more make no epoch 1% shorter"),
            Number(
                "epoch there", duration(best.epoch_s), f"{duration(best.low_s)} to {duration(best.high_s)}"
            ),
            Number("images a second", f"{best.images_per_s:,.0f}", f"efficiency {percent(best.efficiency)}"),
            Number("most of the epoch", best.limit, ""),
        )
    )
    rows = tuple(_cells(point) for point in prediction.points)
    return Page(
        "An epoch on more ranks, predicted",
        f"{prediction.about}; from {prediction.source}; network: {prediction.network}.",
        (
            Section("At a glance", (glance,)),
            Section("Over ranks", (Row((_epochs(prediction), _speed(prediction))),)),
            Section("What an epoch is made of", (_parts(prediction),)),
            Section("All points", (Table(COLUMNS, rows),)),
            Section("How far to trust it", tuple(Paragraph(line) for line in _sentences(prediction)[1:])),
        ),
    )


def _sentences(prediction: Prediction) -> list[str]:
    best = prediction.best
    return [
        f"best: {count(best.ranks, 'rank')}, {duration(best.epoch_s)} an epoch; most of it is {best.limit}",
        *(f"assumed: {line}" for line in prediction.remarks),
        *(f"not measured: {line}" for line in prediction.narrower),
        f"from and to are to hold {LEVEL:.0%} of what is measured; of {count(best.ranks, 'rank')}: "
        + ", ".join(map(partial(_doubt, best), best.doubts)),
        "not known: " + "; ".join(UNKNOWN),
    ]


def _doubt(point: Point, doubt: Doubt) -> str:
    below, above = doubt.below_s / point.epoch_s, doubt.above_s / point.epoch_s
    return f"{doubt.name} {-below:+.0%} to {above:+.0%}"


def _cells(point: Point) -> tuple[str, ...]:
    return (
        f"{point.ranks:,}",
        f"{point.hosts:,}",
        duration(point.epoch_s),
        duration(point.low_s),
        duration(point.high_s),
        f"{point.images_per_s:,.0f}",
        percent(point.efficiency),
        percent(point.wait_fraction),
        f"{point.bytes_sent / 1e6:,.0f}",
        f"{point.memory_bytes / 1e6:,.0f}",
        point.limit,
    )


def _epochs(prediction: Prediction) -> Chart:
    values = [
        {"ranks": p.ranks, "seconds": p.epoch_s, "low": p.low_s, "high": p.high_s} for p in prediction.points
    ]
    y = {"type": "quantitative", "scale": {"type": "log"}, "title": "seconds an epoch"}
    spec: Spec = {
        "data": {"values": values},
        "height": HEIGHT,
        "encoding": {"x": _ranks()},
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.25},
                "encoding": {"y": y | {"field": "low"}, "y2": {"field": "high"}},
            },
            {"mark": {"type": "line", "point": True}, "encoding": {"y": y | {"field": "seconds"}}},
        ],
    }
    best = prediction.best
    return Chart(
        spec,
        "Seconds of an epoch, evaluation and checkpoint included, with the interval.",
        f"Epoch time over ranks, shortest with {best.ranks} ranks: {duration(best.epoch_s)}.",
    )


def _speed(prediction: Prediction) -> Chart:
    values = [
        {"ranks": p.ranks, "images a second": p.images_per_s, "efficiency": p.efficiency}
        for p in prediction.points
    ]
    y = {"field": "images a second", "type": "quantitative"}
    spec: Spec = {
        "data": {"values": values},
        "height": HEIGHT,
        "mark": {"type": "line", "point": True, "tooltip": True},
        "encoding": {"x": _ranks(), "y": y},
    }
    return Chart(spec, "Images that all ranks together train a second.", "Throughput over ranks.")


def _parts(prediction: Prediction) -> Chart:
    values = [
        {"ranks": point.ranks, "part": part, "share": seconds / point.epoch_s, "seconds": seconds}
        for point in prediction.points
        for part, seconds in asdict(point.parts).items()
    ]
    spec: Spec = {
        "data": {"values": values},
        "height": HEIGHT,
        "mark": "bar",
        "encoding": {
            "x": {"field": "ranks", "type": "ordinal", "axis": {"labelAngle": 0}},
            "y": {"field": "share", "type": "quantitative", "axis": {"format": "~%"}},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": list(COLOURS), "range": list(COLOURS.values())},
                "legend": {"title": None, "orient": "bottom", "columns": 4},
            },
            "tooltip": [{"field": name} for name in ("ranks", "part", "seconds", "share")],
        },
    }
    return Chart(
        spec,
        "Shares of an epoch: computing as a rank alone would, more of it on shared cores, the slowest rank, "
        "transfer and packing, the master's serial work, evaluation, checkpoint, and the rest.",
        "What each epoch is made of, over ranks.",
    )


def _ranks() -> Spec:
    return {"field": "ranks", "type": "quantitative", "scale": {"type": "log", "base": 2, "nice": False}}
