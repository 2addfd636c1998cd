"""What was asked for, and the folder in which it happens."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, RankwiseError, ResumeError, UsageError
from rankwise.report.live import Display
from rankwise.runs.folder import RunFolder, new_run_path
from rankwise.runs.record import Record, utc_before


@dataclass(frozen=True)
class Order:
    """A run to start: its options as given, and where words about it go.

    `resume` goes on in that folder. With `tune` trials find out first how to run it. `arguments` is the
    command line that says the same, if there was one. `launched` marks a rank that rankwise's own launcher
    started: it leaves talking to the user and the care of the folder to the launcher. `remarks` are for
    whoever talks to the user. `asked_ns` is when it was given, on `time.monotonic_ns`'s clock.
    """

    config: TrainConfig
    resume: Path | None = None
    tune: bool = False
    arguments: list[str] | None = None
    launched: bool = False
    remarks: tuple[str, ...] = ()
    asked_ns: int = field(default_factory=time.monotonic_ns)
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def say(self, line: str) -> None:
        """A remark for the user."""
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def display(
        self,
        folder: RunFolder,
        epochs: int,
        samples_per_epoch: int,
        *,
        live: bool,
        done: int | None = None,
    ) -> Display:
        """Shows the run's progress as long as it is entered, but for epochs that are `done`."""
        if done is None:
            done = len(folder.read().epochs) if self.resume else 0
        return Display(
            folder,
            self.console,
            epochs=epochs,
            samples_per_epoch=samples_per_epoch,
            live=live,
            epochs_done=done,
        )


def open_folder(order: Order, config: TrainConfig) -> tuple[RunFolder, list[Path]]:
    """The run's folder, made now or resumed, and the folders that are new (the innermost first)."""
    folder = RunFolder(order.resume or config.out or new_run_path(config.model))
    new = [] if order.resume else folder.create()
    folder.forget_failures()
    asked_s = (time.monotonic_ns() - order.asked_ns) / 1e9
    folder.begin(utc_before(asked_s, "milliseconds"))
    return folder, new


def discard(new: list[Path]) -> None:
    """Remove new folders in which no run came about."""
    if new:
        # Away under its name at once: a rank that fails a moment later must not find it half empty.
        away = new[0].with_name(f".{new[0].name}.discarded")
        with contextlib.suppress(OSError):
            new[0].rename(away)
        shutil.rmtree(away, ignore_errors=True)
        with contextlib.suppress(OSError):  # "runs", say, if by now another run is in it
            for parent in new[1:]:
                parent.rmdir()


@contextlib.contextmanager
def run_folder(order: Order, config: TrainConfig) -> Iterator[RunFolder]:
    """The run's folder, made now or resumed, and discarded if no run comes about in it."""
    folder, new = open_folder(order, config)
    try:
        yield folder
    except (RankwiseError, KeyboardInterrupt) as error:
        if isinstance(error, UsageError) or not folder.record.exists():
            discard(new)
        raise


def resumed(order: Order, folder: Path, stored: Record) -> Order:
    """The order with the options of the run in `folder` under those given now, and remarks on what
    the new ones change. Raises ResumeError if what was trained so far would not fit."""
    given, options = order.config, dict(stored.config)
    remarks = []
    for name, value in given.model_dump(mode="json", include=given.model_fields_set - {"out"}).items():
        if value == options.get(name):
            continue
        option = name.replace("_", "-")
        if name in ("model", "dataset", "optimizer"):
            raise ResumeError(
                f"{folder} holds a run with --{option} {options.get(name)}, but {value} was given: "
                "leave the option out, or start a new run"
            )
        remarks.append(f"--{option} is {value} instead of {options.get(name)}")
        if name == "ranks":
            remarks.append(
                "with other ranks shards are dealt anew and optimiser states shared out in turn: the result "
                "is not that of the run that was never stopped"
            )
            if 1 in (value, options["ranks"]):
                # What was filled in for the other number of ranks must not be taken for a wish.
                options |= dict.fromkeys(("strategy", "topology", "sync_every", "local_after"))
    known = {name: value for name, value in options.items() if name in TrainConfig.model_fields}
    try:
        config = given.over(known).model_copy(update={"out": folder})
    except ConfigError as error:
        raise ResumeError(f"the options stored in {folder} do not fit: {error}") from None
    return replace(order, config=config, remarks=tuple(remarks))


def without(arguments: Sequence[str], option: str) -> list[str]:
    """A command line without an option that takes a value."""
    kept, skip = [], False
    for word in arguments:
        if not (skip or word == option or word.startswith(f"{option}=")):
            kept.append(word)
        skip = word == option
    return kept


def to_arguments(order: Order) -> list[str]:
    """The command line of `rankwise train` that says the same as the order."""
    words = ["--resume", str(order.resume)] if order.resume else []
    for name, value in order.config.model_dump(mode="json", include=order.config.model_fields_set).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [word for item in value for word in (f"--{option}", str(item))]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words
