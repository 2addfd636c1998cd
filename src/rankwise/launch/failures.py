"""What a rank that fails leaves behind: its error in one line, and the word in the folder."""

from __future__ import annotations

import sys
import traceback

from rankwise.errors import ProgramEnded, RankLost, RankwiseError, UsageError, one_line
from rankwise.runs.folder import RunFolder
from rankwise.survival import causes
from rankwise.system import machine


def translated(error: BaseException, rank: int, size: int, folder: RunFolder | None = None) -> RankwiseError:
    """A foreign error as one of ours, in one line that names the rank, and says why another was lost as far
    as that is known."""
    if isinstance(error, UsageError):
        return error
    where = f"rank {rank} on {machine.host_name()} failed: " if size > 1 else ""
    kind = "" if isinstance(error, RankwiseError) else f"{type(error).__name__}: "
    known = causes.last_words(folder) if folder and isinstance(error, RankLost) else ""
    told = RankwiseError(f"{where}{kind}{one_line(error)}{known and f'; {known}'}")
    told.exit_code = error.exit_code if isinstance(error, RankwiseError) else told.exit_code
    return told


def write_failure(folder: RunFolder, rank: int, told: RankwiseError, error: BaseException) -> bool:
    """Leave word of the run's first failure, and of what was behind it; returns whether it was the first."""
    content = {
        "rank": rank,
        "message": str(told),
        "exit_code": told.exit_code,
        "may_restart": isinstance(error, RankLost)
        or not isinstance(error, RankwiseError | KeyboardInterrupt),
        "ended_itself": isinstance(error, ProgramEnded),
        "traceback": "".join(traceback.format_exception(error)),
    }
    return folder.leave_failure(content)


def print_traceback(error: BaseException, *ours: str) -> None:
    """As Python prints it, from the program's own lines on: those behind the files that are `ours`."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (*ours, "<frozen runpy>"):
        trace = trace.tb_next
    traceback.print_exception(type(error), error, trace, file=sys.stderr)
