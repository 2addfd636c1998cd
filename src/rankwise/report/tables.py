"""Lists for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from rankwise.data import Dataset, Prepared


def datasets(known: Iterable[tuple[str, str]], prepared: Iterable[Prepared]) -> RenderableType:
    """What can be named, and what stands decoded in the cache."""
    names = Table(title="Datasets")
    names.add_column("name", no_wrap=True)
    names.add_column("what it is")
    for name, about in known:
        names.add_row(name, about)
    return Group(names, prepared_datasets(prepared))


def prepared_datasets(prepared: Iterable[Prepared]) -> Table:
    """What stands decoded in the cache."""
    table = Table(title="Ready in the cache")
    for column in ("name", "train", "test", "MB", "folder"):
        table.add_column(column, overflow="fold", justify="left" if column in ("name", "folder") else "right")
    for item in prepared:
        table.add_row(
            item.name,
            f"{item.train_samples:,}",
            f"{item.test_samples:,}",
            f"{item.size / 1e6:,.1f}",
            str(item.path),
        )
    return table


def dataset_card(dataset: Dataset) -> Table:
    """One dataset: its sizes, its classes, where it came from."""
    channels, height, width = dataset.image_shape
    classes = ", ".join(dataset.classes[:20]) + (", ..." if len(dataset.classes) > 20 else "")
    table = Table(title=dataset.name, show_header=False)
    for name, value in (
        ("training samples", f"{len(dataset.train):,}"),
        ("test samples", f"{len(dataset.test):,}"),
        ("images", f"{channels} x {height} x {width} (channels, height, width), 8 bit"),
        ("classes", f"{len(dataset.classes)}: {classes}"),
        ("source", dataset.source),
    ):
        table.add_row(name, value)
    return table


def run_list(runs: Iterable[Mapping[str, Any]]) -> Table:
    """Runs, one a row."""
    table = Table()
    for column in ("run", "state", "trained", "epoch", "accuracy", "best", "ranks", "where"):
        right = column in ("epoch", "accuracy", "best", "ranks")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for run in runs:
        epochs = f"{run['epoch']}/{run['epochs']}" if run["epochs"] else str(run["epoch"])
        accuracies = ["" if run[key] is None else f"{run[key]:.2%}" for key in ("accuracy", "best_accuracy")]
        table.add_row(
            str(run["run"]),
            run["state"],
            run["trained"] or "",
            epochs,
            *accuracies,
            "" if run["ranks"] is None else str(run["ranks"]),
            run["where"],
        )
    return table
