"""Speedup and efficiency of several runs over their ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rankwise.report.charts.learning import HEIGHT
from rankwise.report.page import Chart, Spec
from rankwise.report.runs import Run
from rankwise.runs.record import Record


def strategy(record: Record) -> str:
    """The strategy of a run, with its topology where it has one."""
    topology = record.config.get("topology")
    return f"{record.config['strategy']}{f', {topology}' if topology else ''}"


def scaling(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Speedup and efficiency of runs that have epochs, by their number of ranks; the first is the baseline.

    The baseline is the first run with the fewest ranks. A speedup is its median of seconds an epoch,
    evaluation and checkpoint included, over the run's; an efficiency is the speedup over the factor by
    which there are more ranks.
    """
    ordered = sorted(runs, key=lambda run: len(run.record.ranks))
    seconds = [run.record.median_epoch_s for run in ordered]
    rows = []
    for run, run_s in zip(ordered, seconds, strict=True):
        speedup = seconds[0] / run_s
        growth = len(run.record.ranks) / len(ordered[0].record.ranks)
        rows.append(
            {
                "run": run.name,
                "strategy": strategy(run.record),
                "ranks": len(run.record.ranks),
                "seconds an epoch": run_s,
                "speedup": speedup,
                "efficiency": speedup / growth,
            }
        )
    return rows


def speedup(runs: Sequence[Run]) -> Chart:
    """Speedup over ranks, beside the ideal."""
    rows = scaling(runs)
    first, last = rows[0]["ranks"], rows[-1]["ranks"]
    caption = (
        f"How many times faster an epoch is than in {rows[0]['run']}, the baseline with the fewest ranks "
        f"({first}): median of the epochs, evaluation and checkpoint included. Dashed: as many times "
        "faster as there are more ranks."
    )
    ideal = [{"ranks": ranks, "ideal": ranks / first} for ranks in (first, last)]
    return _over_ranks(rows, "speedup", ideal, "", caption)


def efficiency(runs: Sequence[Run]) -> Chart:
    """Efficiency over ranks."""
    rows = scaling(runs)
    ideal = [{"ranks": rows[end]["ranks"], "ideal": 1.0} for end in (0, -1)]
    caption = f"The speedup, divided by how many times more ranks there are than in {rows[0]['run']}."
    return _over_ranks(rows, "efficiency", ideal, "~%", caption)


def _over_ranks(
    rows: Sequence[dict[str, Any]], field: str, ideal: list[dict[str, Any]], y_format: str, caption: str
) -> Chart:
    x = {"field": "ranks", "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}}
    x["scale"] = {"zero": False}
    y = {"field": field, "type": "quantitative", "title": field, "axis": {"format": y_format}}
    colour = {"field": "strategy", "type": "nominal", "legend": {"title": None, "orient": "bottom"}}
    tooltip = [{"field": name} for name in ("run", "strategy", "ranks", field, "seconds an epoch")]
    spec: Spec = {
        "data": {"values": rows},
        "height": HEIGHT,
        "layer": [
            {
                "data": {"values": ideal},
                "mark": {"type": "line", "color": "currentColor", "opacity": 0.4, "strokeDash": [4, 4]},
                "encoding": {"x": x, "y": {"field": "ideal", "type": "quantitative"}},
            },
            {"mark": "line", "encoding": {"x": x, "y": y | {"aggregate": "mean"}, "color": colour}},
            {
                "mark": {"type": "point", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"x": x, "y": y, "color": colour, "tooltip": tooltip},
            },
        ],
    }
    last = rows[-1]
    return Chart(spec, caption, f"{field} over ranks: {last[field]:.2f} with {last['ranks']} ranks.")
