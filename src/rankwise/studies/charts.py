"""The charts of a study's page: grids and records in, Vega-Lite specifications out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from rankwise.report.charts.learning import HEIGHT, line_chart
from rankwise.report.page import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, YELLOW, Chart, Spec
from rankwise.runs.record import Record
from rankwise.studies import paper
from rankwise.studies.grids import PART_NAMES, Grid
from rankwise.studies.ledgers import Communication, mean_breakdown

_PART_COLOURS = (SKY, BLUE, YELLOW, PURPLE, ORANGE, VERMILION, GREY)


def stopwatch_and_ledger(found: Mapping[str, Communication]) -> Chart:
    """The author's stopwatch beside the ledger, a group of bars for each kind of rank."""
    parts = {
        "the author's stopwatch": GREEN,
        "transfer by the ledger": VERMILION,
        "waiting by the ledger": ORANGE,
    }
    values = [
        {"ranks": name, "what": what, "seconds": seconds}
        for name, one in found.items()
        for what, seconds in zip(parts, (one.stopwatch_s, one.transfer_s, one.wait_s), strict=True)
    ]
    order = list(parts)
    bars: Spec = {"mark": "bar", "encoding": {"color": _colour("what", parts)}}
    words: Spec = {
        "mark": {"type": "text", "align": "left", "dx": 4},
        "encoding": {"text": {"field": "seconds", "format": ".2~f"}},
    }
    spec: Spec = {
        "data": {"values": values},
        "height": {"step": 17},
        "encoding": {
            "y": {
                "field": "ranks",
                "type": "nominal",
                "sort": None,
                "axis": {"title": None, "labelLimit": 200},
            },
            "yOffset": {"field": "what", "sort": order},
            "x": {"field": "seconds", "type": "quantitative", "title": f"seconds in {paper.EPOCHS} epochs"},
            "tooltip": [{"field": name} for name in ("ranks", "what", "seconds")],
        },
        "layer": [bars, words],
    }
    return Chart(
        spec,
        "One and the same run: what the author's stopwatch shows, and what the ledger counts.",
        "Bars: the stopwatch and the transfer are hardly to be seen beside the waiting.",
    )


def accuracy_by_epoch(runs: Mapping[str, Record]) -> Chart:
    """Validation accuracy over epochs, one line per run."""
    values = [
        {"run": name, "epoch": row.epoch, "accuracy": row.val_accuracy}
        for name, record in runs.items()
        for row in record.evaluated
    ]
    return _accuracy(values, "epoch", "The same number of epochs: more processes are behind.")


def accuracy_by_step(runs: Mapping[str, Record]) -> Chart:
    """The same over the steps that a worker has made."""
    values = [
        {"run": name, "steps of a worker": steps, "accuracy": row.val_accuracy}
        for name, record in runs.items()
        for row, steps in zip(record.epochs, accumulate(row.steps for row in record.epochs), strict=True)
    ]
    return _accuracy(values, "steps of a worker", "The same runs by how many steps each worker has made.")


def _accuracy(values: Sequence[dict[str, Any]], x: str, caption: str) -> Chart:
    spec = line_chart(values, x, "accuracy", "run", "~%")
    spec["encoding"]["color"]["legend"] |= {"columns": 2}
    return Chart(spec, caption, f"Accuracy. {caption}")


def single_process(grid: Grid) -> tuple[Chart, Chart]:
    """Figure 1: accuracy and losses over epochs, with what the paper says of its own."""
    epochs = [dict(zip(grid.columns, row, strict=True)) for row in grid.rows]
    accuracy = [{"epoch": row["epoch"], "accuracy (%)": row["accuracy (%)"]} for row in epochs]
    losses = [
        {"line": line, "epoch": row["epoch"], "loss": row[line]}
        for row in epochs
        for line in ("training loss", "validation loss")
    ]
    best = paper.BASELINE
    caption = (
        f"Dashed: the paper, {best.accuracy:.1%} and {best.val_loss} in epoch {paper.BASELINE_BEST_EPOCH}."
    )
    return (
        _with_rule(
            accuracy, "accuracy (%)", None, 100 * best.accuracy, f"Accuracy of one process. {caption}"
        ),
        _with_rule(losses, "loss", "line", best.val_loss, f"Losses of one process. {caption}"),
    )


