"""Commands about what is here: datasets, and this machine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.console import Console

from rankwise.cli.options import (
    Background,
    CacheDir,
    DataDir,
    DatasetName,
    Debug,
    Format,
    ImageSize,
    app,
    data_app,
    stdout,
)
from rankwise.system.numbers import WHOLE

if TYPE_CHECKING:
    from rankwise.data import Dataset


@data_app.command(name="list")
def list_datasets(*, cache_dir: CacheDir = None, format: Format = "text", debug: Debug = False) -> None:
    """The datasets there are, and those that stand ready in the cache."""
    from rankwise import data
    from rankwise.report.tables import datasets

    found = data.prepared(cache_dir)
    if format == "json":
        rows = [vars(item) | {"path": str(item.path)} for item in found]
        print(json.dumps({"known": dict(data.known()), "prepared": rows}, indent=1))
    else:
        stdout().print(datasets(data.known(), found))


@data_app.command
def prepare(
    dataset: DatasetName,
    /,
    *,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    image_size: ImageSize = None,
    background: Background = "white",
    refresh: Annotated[bool, Parameter(negative="", help="Decode anew what stands in the cache.")] = False,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Fetch, check and decode a dataset into the cache, so that runs start at once."""
    found = _prepare(dataset, data_dir, cache_dir, image_size, background, refresh)
    _show_dataset(found, format)


@data_app.command
def show(
    dataset: DatasetName,
    /,
    *,
    output: Annotated[Path | None, Parameter(help="PNG to draw a sheet of samples into.")] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    image_size: ImageSize = None,
    background: Background = "white",
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Tell about a dataset, and draw a sheet of its samples as the network sees them, a row a class."""
    from rankwise import data

    found = _prepare(dataset, data_dir, cache_dir, image_size, background)
    target = output or Path(re.sub(r"[^A-Za-z0-9]+", "-", dataset).strip("-") + ".png")
    data.draw_sheet(found, target)
    _show_dataset(found, format, sheet=target)


@app.command
def doctor(
    *,
    hosts: Annotated[
        str | None,
        Parameter(help="Look at these hosts instead, as in train's --hosts, and at what lies between them."),
    ] = None,
    hostfile: Annotated[Path | None, Parameter(help="The same, as in train's --hostfile.")] = None,
    cache_dir: CacheDir = None,
    speed: Annotated[
        bool,
        Parameter(
            negative="", help="Measure instead how far a training step is from what the machine can do."
        ),
    ] = False,
    model: Annotated[
        str, Parameter(help="With --speed: the network, on 3x32x32 and 10 classes.")
    ] = "paper-cnn",
    batch_size: Annotated[int, WHOLE, Parameter(help="With --speed: samples of the step.")] = 16,
    threads: Annotated[
        int | None,
        WHOLE,
        Parameter(help="With --speed: arithmetic threads of the step; otherwise all cores."),
    ] = None,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Tell in one page what MPI there is and whether it can survive failures, cores, threads, datasets.

    With --hosts: whether they answer and have the same versions, and for each pair latency, bandwidth and how
    far the clocks are apart. With --speed: how far a step is from the machine's limits.
    """
    from rankwise.doctor import installation as physician

    facts: dict[str, object]
    if hosts is not None or hostfile is not None:
        from rankwise.launch.links import survey
        from rankwise.system.hosts import hosts_asked_for

        with Console(stderr=True).status("asking the hosts") as status:
            facts = survey(hosts_asked_for(hosts, hostfile), status.update)
        shown = physician.hosts_page(facts)
    elif speed:
        from rankwise.doctor import speed as stopwatch

        facts = stopwatch.measure(model, batch_size, threads)
        shown = stopwatch.page(facts)
    else:
        facts = physician.examine(cache_dir)
        shown = physician.page(facts)
    if format == "json":
        print(json.dumps(facts, indent=1))
    else:
        stdout().print(shown)


def _prepare(
    dataset: str,
    data_dir: Path | None,
    cache_dir: Path | None,
    image_size: int | None,
    background: str,
    refresh: bool = False,
) -> Dataset:
    from rankwise import data
    from rankwise.report.progress_bar import showing_progress

    with showing_progress(Console(stderr=True)) as on_progress:
        return data.prepare(
            dataset,
            data_dir=data_dir,
            cache_dir=cache_dir,
            image_size=image_size,
            background=background,
            refresh=refresh,
            on_progress=on_progress,
        )


def _show_dataset(dataset: Dataset, format: str, sheet: Path | None = None) -> None:
    from rankwise.report.tables import dataset_card

    if format == "json":
        facts = {
            "name": dataset.name,
            "train": len(dataset.train),
            "test": len(dataset.test),
            "image_shape": dataset.image_shape,
            "classes": dataset.classes,
            "source": dataset.source,
            "sheet": str(sheet) if sheet else None,
        }
        print(json.dumps(facts, indent=1))
    else:
        stdout().print(dataset_card(dataset))
        if sheet:
            print(f"sheet of samples: {sheet}")
