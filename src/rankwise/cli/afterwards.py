"""Commands about runs that are there: what one has learned, which there are, and ending one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

from cyclopts import Parameter
from rich.console import Console

from rankwise.cli.options import DataDir, Debug, Format, app, stdout
from rankwise.errors import UsageError

if TYPE_CHECKING:
    from rankwise.runs.weights import Which

Checkpoint = Annotated[
    str,
    Parameter(
        help="newest, best (by validation accuracy), or the number of an epoch whose checkpoint is kept."
    ),
]


@app.command
def evaluate(
    run: Annotated[Path, Parameter(help="Run folder.")],
    /,
    *,
    on: Annotated[
        str | None,
        Parameter(
            help="A dataset as in train's --dataset, a folder or zip of images (a folder for each class, or "
            "of classes nobody knows), or an image; they are cut and scaled to what the network takes. "
            "Otherwise the images that the run was validated on."
        ),
    ] = None,
    checkpoint: Checkpoint = "newest",
    output: Annotated[
        Path | None,
        Parameter(help="Picture of the confusion matrix, .svg or .png. Otherwise confusion.svg."),
    ] = None,
    data_dir: DataDir = None,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Tell how a run's network does on images: accuracy, loss, each class, and which is taken for which."""
    from rankwise.evaluation.picture import check_picture, draw

    which = which_checkpoint(checkpoint)
    picture = output or Path("confusion.svg")
    check_picture(picture)

    import torch

    from rankwise.evaluation import scores, subjects, words
    from rankwise.evaluation.trained import trained_run
    from rankwise.report.progress_bar import showing_progress
    from rankwise.system import machine

    torch.set_num_threads(machine.usable_cores())
    with showing_progress(Console(stderr=True)) as on_progress:
        found = trained_run(run, which)
        subject = subjects.subject_of(found, on, data_dir, on_progress)
        model = found.module()
        about = {
            "run": str(run),
            "model": found.plan.model,
            "epoch": found.weights.epoch,
            "weights": str(found.weights.path),
            "images": subject.name,
        }
        content: dict[str, Any]
        if subject.labelled:
            result = scores.evaluate(found, model, subject, on_progress)
            draw(result, picture)
            content, shown = {**result.to_json(), "picture": str(picture)}, words.scores(result)
        elif output is not None:
            raise UsageError(
                f"--output {output} was given, but nobody has said what is in {on}, so there is no matrix: "
                "put the images into CLASS/ folders, or leave it out"
            )
        else:
            guesses = scores.guess(found, model, subject, on_progress)
            content, shown = {"guesses": [each.to_json() for each in guesses]}, words.guesses(guesses)
    if format == "json":
        print(json.dumps(about | content, indent=1))
        return
    stdout().print(words.heading(found), soft_wrap=True)
    stdout().print(shown)
    if subject.labelled:
        print(f"confusion matrix: {picture}")


def which_checkpoint(text: str) -> Which:
    """Newest, best, or an epoch. Raises UsageError for what is none of them."""
    if text in ("newest", "best"):
        return cast(Literal["newest", "best"], text)
    if text.isdecimal():
        return int(text)
    raise UsageError(f"--checkpoint {text} was given, expected newest, best, or the number of an epoch")


@app.command
def runs(
    folder: Annotated[Path, Parameter(help="Folder with runs in it, or a run folder.")] = Path("runs"),
    /,
    *,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """List runs: the state of each, how far it is, its accuracy, and where it runs; also while they run."""
    from rankwise.launch.running import list_runs
    from rankwise.report.tables import run_list

    found = [line.to_json() | {"where": line.where} for line in list_runs(folder)]
    if format == "json":
        print(json.dumps(found, indent=1))
    else:
        stdout().print(run_list(found))


@app.command
def stop(
    run: Annotated[Path, Parameter(help="Run folder.")],
    /,
    *,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """End a run from another terminal as Ctrl-C does: its ranks save at the next synchronisation, and leave.

    A second time ends it at once.
    """
    from rankwise.launch.running import stop as stop_run

    line = stop_run(run, lambda words: print(f"rankwise: {words}", file=sys.stderr, flush=True))
    if format == "json":
        print(json.dumps(line.to_json(), indent=1))
    else:
        print(f"{run}: {line.state}" + (f", {line.message}" if line.message else ""))


@app.command
def resize(
    run: Annotated[
        Path, Parameter(help="Run folder of a run that goes on, of rankwise train or rankwise run.")
    ],
    /,
    *,
    ranks: Annotated[
        int | None,
        Parameter(help="Ranks to go on with, a master included. By default as many as --hosts have slots."),
    ] = None,
    hosts: Annotated[str | None, Parameter(help="Hosts to go on with, as in train's --hosts.")] = None,
    hostfile: Annotated[Path | None, Parameter(help="The same as a file, as in train's --hostfile.")] = None,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Let a running run go on with more or fewer ranks, or on other hosts, from its next synchronisation on.

    The new ranks get ready while the present ones train. This returns once they have committed what they
    trained first. No sample of the epoch under way is lost or trained twice.
    """
    from rankwise.launch.running import resize as resize_run
    from rankwise.system.hosts import hosts_asked_for

    slots = hosts_asked_for(hosts, hostfile)
    given: dict[str, Any] = {"hosts": ",".join(map(str, slots))} if slots else {}
    if ranks is not None:
        given["ranks"] = ranks
    if not given:
        raise UsageError("nothing was given that is to change: expected --ranks N, --hosts or --hostfile")
    record = resize_run(run, given, lambda words: print(f"rankwise: {words}", file=sys.stderr, flush=True))
    if format == "json":
        print(record.model_dump_json(indent=1))
    else:
        size = record.config["ranks"]
        print(f"{run}: {size} rank{'s' * (size > 1)} since epoch {len(record.epochs) + 1}")