def _with_rule(
    values: Sequence[Mapping[str, Any]], y: str, line: str | None, paper_value: float, caption: str
) -> Chart:
    """Lines over epochs, with a dashed rule and a point for the paper's best epoch."""
    theirs = {"values": [{"epoch": paper.BASELINE_BEST_EPOCH, y: paper_value}]}
    place = {
        "x": {"field": "epoch", "type": "quantitative", "axis": {"tickMinStep": 1, "format": "d"}},
        "y": {"field": y, "type": "quantitative", "scale": {"zero": False}},
    }
    colour = {"color": _colour(line, {"training loss": BLUE, "validation loss": PURPLE})} if line else {}
    spec: Spec = {
        "data": {"values": list(values)},
        "height": HEIGHT,
        "layer": [
            {"mark": {"type": "line", "point": True}, "encoding": place | colour},
            {"data": theirs, "mark": {"type": "rule", "strokeDash": [5, 4]}, "encoding": {"y": place["y"]}},
            {"data": theirs, "mark": {"type": "point", "size": 70, "color": VERMILION}, "encoding": place},
        ],
    }
    return Chart(spec, caption, caption)


def paper_figure_2() -> Chart:
    """The paper's stopwatches, a bar for each number of processes."""
    parts = {"data": SKY, "training": BLUE, "evaluation": PURPLE, "communication": VERMILION}
    values = [
        {"processes": ranks, "part": part, "order": order, "seconds": seconds}
        for ranks, row in paper.FIGURE_2.items()
        for order, (part, seconds) in enumerate(
            zip(
                parts,
                (
                    row.train_loading_s + row.test_loading_s,
                    row.training_s,
                    row.evaluation_s,
                    row.worker_communication_s + row.master_communication_s,
                ),
                strict=True,
            )
        )
    ]
    caption = f"The paper: what its stopwatches show for {paper.EPOCHS} epochs, on {paper.CORES} cores."
    return Chart(_stacked(values, parts, "seconds"), caption, f"{caption} Training is nearly all.")


def breakdowns(runs: Mapping[int, Sequence[Record]], epochs: int, caption: str) -> Chart:
    """Where the mean worker's time goes by the ledger, a bar for each number of processes."""
    values = [
        {"processes": ranks, "part": name, "order": order, "seconds": epochs * getattr(one, part)}
        for ranks, one in {ranks: mean_breakdown(records) for ranks, records in runs.items()}.items()
        for order, (part, name) in enumerate(PART_NAMES.items())
    ]
    unit = "seconds" if epochs > 1 else "seconds an epoch"
    parts = dict(zip(PART_NAMES.values(), _PART_COLOURS, strict=True))
    return Chart(_stacked(values, parts, unit), caption, f"Stacked bars. {caption}")


def _stacked(values: Sequence[Mapping[str, Any]], parts: Mapping[str, str], unit: str) -> Spec:
    return {
        "data": {"values": list(values)},
        "height": HEIGHT,
        "mark": "bar",
        "encoding": {
            "x": {"field": "processes", "type": "ordinal", "axis": {"labelAngle": 0}},
            "y": {"field": "seconds", "type": "quantitative", "title": unit},
            "color": _colour("part", parts),
            "order": {"field": "order", "type": "quantitative"},
            "tooltip": [{"field": name} for name in ("processes", "part", "seconds")],
        },
    }


def _colour(field: str, parts: Mapping[str, str]) -> Spec:
    return {
        "field": field,
        "type": "nominal",
        "scale": {"domain": list(parts), "range": list(parts.values())},
        "legend": {"title": None, "orient": "bottom", "columns": 2},
    }
