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
from cyclopts.help import DefaultFormatter, HelpPanel
from pydantic import ValidationError
from rich.console import Console, ConsoleOptions

from rankwise.config import GROUPS, TrainConfig, explain, preset_names, preset_text, read_preset, read_toml
from rankwise.errors import Interrupted, RankwiseError, UsageError, one_line
from rankwise.prediction.options import PredictionOptions
from rankwise.submit import Kubernetes, Slurm, hand_over, work_of

if TYPE_CHECKING:
    from rankwise.data import Dataset

app = App(
    name="rankwise",
    help="Train neural networks data-parallel over MPI, and account for every second of every rank.",
    help_format="plaintext",
)
data_app = App(name="data", help="List, prepare and look at datasets.")
app.command(data_app)
submit_app = App(name="submit", help="Hand a training to a batch system, which may put it off and on again.")
app.command(submit_app)

Format = Annotated[
    Literal["text", "json"], Parameter(help="text for people; json puts JSON, and only that, on stdout.")
]
Debug = Annotated[bool, Parameter(negative="", help="Show the traceback of an error.")]
DatasetName = Annotated[str, Parameter(help="Its name, as in train's --dataset.")]
DataDir = Annotated[Path | None, Parameter(help="Archive or folder that holds the dataset.")]
CacheDir = Annotated[Path | None, Parameter(help="Where decoded images are kept.")]
Options = Annotated[TrainConfig, Parameter(name="*", negative_iterable="")]
ConfigFile = Annotated[
    Path | None, Parameter(name="--config", help="TOML file with options under the same names.")
]
Preset = Annotated[
    str | None,
    Parameter(help=f"Recipe of the package: {', '.join(preset_names())}; `rankwise presets` tells more."),
]
To = Annotated[Path | None, Parameter(help="File to write; otherwise it is printed.")]
Run = Annotated[bool, Parameter(negative="", help="Submit it, too.")]


class InGroups(DefaultFormatter):
    """Shows the options of a training by what they are about, and before them those of the command itself."""

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        named = {entry.names[0].removeprefix("--").replace("-", "_"): entry for entry in panel.entries}
        shown = {
            title: [named.pop(name) for name in names if name in named] for title, names in GROUPS.items()
        }
        for title, entries in [(panel.title, list(named.values())), *shown.items()]:
            if entries:
                super().__call__(console, options, panel.copy(title=title, entries=entries))


