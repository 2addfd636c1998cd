"""The command line: options to a configuration, errors to exit codes, and nothing else."""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.console import Console

from rankwise.config import TrainConfig, explain, preset_names, preset_text, read_preset, read_toml
from rankwise.errors import Interrupted, RankwiseError, UsageError, one_line

if TYPE_CHECKING:
    from rankwise.data import Dataset

app = App(
    name="rankwise",
    help="Train neural networks data-parallel over MPI, and account for every second of every rank.",
    help_format="plaintext",
)
data_app = App(name="data", help="List, prepare and look at datasets.")
app.command(data_app)

Format = Annotated[
    Literal["text", "json"], Parameter(help="text for people; json puts JSON, and only that, on stdout.")
]
Debug = Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")]
DatasetName = Annotated[str, Parameter(help="Its name, as in train's --dataset.")]
DataDir = Annotated[Path | None, Parameter(help="Archive or folder that holds the dataset.")]
CacheDir = Annotated[Path | None, Parameter(help="Where decoded images are kept.")]


@app.command
def train(
    *,
    config: Annotated[TrainConfig, Parameter(name="*", negative_iterable="")] = TrainConfig(),  # noqa: B008
    config_file: Annotated[
        Path | None, Parameter(name="--config", help="TOML file with options under the same names.")
    ] = None,
    preset: Annotated[
        str | None,
        Parameter(help=f"Recipe of the package: {', '.join(preset_names())}; `rankwise presets` tells more."),
    ] = None,
    resume: Annotated[
        Path | None, Parameter(help="Go on in this run folder, with its options and from its checkpoint.")
    ] = None,
    format: Format = "text",
    debug: Debug = False,
    launched: Annotated[bool, Parameter(show=False, negative="")] = False,
    arguments: Annotated[list[str], Parameter(parse=False)],
) -> None:
    """Train a network on N ranks; they are started here unless mpiexec or srun did so already.

    The command line wins over --config, and that over --preset.
    """
    from rankwise.launch import Order, launch
    from rankwise.report.summary import summary

    layers = [read_toml(config_file)] if config_file else []
    layers += [read_preset(preset)] if preset else []
    result = launch(Order(config.over(*layers), resume=resume, arguments=arguments, launched=launched))
    if not result.speaks:
        return
    if format == "json":
        print(result.record.model_dump_json(indent=1))
    else:
        _console().print(summary(result.record, str(result.folder)))


@app.command
def presets(
    name: Annotated[str | None, Parameter(help="The recipe to print, to be copied and edited.")] = None,
    /,
    *,
    debug: Debug = False,
) -> None:
    """List the recipes that come with the package, or print one as the TOML file that --config takes."""
    if name is not None:
        print(preset_text(name), end="")
        return
    for each in preset_names():
        about = itertools.takewhile(lambda line: line.startswith("#"), preset_text(each).splitlines())
        print(each, *(f"    {line.removeprefix('#').strip()}" for line in about), sep="\n")


