"""How a run learns, and how fast: accuracy, loss and throughput over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from rankwise.report.page import BLUE, PURPLE, Chart, Spec
from rankwise.report.runs import Run

HEIGHT = 240
"""Pixels of a chart whose height says nothing."""


def has(run: Run, *keys: str) -> bool:
    """Whether an epoch of a run has a number under one of these keys."""
    return any(getattr(row, key) is not None for row in run.record.epochs for key in keys)


def accuracy(runs: Sequence[Run]) -> Chart:
    """Validation accuracy over epochs, one line per run."""
    values: list[dict[str, Any]] = [
        {"run": run.name, "epoch": row.epoch, "accuracy": row.val_accuracy}
        for run in runs
        for row in run.record.evaluated
    ]
    best = max(values, key=lambda value: value["accuracy"])
    return Chart(
        line_chart(values, "epoch", "accuracy", "run", "~%"),
        "Accuracy on the validation samples, after each epoch that was evaluated.",
        f"Accuracy over epochs, at best {best['accuracy']:.2%} in epoch {best['epoch']} of {best['run']}.",
    )


def accuracy_over_time(runs: Sequence[Run]) -> Chart:
    """Validation accuracy over the seconds that the epochs took, one line per run."""
    values = [
        {"run": run.name, "seconds": seconds, "accuracy": row.val_accuracy}
        for run in runs
        for row, seconds in zip(
            run.record.epochs, accumulate(row.wall_s for row in run.record.epochs), strict=True
        )
        if row.val_accuracy is not None
    ]
    return Chart(
        line_chart(values, "seconds", "accuracy", "run", "~%"),
        "The same over the seconds of all epochs so far, evaluation and checkpoints included, start-up not.",
        "Accuracy over seconds.",
    )


def loss(runs: Sequence[Run]) -> Chart:
    """Training and validation loss of one run over epochs; of several runs the validation loss, or that in
    training if none has another."""
    alone = len(runs) == 1
    key = "val_loss" if any(has(run, "val_loss") for run in runs) else "train_loss"
    lines = {"training": "train_loss", "validation": "val_loss"} if alone else {"": key}
    values = [
        {"line": line or run.name, "epoch": row.epoch, "loss": getattr(row, key)}
        for run in runs
        for line, key in lines.items()
        for row in run.record.epochs
        if getattr(row, key) is not None
    ]
    caption = "Loss on the validation samples." if key == "val_loss" else "Loss in training."
    if alone:
        caption = "Loss in training, the mean over an epoch, and on the validation samples after it."
    return Chart(line_chart(values, "epoch", "loss", "line"), caption, "Loss over epochs.")


def throughput(runs: Sequence[Run]) -> Chart:
    """Samples trained a second in each epoch, one line per run."""
    values = [
        {"run": run.name, "epoch": row.epoch, "samples a second": row.samples_per_s}
        for run in runs
        for row in run.record.epochs
    ]
    return Chart(
        line_chart(values, "epoch", "samples a second", "run", ",.0f", from_zero=True),
        "Training samples a second, of all ranks together, without evaluation and checkpoints.",
        "Throughput over epochs.",
    )


def epoch_seconds(run: Run) -> Chart:
    """Where the seconds of each epoch went: training and exchange, or evaluation and saving."""
    parts = {"training and exchange": BLUE, "evaluation and saving": PURPLE}
    values = [
        {"epoch": row.epoch, "part": part, "seconds": seconds}
        for row in run.record.epochs
        for part, seconds in zip(parts, (row.train_s, row.wall_s - row.train_s), strict=True)
    ]
    spec: Spec = {
        "data": {"values": values},
        "height": HEIGHT,
        "mark": "bar",
        "encoding": {
            "x": {"field": "epoch", "type": "ordinal", "axis": {"labelAngle": 0}},
            "y": {"field": "seconds", "type": "quantitative"},
            "color": {
                "field": "part",
                "type": "nominal",
                "scale": {"domain": list(parts), "range": list(parts.values())},
                "legend": {"title": None, "orient": "bottom"},
            },
            "tooltip": [{"field": name} for name in ("epoch", "part", "seconds")],
        },
    }
    return Chart(spec, "Seconds of each epoch.", "Bars of seconds an epoch, each in two parts.")


def line_chart(
    values: Sequence[dict[str, Any]],
    x: str,
    y: str,
    line: str,
    y_format: str = "",
    *,
    from_zero: bool = False,
) -> Spec:
    """Lines with a point a value; the point nearest to the pointer tells its numbers."""
    several = len({value[line] for value in values}) > 1
    whole = x == "epoch"
    near = {
        "name": "near",
        "select": {"type": "point", "on": "pointerover", "nearest": True, "clear": "pointerout"},
    }
    return {
        "data": {"values": values},
        "height": HEIGHT,
        "encoding": {
            "x": {
                "field": x,
                "type": "quantitative",
                "axis": {"tickMinStep": 1, "format": "d"} if whole else {},
                "scale": {"zero": not whole, "nice": not whole},
            },
            "y": {
                "field": y,
                "type": "quantitative",
                "axis": {"format": y_format},
                "scale": {"zero": from_zero},
            },
            "color": {
                "field": line,
                "type": "nominal",
                "sort": None,
                "legend": {"title": None, "orient": "bottom"} if several else None,
            },
            "tooltip": [{"field": name} for name in (line, x, y)],
        },
        "layer": [
            {"mark": {"type": "line", "tooltip": None}},
            {
                "params": [near],
                "mark": {"type": "point", "filled": True, "opacity": 1},
                "encoding": {
                    "size": {"condition": {"param": "near", "empty": False, "value": 90}, "value": 20}
                },
            },
        ],
    }
