"""The end of a program that made no `Run`: what its ranks have logged becomes its record."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from typing import Any

from rankwise.errors import Interrupted, RankwiseError, TrainingError, UsageError
from rankwise.launch.supervision import MpiexecResult
from rankwise.ledger.call_log import read_logs
from rankwise.plan import RunPlan
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import record_of_calls
from rankwise.runs.record import Outcome, Record
from rankwise.survival import causes


def close_calls(ending: MpiexecResult, folder: RunFolder, plan: RunPlan) -> Record | None:
    """Write the record of a program whose ranks are gone; None if they have left nothing. Raises the error
    with which it ended, or Interrupted."""
    failure = folder.read_failure()
    wrong_use = failure is not None and failure["exit_code"] == UsageError.exit_code
    if failure is not None and wrong_use and not failure.get("ended_itself"):
        raise UsageError(failure["message"])
    outcome, message = _outcome(ending, folder, failure)
    written = write_record(folder, plan, outcome, message, time.monotonic_ns())
    if written is not None:
        outcome, message = written.outcome, written.message
    if outcome == "interrupted":
        raise Interrupted(message or "stopped")
    if message is not None:
        error = TrainingError(message)
        error.exit_code = failure["exit_code"] if failure else ending.code or 1
        if failure and failure["traceback"]:
            error.add_note(f"On rank {failure['rank']}:\n{failure['traceback']}")
        raise error
    return written


def _outcome(
    ending: MpiexecResult, folder: RunFolder, failure: dict[str, Any] | None
) -> tuple[Outcome, str | None]:
    if ending.interrupted:
        return "interrupted", "stopped"
    if failure is not None:
        return "failed", failure["message"]
    if ending.code and (told := _said_at_end(folder)):
        return "failed", told
    if ending.code:
        words = causes.last_words(folder) or " ".join(ending.last_words.split())[:600]
        return "failed", f"the program ended with code {ending.code}{words and f': {words}'}"
    return "completed", None


def write_record(
    folder: RunFolder, plan: RunPlan, outcome: Outcome, message: str | None, over_ns: int | None = None
) -> Record | None:
    """Compare what the ranks have logged, and write it down."""
    record = record_of_calls(folder, plan.recorded(), outcome, message, over_ns)
    if record is not None:
        folder.write(record)
    return record


def last_one_closes(folder: RunFolder, plan: RunPlan, rank: int, ranks: int) -> Record | None:
    """Of ranks that no launcher of ours watches, the last one to end writes the record, and gets it: by then
    all others have said that they are over, and wait in MPI's own end if anywhere."""
    ended = folder.calls / "ended"
    with contextlib.suppress(OSError):
        ended.mkdir(exist_ok=True)
        (ended / str(rank)).touch()
        if len(os.listdir(ended)) < ranks:  # to read what all have said is for the last one alone
            return None
    if len(_ends(folder)) < ranks:
        return None
    with contextlib.suppress(FileExistsError, RankwiseError):
        os.close(os.open(folder.calls / ".closed", os.O_CREAT | os.O_EXCL))
        shutil.rmtree(ended, ignore_errors=True)
        message = _said_at_end(folder)
        return write_record(folder, plan, "failed" if message else "completed", message)
    return None


def _said_at_end(folder: RunFolder) -> str | None:
    """Of the ranks that ended with another code than 0 the first one's words."""
    ends = {rank: end for rank, end in _ends(folder).items() if end["exit_code"]}
    if not ends:
        return None
    rank, end = min(ends.items(), key=lambda item: item[1]["ended_ns"])
    words = end["words"]
    return f"rank {rank} ended with code {end['exit_code']}{words and f': {words}'}"


def _ends(folder: RunFolder) -> dict[int, dict[str, Any]]:
    """What the ranks that came to an end said there."""
    return {log.rank: log.said for log in read_logs(folder.calls, rows=False) if "ended_ns" in log.said}