@app.command(help_formatter=InGroups())
def train(
    *,
    config: Options = TrainConfig(),  # noqa: B008
    config_file: ConfigFile = None,
    preset: Preset = None,
    resume: Annotated[
        Path | None, Parameter(help="Go on in this run folder, with its options and from its checkpoint.")
    ] = None,
    tune: Annotated[
        bool,
        Parameter(
            negative="",
            help="First find out by short runs how this machine trains this fastest: threads, memory format, "
            "compiling, and ranks unless --ranks is given (the batch of all ranks stays). The mathematics "
            "stays: bf16 and fp32 are only compared with --precision bf16. What is found is remembered.",
        ),
    ] = False,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Train a network on N ranks; they are started here unless mpiexec or srun did so already.

    The command line wins over --config, and that over --preset.
    """
    from rankwise.launch import Order, launch
    from rankwise.report.summary import summary
    from rankwise.system import machine

    order = Order(
        _layered(config, config_file, preset),
        resume=resume,
        tune=tune,
        asked_ns=machine.process_start_ns(),
    )
    result = launch(order)
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
def predict(
    *,
    wishes: Annotated[PredictionOptions, Parameter(name="*")] = PredictionOptions(),  # noqa: B008
    source: Annotated[
        tuple[Path, ...],
        Parameter(
            name="--from",
            negative="",
            help="Finished run to predict from; several, of other batch sizes or threads, tell more.",
        ),
    ] = (),
    measure: Annotated[
        bool, Parameter(negative="", help="Make short runs here, and predict from them and --from.")
    ] = False,
    config_file: Annotated[
        Path | None, Parameter(name="--config", help="--measure: TOML file with options of train.")
    ] = None,
    preset: Annotated[str | None, Parameter(help="--measure: recipe of the package.")] = None,
    dataset: Annotated[str | None, Parameter(help="--measure: its name, as in train.")] = None,
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    model: Annotated[str | None, Parameter(help="--measure: network, as in train.")] = None,
    output: Annotated[Path | None, Parameter(help="HTML page with curves to write.")] = None,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Predict an epoch's time on other numbers of ranks, batches, strategies and networks, from short
    runs."""
    from rankwise.prediction import page
    from rankwise.prediction.predict import predict as predict_epochs
    from rankwise.prediction.source import read_source

    given = {"dataset": dataset, "data_dir": data_dir, "cache_dir": cache_dir, "model": model}
    options = {name: value for name, value in given.items() if value is not None}
    if measure:
        from rankwise.studies.calibration import measure as run_shortly

        config = _layered(TrainConfig(**options), config_file, preset)
        found = run_shortly(config, wishes, source)
    else:
        if options or config_file or preset:
            raise UsageError("options of training were given: they are for --measure, --from has its own")
        found = read_source(source)
    predicted = predict_epochs(found, wishes)
    if output:
        page.page(predicted).write(output)
    if format == "json":
        print(json.dumps(predicted.to_json(), indent=1))
    else:
        _console().print(page.terminal(predicted))
        if output:
            print(f"page: {output}")


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
    batch_size: Annotated[int, Parameter(help="With --speed: samples of the step.")] = 16,
    threads: Annotated[
        int | None, Parameter(help="With --speed: arithmetic threads of the step; otherwise all cores.")
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
        _console().print(shown)


@submit_app.command(help_formatter=InGroups())
def slurm(
    *,
    cluster: Annotated[Slurm, Parameter(name="*")] = Slurm(),  # noqa: B008
    config: Options = TrainConfig(),  # noqa: B008
    config_file: ConfigFile = None,
    preset: Preset = None,
    to: To = None,
    run: Run = False,
    debug: Debug = False,
    arguments: Annotated[list[str], Parameter(parse=False)],
) -> None:
    """Write a batch script for Slurm, with every option of train.

    The job saves itself before its time is up or others go first, is put back into the queue, and goes on.
    """
    work = work_of(_layered(config, config_file, preset), cluster.nodes)
    print(hand_over(cluster.script(work, ["submit", *arguments]), to, ["sbatch"] if run else None))


@submit_app.command(help_formatter=InGroups())
def kubernetes(
    *,
    cluster: Annotated[Kubernetes, Parameter(name="*")] = Kubernetes(),  # noqa: B008
    config: Options = TrainConfig(),  # noqa: B008
    config_file: ConfigFile = None,
    preset: Preset = None,
    to: To = None,
    run: Run = False,
    debug: Debug = False,
    arguments: Annotated[list[str], Parameter(parse=False)],
) -> None:
    """Write an MPIJob for Kubernetes with Kubeflow's MPI Operator, with every option of train.

    A launcher that is evicted has the ranks save, and one that is started again goes on.
    """
    work = work_of(_layered(config, config_file, preset), cluster.workers)
    program = ["kubectl", "create", "-f", "-"] if run else None
    print(hand_over(cluster.manifest(work, ["submit", *arguments]), to, program))


def _layered(config: TrainConfig, config_file: Path | None, preset: str | None) -> TrainConfig:
    """The options of the command line over those of a file, and these over a preset's."""
    layers = [read_toml(config_file)] if config_file else []
    layers += [read_preset(preset)] if preset else []
    return config.over(*layers)


def _prepare(dataset: str, data_dir: Path | None, cache_dir: Path | None, refresh: bool = False) -> Dataset:
    from rankwise import data
    from rankwise.report.progress_bar import showing_progress

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
    print(f"rankwise: {one_line(error)}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)


def _one_line_of(error: CycloptsError) -> str:
    cause = error.__cause__ or error.__context__
    return explain(cause) if isinstance(cause, ValidationError) else str(error)
