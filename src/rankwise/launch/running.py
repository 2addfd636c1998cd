"""Runs as others see them: which there are, how far each is, and ending one from another terminal."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.config import TrainConfig
from rankwise.errors import LaunchError, TrainingError, UsageError
from rankwise.launch.generations import resized
from rankwise.launch.order import Order
from rankwise.launch.plan_file import read_plan
from rankwise.runs import resize as change
from rankwise.runs.folder import RunFolder, no_run
from rankwise.runs.record import Record
from rankwise.survival.beats import live_processes
from rankwise.system.files import misspelt

State = Literal["starting", "running", "elsewhere", "died", "completed", "interrupted", "failed", "damaged"]
"""`elsewhere`: on another machine, where it runs as far as its record says; `died`: its processes are gone
and have not said why."""

LOOK_S = 0.1
PATIENCE_S = 120.0
"""How long a run may take to end after it was asked to."""


@dataclass(frozen=True)
class Holder:
    """The process that keeps other starts out of a run folder: the launcher, or rank 0 of a user's mpiexec.
    `alive` is None on another machine, where that cannot be seen."""

    pid: int
    host: str
    alive: bool | None


@dataclass(frozen=True)
class RunLine:
    """A run in a list. Accuracies are fractions, None before the first evaluation."""

    path: Path
    state: State
    record: Record | None
    holder: Holder | None
    message: str | None = None

    @property
    def where(self) -> str:
        """The hosts of its ranks, and the process that a running one can be stopped by."""
        hosts = [] if self.record is None else [host.name for host in self.record.environment.hosts]
        at = self.holder if self.state in ("starting", "running", "elsewhere") else None
        names = dict.fromkeys([*hosts, *([at.host] if at else [])])
        return ", ".join(names) + (f" (process {at.pid})" if at else "")

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        record = self.record
        evaluated = record.evaluated if record else []
        return {
            "run": str(self.path),
            "state": self.state,
            "trained": record.trained if record else None,
            "epoch": len(record.epochs) if record else 0,
            "epochs": record.config.get("epochs") if record else None,
            "accuracy": evaluated[-1].val_accuracy if evaluated else None,
            "best_accuracy": record.best.val_accuracy if record and evaluated else None,
            "ranks": record.config.get("ranks") if record else None,
            "hosts": [host.name for host in record.environment.hosts] if record else [],
            "pid": self.holder.pid if self.holder and self.holder.alive else None,
            "started_at": record.started_at if record else None,
            "message": self.message,
        }


def list_runs(folder: Path) -> list[RunLine]:
    """The runs in a folder, or the run that it is, in the order of their names. Raises UsageError if there is
    no such folder, or no run in it."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else f"does not exist{misspelt(folder)}"
        raise UsageError(
            f"{folder} {what}: expected a folder with runs in it (. is this one), or a run folder"
        )
    try:
        paths = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    except OSError as error:
        raise UsageError(f"{folder} cannot be read: {error.strerror}") from None
    found = [look(path) for path in paths if _is_run(path)]
    if not found:
        raise UsageError(
            f"there is no run in {folder}: expected a folder with runs in it (. is this one), or a run folder"
        )
    return found


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    return not path.name.startswith(".") and (folder.record.is_file() or folder.plan.is_file())


def look(path: Path) -> RunLine:
    """A run as it is now."""
    folder = RunFolder(path)
    holder = holder_of(folder)
    try:
        record = folder.read() if folder.record.exists() else None
    except UsageError as error:
        return RunLine(path, "damaged", None, holder, str(error))
    handed = change.read_resize(folder.resize)
    if (
        record is not None
        and handed is not None
        and handed.state == "handing over"
        and holder
        and holder.alive
    ):
        return RunLine(path, "running", record, holder)
    if record is not None and record.outcome != "running":
        if holder is not None and holder.alive and _begins_again(folder):
            return RunLine(path, "starting", record, holder)
        return RunLine(path, record.outcome, record, holder, record.message)
    if holder is not None and holder.alive:
        return RunLine(path, "running" if record else "starting", record, holder)
    if live_processes(folder.beats):  # its launcher is gone, but ranks that a user's mpiexec started are not
        return RunLine(path, "running", record, holder)
    if holder is not None and holder.alive is None:
        return RunLine(path, "elsewhere", record, holder)
    return RunLine(path, "died", record, holder, "its processes are gone, and have not said why")


def _begins_again(folder: RunFolder) -> bool:
    """Whether a start has written the plan since the record was closed: it is resumed just now."""
    with contextlib.suppress(OSError):
        return folder.plan.stat().st_mtime_ns > folder.record.stat().st_mtime_ns
    return False