@app.command
def reproduce(
    experiment: Annotated[
        Literal[
            "baseline", "replication", "processes", "batch-size", "timing", "all", "strategies", "faults"
        ],
        Parameter(
            help="The paper's experiment, all of them, all strategies against each other, or the experiment "
            "with faults that the paper left out."
        ),
    ],
    /,
    *,
    output: Annotated[
        Path, Parameter(help="Folder for its page, tables, records and runs; what is finished there is kept.")
    ] = Path("reproduction"),
    dataset: DatasetName = "cifar10",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    repeats: Annotated[int, Parameter(help="Seeds 0, 1, ...; from 2 on results come with intervals.")] = 1,
    quick: Annotated[bool, Parameter(negative="", help="A short form of a few minutes.")] = False,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Run the paper's experiments with its settings, and set its results beside ours."""
    from rankwise import studies

    done = studies.reproduce(studies.Study(experiment, output, dataset, data_dir, cache_dir, repeats, quick))
    if format == "json":
        print(studies.to_json(done))
    else:
        _console().print(studies.summary(done))


@app.command
def report(
    runs: Annotated[list[Path], Parameter(help="Run folders; several are compared.")],
    /,
    *,
    output: Annotated[Path, Parameter(help="HTML file to write.")] = Path("report.html"),
    debug: Debug = False,
) -> None:
    """Write one self-contained HTML page about one run or several: curves, each rank's time, diagnosis."""
    from rankwise.report.run_page import write_report

    for line in write_report(runs, output):
        print(f"rankwise: {line}", file=sys.stderr)
    print(f"report: {output}")


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
        _console().print(datasets(data.known(), found))


@data_app.command
def prepare(
    dataset: DatasetName,
    /,
    *,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    refresh: Annotated[bool, Parameter(negative="", help="Decode anew what stands in the cache.")] = False,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Fetch, check and decode a dataset into the cache, so that runs start at once."""
    _show_dataset(_prepare(dataset, data_dir, cache_dir, refresh), format)


@data_app.command
def show(
    dataset: DatasetName,
    /,
    *,
    output: Annotated[Path | None, Parameter(help="PNG to draw a sheet of samples into.")] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Tell about a dataset, and draw a sheet of its samples, a row a class."""
    from rankwise import data

    found = _prepare(dataset, data_dir, cache_dir)
    target = output or Path(re.sub(r"[^A-Za-z0-9]+", "-", dataset).strip("-") + ".png")
    data.draw_sheet(found, target)
    _show_dataset(found, format, sheet=target)


@app.command
def compare(
    runs: Annotated[
        list[Path], Parameter(negative="", help="Run folders. The first is what the others are measured by.")
    ],
    /,
    *,
    format: Annotated[
        Literal["text", "markdown", "csv", "json"],
        Parameter(help="text for people; the others put that, and only that, on stdout."),
    ] = "text",
    debug: Debug = False,
) -> None:
    """Compare runs in a table: what they were, what they reached, how fast, and where their time went."""
    from rankwise.report import comparison_formats as formats
    from rankwise.report.comparison import compare

    found = compare(runs)
    for warning in found.warnings:
        print(f"rankwise: {warning}", file=sys.stderr)
    if format == "text":
        _console().print(formats.terminal(found, _console().width))
    else:
        print(formats.WRITERS[format](found))


@app.command
def trace(
    run: Annotated[Path, Parameter(help="Run folder.")],
    /,
    *,
    output: Annotated[Path, Parameter(help="JSON file to write the trace into.")] = Path("trace.json"),
    debug: Debug = False,
) -> None:
    """Write what each rank did when as a trace to look at in Perfetto, https://ui.perfetto.dev."""
    from rankwise.report.trace import write_trace

    written = write_trace(run, output)
    for remark in written.remarks:
        print(f"rankwise: {remark}", file=sys.stderr)
    print(written.about)


@app.command
def doctor(*, cache_dir: CacheDir = None, format: Format = "text", debug: Debug = False) -> None:
    """Tell in one page what MPI there is and whether it can survive failures, cores, threads, datasets."""
    from rankwise import doctor as physician

    facts = physician.examine(cache_dir)
    if format == "json":
        print(json.dumps(facts, indent=1))
    else:
        _console().print(physician.page(facts))


def _prepare(dataset: str, data_dir: Path | None, cache_dir: Path | None, refresh: bool = False) -> Dataset:
    from rankwise import data
    from rankwise.launch import showing_progress

    with showing_progress(Console(stderr=True)) as on_progress:
        return data.prepare(
            dataset, data_dir=data_dir, cache_dir=cache_dir, refresh=refresh, on_progress=on_progress
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
        _console().print(dataset_card(dataset))
        if sheet:
            print(f"sheet of samples: {sheet}")


def _console() -> Console:
    """For results, on stdout. Nothing in them is markup, whatever brackets a path has."""
    return Console(markup=False, highlight=False)


def main(tokens: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 2 wrong use, 1 a failure in training, 130 interrupted."""
    tokens = sys.argv[1:] if tokens is None else tokens
    try:
        command, bound, left = app.parse_args(tokens, exit_on_error=False, print_error=False)
        command(*bound.args, **bound.kwargs, **dict.fromkeys(left, tokens[1:]))
        sys.stdout.flush()
    except CycloptsError as error:
        _exit(UsageError(_one_line_of(error)), tokens)
    except RankwiseError as error:
        _exit(error, tokens)
    except KeyboardInterrupt:
        _exit(Interrupted("stopped by Ctrl-C"), tokens)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: be quiet
        sys.exit(1)
    except Exception as error:
        _exit(RankwiseError(f"{type(error).__name__}: {one_line(error)} (--debug shows where)"), tokens)


def _exit(error: RankwiseError, tokens: list[str]) -> NoReturn:
    if "--debug" in tokens:
        traceback.print_exc()
    if "--launched" not in tokens:  # there the launcher speaks, by what the rank left in the folder
        print(f"rankwise: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _one_line_of(error: CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    return explain(cause) if isinstance(cause, ValidationError) else str(error)
