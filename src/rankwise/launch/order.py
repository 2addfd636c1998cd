"""What was asked for, and the folder in which it happens."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, RankwiseError, ResumeError, StorageError, UsageError
from rankwise.launch.plan_file import read_asked, write_plan
from rankwise.plan import RunPlan
from rankwise.report.live import Display
from rankwise.runs.folder import RunFolder, new_run_paths
from rankwise.runs.record import Record, utc_before
from rankwise.system.files import write_atomically
from rankwise.training.settled import SETTLED


@dataclass(frozen=True)
class Order:
    """A run to start: its options as given, and where words about it go.

    `resume` goes on in that folder, in which the run was as `stored` when the order was made. With `tune`
    trials find out first how to run it. `remarks` are for the user. `asked_ns` is when it was given, on
    `time.monotonic_ns`'s clock. What a program prints on stdout goes to stdout, or with `keeps_stdout` to
    stderr.
    """

    config: TrainConfig
    resume: Path | None = None
    stored: Record | None = None
    tune: bool = False
    remarks: tuple[str, ...] = ()
    keeps_stdout: bool = False
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
            slow_after_s=self.config.hang_timeout or math.inf,
        )


@dataclass(frozen=True)
class OpenFolder:
    """A run's folder in which it is about to begin or to go on: the folders that are `new` (the innermost
    first), the plan that stood there before, and the `claim` by which this process keeps other starts out."""

    folder: RunFolder
    new: list[Path]
    plan_before: bytes | None
    claim: int | None

    def release(self) -> None:
        """Let other starts into the folder."""
        if self.claim is not None:
            os.close(self.claim)

    def discard(self) -> None:
        """No run came about: remove what is new, and leave a run that was to go on as it was. Epochs that
        were trained all the same stay."""
        if self.new and self.folder.read_metrics():
            with contextlib.suppress(RankwiseError):
                self.folder.close("failed", "wrong use was found when training had begun")
        elif self.new:
            # Away under its name at once: a rank that fails a moment later must not find it half empty.
            away = self.new[0].with_name(f".{self.new[0].name}.discarded")
            with contextlib.suppress(OSError):
                self.new[0].rename(away)
            shutil.rmtree(away, ignore_errors=True)
            with contextlib.suppress(OSError):  # "runs", say, if by now another run is in it
                for parent in self.new[1:]:
                    parent.rmdir()
        elif self.plan_before is not None:
            with contextlib.suppress(StorageError):
                write_atomically(self.folder.plan, self.plan_before)
        else:
            self.folder.clear()


def open_folder(order: Order, plan: RunPlan) -> OpenFolder:
    """The run's folder, made now or resumed, with the plan in it. Raises UsageError if it cannot be made,
    holds a run already, or another start is in it."""
    folder, new = _made(order, plan)
    claim = folder.claim()
    before = folder.plan.read_bytes() if folder.plan.exists() else None
    opened = OpenFolder(folder, new, before, claim)
    try:
        if order.resume is None:
            folder.require_no_run()  # which another start may have made since it was looked at last
        elif order.stored is not None and _differ(folder.read(), order.stored):
            raise ResumeError(f"another start has gone on with {folder.path} meanwhile: look at it first")
        folder.forget_failures()
        folder.forget_resize()
        write_plan(folder, order.config, plan.with_options(out=folder.path))
        asked_s = (time.monotonic_ns() - order.asked_ns) / 1e9
        folder.begin(utc_before(asked_s, "milliseconds"))
    except BaseException:
        opened.release()
        raise
    return opened


def _differ(one: Record, other: Record) -> bool:
    return one.model_dump_json() != other.model_dump_json()  # in which not a number equals itself


def _made(order: Order, plan: RunPlan) -> tuple[RunFolder, list[Path]]:
    """The run's folder, and which folders are new; of starts in the same second each makes one of its own."""
    if order.resume:
        return RunFolder(order.resume), []
    if plan.out:
        folder = RunFolder(plan.out)
        return folder, folder.create()
    paths = new_run_paths(plan.label)
    while True:
        folder = RunFolder(next(paths))
        with contextlib.suppress(FileExistsError):
            return folder, folder.create(anew=True)


@contextlib.contextmanager
def run_folder(order: Order, plan: RunPlan) -> Iterator[RunFolder]:
    """The run's folder, made now or resumed, and discarded if no run comes about in it."""
    opened = open_folder(order, plan)
    try:
        yield opened.folder
    except (RankwiseError, KeyboardInterrupt) as error:
        if isinstance(error, UsageError) or not opened.folder.record.exists():
            opened.discard()
        raise
    finally:
        opened.release()


def resumed(order: Order, folder: RunFolder, stored: Record) -> Order:
    """The order with what the run in `folder` was asked for under what is given now, and remarks on what
    changes. Raises ResumeError if what was trained so far would not fit."""
    given, in_force = order.config, stored.config
    # A run of a version without plans has kept nothing but its record.
    asked = read_asked(folder)
    settled = {name: in_force[name] for name in SETTLED if in_force[name] is not None}
    options = dict(in_force) if asked is None else asked | settled
    remarks = []
    for name, value in given.model_dump(mode="json", include=given.model_fields_set - {"out"}).items():
        if value == in_force.get(name):
            continue
        option = name.replace("_", "-")
        if name in ("model", "dataset", "optimizer", "init"):
            raise ResumeError(
                f"{folder.path} holds a run with --{option} {in_force.get(name)}, but {value} was given: "
                "leave the option out, or start a new run"
            )
        if name == "epochs" and value < len(stored.epochs):
            raise ResumeError(
                f"{folder.path} has trained {len(stored.epochs)} epochs already, but --epochs {value} was "
                f"given: give {len(stored.epochs)} or more, or start a new run"
            )
        remarks.append(f"--{option} is {value} instead of {in_force.get(name)}")
        if name == "ranks":
            remarks.append(
                "with other ranks shards are dealt anew and optimiser states shared out in turn: the result "
                "is not that of the run that was never stopped"
            )
            if 1 in (value, in_force["ranks"]):
                # How several ranks keep in step says nothing of one, nor the other way round.
                of_several = ("strategy", "topology", "sync_every", "local_after")
                options = {its: options[its] for its in options if its not in of_several}
    known = {name: value for name, value in options.items() if name in TrainConfig.model_fields}
    try:
        config = given.over(known).model_copy(update={"out": folder.path})
    except ConfigError as error:
        raise ResumeError(f"the options stored in {folder.path} do not fit: {error}") from None
    return replace(order, config=config, stored=stored, remarks=tuple(remarks))


def to_arguments(config: TrainConfig) -> list[str]:
    """The command line of `rankwise train` that says the same as the options."""
    words: list[str] = []
    for name, value in config.model_dump(mode="json", include=config.model_fields_set).items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [word for item in value for word in (f"--{option}", str(item))]
        elif value is not None:
            words += [f"--{option}", str(value)]
    return words
