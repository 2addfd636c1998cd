"""What commands share: the application, options of several commands, and how help shows them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from cyclopts.help import DefaultFormatter, HelpPanel
from cyclopts.validators import Number
from rich.console import Console, ConsoleOptions

from rankwise.config import GROUPS, TrainConfig, preset_names, read_preset, read_toml
from rankwise.errors import TrainingError
from rankwise.system.numbers import WHOLE

if TYPE_CHECKING:
    from rankwise.runs.record import Record

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
ImageSize = Annotated[
    int | None,
    WHOLE,
    Parameter(
        help="folder: cut and scale all images to squares of so many pixels.",
        validator=Number(gte=1, lte=4096),
    ),
]
Background = Annotated[str, Parameter(help="folder: the colour behind what is transparent.")]
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


def stdout() -> Console:
    """For results, on stdout. Nothing in them is markup, whatever brackets a path has."""
    return Console(markup=False, highlight=False)


def layered(config: TrainConfig, config_file: Path | None, preset: str | None) -> TrainConfig:
    """The options of the command line over those of a file, and these over a preset's."""
    layers = [read_toml(config_file)] if config_file else []
    layers += [read_preset(preset)] if preset else []
    return config.over(*layers)


def tell_result(record: Record, folder: Path, format: Literal["text", "json"]) -> None:
    """Show how a run ended. Raises TrainingError if ranks were lost, and that was to be a failure."""
    from rankwise.report import words
    from rankwise.report.summary import summary

    losses = words.losses(record.losses)
    if format == "json":
        print(record.model_dump_json(indent=1))
    else:
        stdout().print(summary(record, str(folder)))
        if losses:
            stdout().print(losses, soft_wrap=True)  # one line, however many were lost
    if losses and record.config.get("fail_on_lost_rank"):
        raise TrainingError(f"{losses}: --fail-on-lost-rank was given")
