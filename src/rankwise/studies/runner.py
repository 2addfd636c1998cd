"""Runs one after the other, each a `rankwise train` or `run`: clean memory, and a crash hurts one only."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

from rich.console import Console

from rankwise.config import TrainConfig
from rankwise.errors import Interrupted, UsageError
from rankwise.launch.order import to_arguments
from rankwise.plan import resolve
from rankwise.runs.record import Record
from rankwise.studies.folder import StudyFolder, require_options
from rankwise.studies.plan import expected_s
from rankwise.studies.study_progress import StudyProgress
from rankwise.system import machine
from rankwise.system.signals import handling, leave_lost_terminal

LOOK_S = 0.5
ATTEMPTS = 2


@dataclass(frozen=True)
class Run:
    """A trial with one seed. `config` holds what is given to `rankwise train`, and no more; with a `program`
    to `rankwise run`, which starts it."""

    name: str
    config: TrainConfig
    samples_per_epoch: int
    program: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        """How it begins."""
        name = "run" if self.program else "train"
        return [sys.executable, "-m", "rankwise", name]


def run_all(runs: Sequence[Run], folder: StudyFolder, console: Console) -> dict[str, str]:
    """Train whatever is not finished; returns what became of the runs that failed twice, by name.

    Raises Interrupted when the user stops it: what is finished is kept, and the run that was
    stopped goes on with the next call. Raises UsageError if the folder holds other runs of these names.
    """
    cores = machine.usable_cores()
    weights = [expected_s(resolve(run.config), run.samples_per_epoch, cores) for run in runs]
    failed: dict[str, str] = {}
    with StudyProgress(console, weights) as board:
        for run in runs:
            if record := folder.finished(run.name, run.config):
                board.keep(record)
                continue
            board.start(run.name)
            outcome = _train(run, folder, board)
            if isinstance(outcome, Record):
                folder.keep(run.name, outcome)
                board.finish(run.name, outcome)
            else:
                failed[run.name] = outcome
                board.fail(run.name, outcome)
    return failed


def _train(run: Run, folder: StudyFolder, board: StudyProgress) -> Record | str:
    """The record of a completed run, or the last words of one that failed twice."""
    place = folder.run(run.name)
    last_words = ""
    for attempt in range(ATTEMPTS):
        if attempt == 0 and place.record.exists():
            require_options(place.read(), run.config, place.path)
            words = ["--resume", str(place.path)]
        else:
            shutil.rmtree(place.path, ignore_errors=True)
            words = [*to_arguments(run.config.model_copy(update={"out": place.path})), *run.program]
        command = [*run.command, *words]
        log = folder.log(run.name)
        code = _supervise(
            command, log, lambda: board.look(run.name, place, run.config.epochs, run.samples_per_epoch)
        )
        if code == 0:
            return place.read()
        last_words = (log.read_text(errors="replace").strip().splitlines() or [f"exit code {code}"])[-1]
    return last_words.removeprefix("rankwise: ")


def _supervise(command: list[str], log: Path, look: Callable[[], None]) -> int:
    """Run a command to its end, its output in `log`, and return its exit code.

    It stands in a session of its own, so that a terminal's Ctrl-C does not reach it twice: SIGINT,
    SIGTERM and SIGHUP here become SIGINT there, and when it has ended, Interrupted here.
    """
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=partial(machine.die_with_parent, signal.SIGTERM),
            )
    except OSError as error:
        raise UsageError(f"cannot write {log}: {error.strerror}; choose another --output") from None
    asked = False

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if number == signal.SIGHUP:
            leave_lost_terminal()
            if asked:
                return
        asked = True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)

    with handling((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), ask):
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LOOK_S)
            look()
    if asked:
        raise Interrupted("stopped; what is finished is kept, and the same command goes on")
    return process.returncode
