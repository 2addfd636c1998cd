"""The run folder: the files of one run by name, and the only bridge between a run and its readers."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rankwise.errors import ResumeError, StorageError, SupersededError, UsageError, one_line
from rankwise.runs.record import SCHEMA_VERSION, Epoch, Outcome, Record
from rankwise.system.files import Claimed, claim, misspelt, write_atomically, write_first

UNWRITTEN = {
    "rank": -1,
    "message": "a rank failed, and could not write down why in failure.json: is the disk full?",
    "exit_code": 1,
    "may_restart": False,
    "traceback": "",
}
"""What is known of a failure whose file is empty or cut off."""


class RunFolder:
    """The files of one run, by name. `launched_at` is when the user asked for the start in which this process
    takes part, None if that is not known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "plan.json"
        self.next_plan = path / ".next-plan.json"
        self.resize = path / ".resize"
        self.record = path / "record.json"
        self.metrics = path / "metrics.jsonl"
        self.timeline = path / "timeline"
        self.calls = path / "calls"
        self.rank_0 = path / ".rank-0"
        self.checkpoints = path / "checkpoints"
        self.failure = path / "failure.json"
        self.progress = path / ".progress"
        self.faults = path / "faults"
        self.last_words = path / "last-words"
        self.beats = path / ".beats"
        self._ranks_there = path / ".ranks-there"
        self._crashes = path / ".crashes"
        self._start = path / ".start"
        self.claimed = path / ".claim"
        self._mine: str | None = None
        self.launched_at: str | None = None

    def timeline_of(self, rank: int) -> Path:
        """The timeline of one rank."""
        return self.timeline / f"rank-{rank:04d}.npz"

    def output_of(self, rank: int) -> Path:
        """What one rank of a program has printed."""
        return self.path / "output" / f"rank-{rank:04d}.txt"

    def crash_of(self, rank: int) -> Path:
        """Where a crash of one rank is written down."""
        return self._crashes / f"rank-{rank:04d}.txt"

    def leave_words(
        self, rank: int, kind: str, message: str, *, silent_s: float | None = None, **more: Any
    ) -> None:
        """Write down why a rank ends that the others go on without. The first reason counts."""
        content = {"kind": kind, "message": message, "silent_s": silent_s, **more}
        with suppress(OSError):
            self.last_words.mkdir(exist_ok=True)
            write_first(self._words_of(rank), json.dumps(content, indent=1).encode())

    def leave_failure(self, content: dict[str, Any]) -> bool:
        """Write down what ends the run; returns whether it was the first reason, which counts."""
        try:
            write_first(self.failure, json.dumps(content, indent=1).encode())
        except OSError:
            return False
        return True

    def read_failure(self) -> dict[str, Any] | None:
        """What ends the run, None if nothing does. A rank that could not write it down has left a file that
        says nothing."""
        try:
            text = self.failure.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            text = b""
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError):
            return dict(UNWRITTEN)

    def read_words(self, rank: int) -> dict[str, Any]:
        """The last words about a rank, empty if there are none."""
        try:
            return dict(json.loads(self._words_of(rank).read_bytes()))
        except (OSError, ValueError):
            return {}

    def read_all_words(self) -> dict[int, dict[str, Any]]:
        """The last words about each rank about which there are any."""
        ranks = [int(path.stem.removeprefix("rank-")) for path in self.last_words.glob("rank-*.json")]
        return {rank: self.read_words(rank) for rank in sorted(ranks)}

    def forget_failures(self) -> None:
        """The run goes on: what ended it, or one of its ranks, was before."""
        self.failure.unlink(missing_ok=True)
        for path in (self.last_words, self._crashes):
            shutil.rmtree(path, ignore_errors=True)

    def tell_ranks(self, ranks: int) -> None:
        """So many train now. If that cannot be written, the launcher does not know."""
        with suppress(StorageError):
            write_atomically(self._ranks_there, str(ranks).encode())

    def read_ranks(self) -> int | None:
        """How many train, as told last; None before any do."""
        try:
            return int(self._ranks_there.read_bytes())
        except (OSError, ValueError):
            return None

    def forget_ranks(self) -> None:
        """None train any more."""
        self._ranks_there.unlink(missing_ok=True)

    def forget_resize(self) -> None:
        """Nothing comes any more of a change of ranks that a start before was at."""
        for path in (self.resize, self.next_plan):
            path.unlink(missing_ok=True)

    def begin(self, launched_at: str = "", *, mark: str = "") -> None:
        """The run is about to be started, by a command that was given at `launched_at` (UTC): ranks of an
        earlier start, wherever they are, may not write any more, and what they were at is over. Ranks that
        wait for the start of the name `mark` begin now."""
        self.beats.unlink(missing_ok=True)
        self.forget_ranks()
        write_atomically(self._start, f"{mark or os.urandom(8).hex()} {launched_at}".encode())

    def has_begun(self, mark: str) -> bool:
        """Whether the start that began last is the one of this name."""
        return self._last_start().partition(" ")[0] == mark

    def take_part(self) -> None:
        """This process is a rank of the start that began last."""
        self._mine = self._last_start()
        self.launched_at = self._mine.partition(" ")[2] or None

    @property
    def start(self) -> str:
        """Names the start of which this process is a rank, empty if it is none."""
        return self._mine or ""

    def require_part(self) -> None:
        """Raises SupersededError if the run was started again since this process took part.

        After a link between hosts was cut, ranks on both sides may live, and see the folder.
        """
        if self._mine is not None and self._last_start() != self._mine:
            raise SupersededError(f"{self.path} was started again without this rank")

    def _last_start(self) -> str:
        try:
            return self._start.read_text()
        except OSError:
            return ""

    def _words_of(self, rank: int) -> Path:
        return self.last_words / f"rank-{rank:04d}.json"

    def claim(self) -> int | None:
        """Keep other starts out of the folder until the descriptor that is returned is closed, or this
        process ends; None where the file system knows no locks. Raises UsageError if another start holds it.
        """
        try:
            return claim(self.claimed, f"process {os.getpid()} on {socket.gethostname()}")
        except Claimed as error:
            raise UsageError(
                f"{self.path} is in use by {error}: wait for its end, or choose another --out"
            ) from None
        except OSError as error:
            raise UsageError(f"cannot write the run folder {self.path}: {error.strerror}") from None

    def clear(self) -> None:
        """No run came about in a folder that was there before: take away what a start has put there."""
        files = (
            *(self.plan, self.failure, self.beats, self.progress, self.rank_0, self._start, self.claimed),
            *(self.next_plan, self.resize, self._ranks_there),
        )
        for path in files:
            path.unlink(missing_ok=True)
        for path in (self.last_words, self._crashes, self.calls):
            shutil.rmtree(path, ignore_errors=True)
        for path in (self.timeline, self.checkpoints):
            with suppress(OSError):  # what is in it was there before
                path.rmdir()

    def require_no_run(self) -> None:
        """Raises UsageError if the folder holds a run."""
        if self.record.exists():
            raise UsageError(f"{self.path} already holds a run: choose another --out, or go on with --resume")

    def create(self, *, anew: bool = False) -> list[Path]:
        """Make the folder; returns the folders that were not there before, the innermost first.

        Raises UsageError if it cannot be written, or already holds a run; with `anew` FileExistsError if it
        is there at all.
        """
        if not anew:
            self.require_no_run()
        new = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.mkdir(exist_ok=not anew)
            for folder in (self.timeline, self.checkpoints):
                folder.mkdir(exist_ok=True)
            write_atomically(self.path / ".writable", b"")
            (self.path / ".writable").unlink()
        except (OSError, StorageError) as error:
            if anew and isinstance(error, FileExistsError):
                raise
            reason = getattr(error, "strerror", None) or one_line(error)
            raise UsageError(
                f"cannot write the run folder {self.path}: {reason}; choose another --out"
            ) from None
        return new

    def write(self, record: Record) -> None:
        """Replace record.json. Raises StorageError; the one before stays.

        A run in which a rank has failed does not go on, so its record is not made `running` again.
        """
        self.require_part()
        if record.outcome == "running" and self.failure.exists():
            return
        write_atomically(self.record, record.model_dump_json(indent=1).encode() + b"\n")

    def read(self) -> Record:
        """The record. Raises ResumeError if there is none, or it is damaged or of a newer version."""
        if not self.record.is_file():
            raise ResumeError(no_run(self.path, "record.json"))
        try:
            content = json.loads(self.record.read_bytes())
            version = content.get("schema_version")
            if isinstance(version, int) and version > SCHEMA_VERSION:
                raise ResumeError(f"{self.record} was written by a newer rankwise (schema {version})")
            return Record.model_validate(content)
        except (OSError, ValueError, ValidationError, AttributeError, RecursionError) as error:
            raise ResumeError(f"{self.record} is damaged: {one_line(error)[:200]}") from None

    def epochs_to_come(self) -> int:
        """How many epochs the run is to have in all, 0 if that is not known yet."""
        try:
            return int(self.read().config["epochs"] or 0)
        except (UsageError, LookupError):
            return 0

    def read_metrics(self) -> list[dict[str, Any]]:
        """The epochs that stand in metrics.jsonl so far; a line that is just being written does not count."""
        try:
            lines = self.metrics.read_bytes().splitlines(keepends=True)
        except OSError:
            return []
        return [json.loads(line) for line in lines if line.endswith(b"\n")]

    def keep_metrics(self, epochs: Sequence[Epoch]) -> None:
        """Make metrics.jsonl hold these epochs."""
        self.require_part()
        write_atomically(self.metrics, "".join(e.model_dump_json() + "\n" for e in epochs).encode())

    def close(self, outcome: Outcome, message: str, *, but_for: Collection[Outcome] = ()) -> None:
        """Set the outcome of a run whose ranks are gone and could not do it themselves, or have set one of
        `but_for`, which is not true."""
        record = self.read()
        if record.outcome in ("running", *but_for):
            self.write(record.model_copy(update={"outcome": outcome, "message": message}))


def no_run(path: Path, lacks: str) -> str:
    """What a path is that is no run folder."""
    hint = "" if path.exists() else misspelt(path)
    return f"{path} holds no run: there is no {lacks} in it{hint}"


def new_run_paths(name: str) -> Iterator[Path]:
    """runs/<time>-<name>, then with numbers from 2 behind it: the first that does not exist yet is to be a
    run's folder."""
    base = Path("runs") / f"{datetime.now().strftime('%Y%m%d-%H%M%S')}-{name}"
    yield base
    for number in itertools.count(2):
        yield base.with_name(f"{base.name}-{number}")
