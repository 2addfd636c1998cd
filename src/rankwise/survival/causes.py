"""Why a rank was lost, by what it left behind: the mark of a fault on demand, or its last words."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Fault, utc_before
from rankwise.survival.fault_injection import DEADLY, Mark, read_marks


def new_injected_faults(folder: RunFolder, known: Iterable[Fault]) -> list[Mark]:
    """Faults on demand that ended ranks, in the order of time, but for those that are `known`."""
    told = {(fault.rank, fault.kind, fault.epoch) for fault in known}
    marks = (mark for mark in read_marks(folder.faults) if mark.kind in DEADLY)
    return [mark for mark in marks if (mark.rank, mark.kind, mark.epoch) not in told]


def explain(
    folder: RunFolder, rank: int, known: Iterable[Fault], *, epoch: int, action: str, ago_s: float = 0.0
) -> Fault:
    """The loss of a rank that was found so many seconds ago, after others that are `known`."""
    strike = next((mark for mark in reversed(new_injected_faults(folder, known)) if mark.rank == rank), None)
    words = folder.read_words(rank)
    found_s = time.time() - ago_s
    return Fault(
        rank=rank,
        kind=strike.kind if strike else words.get("kind", "lost"),
        found_at=utc_before(ago_s, "milliseconds"),
        epoch=strike.epoch if strike else epoch,
        step=strike.step if strike else None,
        detected_after_s=max(0.0, found_s - strike.at_s) if strike else words.get("silent_s"),
        action=action,
    )