def holder_of(folder: RunFolder) -> Holder | None:
    """The process that holds the folder, or held it last; None if none ever did. Looking does not touch the
    lock, as a start at the same moment would then be refused."""
    try:
        said = re.fullmatch(r"process (\d+) on (.+)", folder.claimed.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None
    if said is None:
        return None
    pid, host = int(said[1]), said[2]
    if host != socket.gethostname():
        return Holder(pid, host, None)
    return Holder(pid, host, _has_open(pid, folder.claimed))


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has the file open, as the holder has: its number alone may be another's by now. Of a
    process of another user that cannot be seen, and its number must do."""
    try:
        ours = path.stat()
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                theirs = os.stat(f"/proc/{pid}/fd/{name}")
                if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
                    return True
    except PermissionError:
        return True
    except OSError:
        pass
    return False


def _running(path: Path, what: str) -> RunLine:
    """A run that goes on here. Raises UsageError for another, of which one wants to do `what`."""
    if not _is_run(path):
        raise UsageError(no_run(path, "plan.json or record.json"))
    line = look(path)
    if line.state in ("completed", "interrupted", "failed"):
        assert line.record is not None
        over = f"{path} is over ({line.state}, {len(line.record.epochs)} epochs)"
        raise UsageError(f"{over}: nothing to {what}")
    if line.state in ("died", "damaged") or line.holder is None:
        raise UsageError(f"{path} does not run: {line.message or 'it was never started'}")
    if line.state == "elsewhere":
        there = f"say there rankwise {what} {path}"
        if what == "stop":
            there += f", or ssh {line.holder.host} kill -INT {line.holder.pid}"
        raise UsageError(f"{path} runs on {line.holder.host}, and this is {socket.gethostname()}: {there}")
    return line


def stop(path: Path, say: Callable[[str], None], *, patience_s: float = PATIENCE_S) -> RunLine:
    """Ask a run to end as Ctrl-C does, and wait until it has. Raises UsageError for what cannot be stopped
    from here, and LaunchError if it takes too long."""
    line = _running(path, "stop")
    assert line.holder is not None
    pid = line.holder.pid if line.holder.alive else min(live_processes(RunFolder(path).beats))
    try:
        os.kill(pid, signal.SIGINT)
    except PermissionError:
        raise UsageError(f"{path} is run by process {pid} of another user, who alone can stop it") from None
    except ProcessLookupError:
        pass  # it has just ended
    say(f"asked process {pid} to stop; ranks save at their next synchronisation")
    return _ended(path, pid, patience_s)


def resize(path: Path, given: dict[str, Any], say: Callable[[str], None]) -> Record:
    """Let a run go on with other ranks or hosts, and wait until they have committed what
    they trained first. Returns its record then. Raises UsageError for what cannot be resized, or to that, and
    TrainingError if nothing came of it, while the run goes on as it was."""
    line = _running(path, "resize")
    folder = RunFolder(path)
    plan = read_plan(folder)
    command = "run" if plan.program else "train"
    if line.record is None:
        where = ", which a program does in a rankwise.Run" if plan.program else ""
        raise UsageError(f"{path} has not begun to train yet{where}: ask again in a moment")
    if line.holder is None or not line.holder.alive or line.holder.pid in live_processes(folder.beats):
        raise UsageError(
            f"{path} was not started by rankwise {command} --ranks N, which alone can start other ranks: "
            f"stop it, and go on with rankwise {command} --resume {path} --ranks N"
        )
    order = Order(TrainConfig())
    _, wanted = resized(order, folder, given, plan.program)
    if (wanted.ranks, wanted.spares, wanted.hosts) == (plan.ranks, plan.spares, plan.hosts):
        raise UsageError(f"{path} runs on {plan.ranks} ranks already: nothing to resize")
    change.ask(folder.resize, given)
    say(f"{wanted.processes} ranks get ready; the present ones train on until then")
    return _resized(folder, line.holder)


def _resized(folder: RunFolder, launcher: Holder) -> Record:
    while True:
        now = change.read_resize(folder.resize)
        if now is None and not folder.resize.exists():
            raise TrainingError(f"{folder.path} was not resized: what its launcher says tells why")
        if now is not None and now.state == "refused":
            raise UsageError(now.message)
        if now is not None and now.state == "failed":
            raise TrainingError(f"{folder.path} was not resized: {now.message}")
        if now is not None and now.state == "done":
            return folder.read()
        if not _has_open(launcher.pid, folder.claimed):
            record = folder.read()
            raise TrainingError(f"{folder.path} is over ({record.outcome}), before its new ranks had begun")
        time.sleep(LOOK_S)


def _ended(path: Path, pid: int, patience_s: float) -> RunLine:
    give_up = time.monotonic() + patience_s
    while _is_run(path) and (line := look(path)).state in ("starting", "running"):
        if time.monotonic() > give_up:
            raise LaunchError(
                f"{path} has not ended in {patience_s:.0f} s: ask once more, which ends it at once, or end "
                f"process {pid} yourself"
            )
        time.sleep(LOOK_S)
    if not _is_run(path):  # which its launcher has then taken away
        return RunLine(
            path, "interrupted", None, None, "it had not begun to train, and nothing is left of it"
        )
    return line
