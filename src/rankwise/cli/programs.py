"""The command that starts a user's own program."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from pydantic import Field, create_model

from rankwise.cli.options import ConfigFile, Debug, Format, InGroups, app, tell_result
from rankwise.config import PROGRAM_OPTIONS, CheckedOptions, TrainConfig, read_toml

_FIELDS: dict[str, Any] = {
    name: (TrainConfig.model_fields[name].rebuild_annotation(), TrainConfig.model_fields[name])
    for name in PROGRAM_OPTIONS
} | {
    "strategy": (
        str | None,
        Field(
            None,
            description="How ranks keep in step: allreduce (unless the program says otherwise), local-sgd, "
            "parameter-averaging, post-local-sgd, slowmo, diloco, gossip, or module:Class.",
        ),
    ),
    "epochs": (
        int | None,
        Field(None, ge=1, description="Epochs, in place of those that the program's run.epochs(n) asks for."),
    ),
}
ProgramOptions = create_model("ProgramOptions", __base__=CheckedOptions, **_FIELDS)
"""Those options of `TrainConfig` with which a program is started."""


@app.command(name="run", help_formatter=InGroups())
def run_program(
    *,
    config: Annotated[ProgramOptions, Parameter(name="*", negative_iterable="")] = ProgramOptions(),  # noqa: B008
    config_file: ConfigFile = None,
    resume: Annotated[
        Path | None, Parameter(help="Go on in this run folder, with its program and its options.")
    ] = None,
    format: Format = "text",
    debug: Debug = False,
    program: Annotated[list[str], Parameter(parse=False)],
) -> None:
    """Start a Python program on N ranks: rankwise run [options] SCRIPT.py [its arguments].

    A program whose loop is in a rankwise.Run leaves a run folder with record, ledger and checkpoints, and
    goes on when ranks are lost. One that uses mpi4py alone leaves its ledger: waiting and transfer of each
    rank, and the lines of code that wait.
    """
    from rankwise.launch import Order, launch_program
    from rankwise.system import machine

    given = TrainConfig(**config.model_dump(include=config.model_fields_set))
    if config_file:
        given = given.over(read_toml(config_file, PROGRAM_OPTIONS))
    order = Order(given, resume=resume, keeps_stdout=format == "json", asked_ns=machine.process_start_ns())
    result = launch_program(order, tuple(program))
    of_calls = result.record is not None and result.record.is_of_calls
    if result.record is not None and (format == "json" or not of_calls):  # which was told already
        tell_result(result.record, result.folder, format)


_FLAGS = ("debug", "help", "h")


def split_program(tokens: Sequence[str]) -> tuple[list[str], list[str]]:
    """The options of `rankwise run` and, from the script on, the program's own words, left as they are."""
    place = 0
    while place < len(tokens):
        word = tokens[place]
        if word == "--":
            return list(tokens[:place]), list(tokens[place + 1 :])
        if not word.startswith("-"):
            return list(tokens[:place]), list(tokens[place:])
        name = word.lstrip("-").replace("-", "_").removeprefix("no_")
        field = TrainConfig.model_fields.get(name)
        is_flag = name in _FLAGS or (field is not None and field.annotation is bool)
        place += 1 if is_flag or "=" in word else 2
    return list(tokens), []
