"""Why a rank was lost, by what it left behind: the mark of an injected fault, or its last words."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rankwise.errors import ProgramError, one_line
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Fault, utc_before
from rankwise.survival import crashes
from rankwise.survival.fault_injection import DEADLY, InjectedCrash, Mark, read_marks


def new_injected_faults(folder: RunFolder, known: Iterable[Fault]) -> list[Mark]:
    """Injected faults that ended ranks, in the order of time, but for those that are `known`."""
    seen = {(fault.rank, fault.kind, fault.epoch) for fault in known}
    marks = (mark for mark in read_marks(folder.faults) if mark.kind in DEADLY)
    return [mark for mark in marks if (mark.rank, mark.kind, mark.epoch) not in seen]


def harmless_faults(folder: RunFolder) -> list[Fault]:
    """Injected faults that did not end their rank, in the order of time."""
    return [
        Fault(
            rank=mark.rank,
            kind=mark.kind,
            epoch=mark.epoch,
            step=mark.step,
            action="dropped" if mark.kind == "nan" else "none",
        )
        for mark in read_marks(folder.faults)
        if mark.kind not in DEADLY
    ]


def leave_crash(folder: RunFolder, rank: int, error: BaseException) -> ProgramError | None:
    """Write down the error that ends a rank; returns one that should end the run, if the same has ended
    another rank in the same epoch.

    The same is one of the same type, from the same line of code. What ends a rank because of a sample ends
    in the same epoch the rank to which that sample is dealt next, and so on. An injected crash does not.
    """
    raised = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(raised.filename).name}, line {raised.lineno}"
    mine: dict[str, Any] = {"error": where, "epoch": len(folder.read_metrics()) + 1}
    message = f"{type(error).__name__}: {one_line(error)}"
    told = "".join(traceback.format_exception(error))
    # First write, then read: of two ranks that fail at once one finds the other's words.
    folder.leave_words(rank, "crash", message, traceback=told, **mine)
    other = _ended_alike(folder, rank, mine)
    if other is None or isinstance(error, InjectedCrash):
        return None
    of_all = _of_all(f"{where}: {one_line(error)}", f"rank {other}")
    of_all.__cause__ = error
    return of_all


def find_crashes(folder: RunFolder, ranks: Iterable[int]) -> ProgramError | None:
    """Write down why ranks have ended that a signal of their own code has ended, such as SIGSEGV. Returns an
    error that should end the run, if the same has ended two ranks in the same epoch: the same signal at the
    same line of code."""
    of_all = None
    for rank in ranks:
        crash = crashes.read(folder.crash_of(rank))
        if crash is None:
            continue
        if not folder.read_words(rank):
            error = crash.what if crash.has_place else None
            epoch = len(folder.read_metrics()) + 1
            folder.leave_words(rank, "crash", crash.what, traceback=crash.stacks, error=error, epoch=epoch)
        words = folder.read_words(rank)
        mine = {name: words.get(name) for name in ("error", "epoch")}
        other = _ended_alike(folder, rank, mine) if mine["error"] else None
        if other is not None:
            of_all = _of_all(crash.what, " and ".join(f"rank {its}" for its in sorted((rank, other))))
    return of_all


def _ended_alike(folder: RunFolder, rank: int, mine: dict[str, Any]) -> int | None:
    """Another rank that left the same words, None if there is none."""
    words = folder.read_all_words().items()
    return next((other for other, its in words if other != rank and mine.items() <= its.items()), None)


def _of_all(what: str, others: str) -> ProgramError:
    return ProgramError(
        f"{what} (it ended {others} in the same epoch, and would end one rank after the other: mend the "
        "program)"
    )


def last_words(folder: RunFolder) -> str:
    """What is known of ranks that have ended, by their last words, empty if nothing is."""
    words = folder.read_all_words().items()
    return "; ".join(f"rank {rank}: {its['message']}" for rank, its in words if its)


def explain(
    folder: RunFolder, rank: int, known: Iterable[Fault], *, epoch: int, action: str, ago_s: float = 0.0
) -> Fault:
    """The loss of a rank that was found `ago_s` ago, after others that are `known`. It was lost in `epoch`,
    unless its mark says another."""
    mark = next((mark for mark in reversed(new_injected_faults(folder, known)) if mark.rank == rank), None)
    words = folder.read_words(rank)
    found_s = time.time() - ago_s
    return Fault(
        rank=rank,
        kind=mark.kind if mark else words.get("kind", "lost"),
        found_at=utc_before(ago_s, "milliseconds"),
        epoch=mark.epoch if mark else epoch,
        step=mark.step if mark else None,
        detected_after_s=max(0.0, found_s - mark.at_s) if mark else words.get("silent_s"),
        action=action,
    )
