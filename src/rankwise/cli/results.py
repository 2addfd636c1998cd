"""Commands that look at runs, and ahead."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from rankwise.cli.options import (
    CacheDir,
    DataDir,
    Debug,
    Format,
    app,
    layered,
    stdout,
)
from rankwise.config import TrainConfig
from rankwise.errors import UsageError
from rankwise.prediction.options import PredictionOptions


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
        stdout().print(formats.terminal(found, stdout().width))
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
def export(
    runs: Annotated[
        list[Path],
        Parameter(negative="", help="Run folders. otf2 and mlperf take one, extrap two or more."),
    ],
    /,
    *,
    format: Annotated[
        Literal["talp", "extrap", "otf2", "mlperf", "csv"],
        Parameter(
            help="talp: efficiencies, as JSON for talp-pages. extrap: seconds of epochs, or of whole "
            "programs, over numbers of ranks, as JSON lines for Extra-P. otf2: what each rank did when, for "
            "tools that read OTF2. mlperf: lines of mlperf-logging, of trainings only. csv: a table of run, "
            "rank, epoch, phase and seconds."
        ),
    ],
    output: Annotated[
        Path,
        Parameter(help="File to write, not there yet; a folder for otf2, and for talp with several runs."),
    ],
    debug: Debug = False,
) -> None:
    """Write runs in the format of another tool; docs/formats.md says what is in each.

    Perfetto's is `rankwise trace`.
    """
    from rankwise.export import export as write

    written = write(runs, format, output)
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
    from rankwise.prediction.predict import check
    from rankwise.prediction.predict import predict as predict_epochs
    from rankwise.prediction.source import read_source

    given = {"dataset": dataset, "data_dir": data_dir, "cache_dir": cache_dir, "model": model}
    options = {name: value for name, value in given.items() if value is not None}
    check(wishes)
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output} was given, but there is no folder {output.absolute().parent}")
    if measure:
        from rankwise.studies.calibration import measure as run_shortly

        config = layered(TrainConfig(**options), config_file, preset)
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
        stdout().print(page.terminal(predicted))
        if output:
            print(f"page: {output}")
