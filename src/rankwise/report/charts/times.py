"""Where the time of ranks went, and who waited for whom."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.ledger.timeline import RankTimeline
from rankwise.report.page import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILION, Chart, Spec, Table
from rankwise.report.runs import Run
from rankwise.report.summary import group_seconds
from rankwise.runs.record import Rank, Record

LABELS = {
    "start": "start-up",
    "train": "training",
    "wait": "waiting",
    "sync": "exchange",
    "eval": "evaluation",
    "save": "saving",
    "other": "other",
}
"""What the groups of phases are called in a chart."""

COLOURS = (GREY, BLUE, ORANGE, VERMILION, PURPLE, GREEN, "#7d6a58")
"""The colour of each group of phases."""

FEW = 12
"""The most ranks whose seconds are written into the map of waiting."""

MOST_RANKS = 64
"""How many ranks a map of waiting shows: it has a cell for each pair."""

MOST_WAITS = 100
"""How many waits are listed under their map."""


def rank_name(row: Rank | RankTimeline) -> str:
    """A rank in a chart: its number, and its role unless it is to work."""
    return str(row.rank) if row.role == "worker" else f"{row.rank} {row.role}"


def rank_bars(record: Record) -> Chart:
    """Where the seconds of each rank went: a stacked bar a rank."""
    seconds_of = {rank_name(row): group_seconds(row) for row in record.ranks}
    return bars("rank", seconds_of, "seconds", "Seconds of each rank; they add up to its wall time.")


def run_bars(runs: Sequence[Run]) -> Chart:
    """Where the seconds of each run went: a stacked bar a run, the mean over its ranks."""
    seconds_of = {}
    for run in runs:
        rows = [group_seconds(row) for row in run.record.ranks]
        seconds_of[run.name] = {
            group: sum(row[group] for row in rows) / max(len(rows), 1) for group in LABELS
        }
    return bars(
        "run", seconds_of, "seconds, mean of the ranks", "Seconds of each run, the mean of its ranks."
    )


def wait_map(record: Record) -> Chart:
    """Who waited for whom, and for how long. Of many ranks those that waited, or were waited for, most."""
    everybody = {str(row.rank): rank_name(row) for row in record.ranks}
    part_ns = Counter({str(row.rank): row.phases_ns["wait"] for row in record.ranks})
    for row in record.ranks:
        part_ns.update(row.wait_on_ns)
    shown = {rank for rank, _ in part_ns.most_common(MOST_RANKS)}
    names = {rank: name for rank, name in everybody.items() if rank in shown}
    few = len(names) <= FEW
    values: list[dict[str, Any]] = [
        {"waiting": names[str(row.rank)], "for": name, "seconds": row.wait_on_ns.get(other, 0) / 1e9}
        for row in record.ranks
        if str(row.rank) in shown
        for other, name in names.items()
    ]
    most_s = max(value["seconds"] for value in values)
    axis = {"type": "nominal", "sort": list(names.values())}
    colour = {
        "field": "seconds",
        "type": "quantitative",
        "scale": {"range": ["rgba(230,159,0,0.05)", "rgba(230,159,0,1)"], "domainMin": 0},
        "legend": None if few else {"gradientLength": 160},
    }
    cells: Spec = {
        "mark": {"type": "rect", "stroke": "currentColor", "strokeOpacity": 0.15 if few else 0},
        "encoding": {"color": colour, "tooltip": [{"field": name} for name in ("waiting", "for", "seconds")]},
    }
    on_full_colour = {"condition": {"test": f"datum.seconds > {0.7 * most_s}", "value": "#1a1a1a"}}
    words: Spec = {
        "mark": "text",
        "encoding": {
            "text": {"field": "seconds", "type": "quantitative", "format": ".3~r"},
            "color": on_full_colour | {"value": "currentColor"},
        },
    }
    spec: Spec = {
        "data": {"values": values},
        "height": height(len(names), widest=34),
        "encoding": {
            "x": axis
            | {"field": "for", "title": "rank waited for", "axis": {"labelAngle": 0, "grid": False}},
            "y": axis | {"field": "waiting", "title": "waiting rank", "axis": {"grid": False}},
        },
        "layer": [cells, words] if few else [cells],
    }
    waits = sorted((v for v in values if v["seconds"]), key=lambda v: v["seconds"], reverse=True)
    return Chart(
        spec,
        "Seconds that the rank of each line waited for the rank of each column, which caused the wait."
        + (
            f" The {len(names)} ranks with most waiting, of {len(everybody)}."
            if len(names) < len(everybody)
            else ""
        ),
        f"A map of waiting among {len(names)} ranks; the most is {most_s:.3g} s.",
        Table(
            ("waiting rank", "waited for", "seconds"),
            tuple((v["waiting"], v["for"], v["seconds"]) for v in waits[:MOST_WAITS]),
            f"The longest waits, {min(len(waits), MOST_WAITS)} of {len(waits)}",
            folded=True,
        ),
    )


def bars(
    name: str,
    seconds_of: Mapping[str, Mapping[str, float]],
    x_title: str,
    caption: str,
    labels: Mapping[str, str] = LABELS,
) -> Chart:
    """Stacked bars of groups of phases, which `labels` name; a click on the legend shows one group alone."""
    values = [
        {name: bar, "part": labels[group], "order": order, "seconds": seconds}
        for bar, groups in seconds_of.items()
        for order, (group, seconds) in enumerate(groups.items())
    ]
    spec: Spec = {
        "data": {"values": values},
        "height": height(len(seconds_of), widest=26),
        "params": [{"name": "shown", "select": {"type": "point", "fields": ["part"]}, "bind": "legend"}],
        "transform": [{"filter": {"param": "shown"}}],
        "mark": "bar",
        "encoding": {
            "y": {"field": name, "type": "nominal", "sort": None, "axis": {"grid": False, "labelLimit": 120}},
            "x": {"field": "seconds", "type": "quantitative", "title": x_title},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": list(labels.values()), "range": list(COLOURS)},
                "legend": {"title": None},
            },
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [{"field": field} for field in (name, "part", "seconds")],
        },
    }
    rows = tuple((bar, *groups.values(), sum(groups.values())) for bar, groups in seconds_of.items())
    return Chart(
        spec,
        f"{caption} A click on the legend shows a part alone, with Shift several.",
        f"A stacked bar for each {name}, {len(seconds_of)} in all.",
        Table((name, *labels.values(), "sum"), rows, f"Seconds of each {name}", folded=True),
    )


def height(lines: int, widest: int) -> int:
    """Pixels for a number of lines: wide ones for a few, so narrow that many still fit a screen."""
    return lines * max(min(widest, 640 // max(lines, 1)), 5)
