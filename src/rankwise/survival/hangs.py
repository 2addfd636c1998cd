"""Tells ranks that hang from ranks that are slow: the rule alone, without processes and clocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.ledger.phases import EXCHANGING
from rankwise.system.activity import Activity, Doing

WAITING = (*EXCHANGING, "recovery")
"""Phases in which a rank waits for others. It is not the one that is late, whatever its process does: inside
MPI some spin and some sleep."""

STEP = ("data", "forward", "backward", "optimizer", "pack", "evaluation", "other")
"""Phases of a step of training or evaluation, to which `Limits.step_s` applies."""

NOTHING_NS, NOTHING_SHARE = 50_000_000, 0.02
"""CPU time of a process that does nothing, in all and as a part of a core: threads of libraries look for news
now and then, and to wait for Python's lock takes some too."""


@dataclass(frozen=True)
class Limits:
    """How long a rank may be stopped or locked, and how long a phase of a step may last, in seconds."""

    hang_s: float = math.inf
    step_s: float = math.inf


@dataclass(frozen=True)
class Rest:
    """That a process is `stopped` or `locked`, since when as far as was seen, and its CPU time then."""

    doing: Doing
    since_ns: int
    cpu_ns: int


def rest(before: Rest | None, activity: Activity, *, phase_ns: int, now_ns: int) -> Rest | None:
    """The rest in which a process is by now; None if it is at work, or waits for what is not in its hands.

    A phase that began later, at `phase_ns`, ends it. Seeing a locked thread run does not: a lock may be
    tried again and again, and if the thread computes, its CPU time will tell.
    """
    if before is not None and before.since_ns < phase_ns:
        before = None
    if activity.doing == "running":
        return before if before is not None and before.doing == "locked" else None
    if activity.doing == "waiting":
        return None
    if before is not None and before.doing == activity.doing:
        used_ns = abs(activity.cpu_ns - before.cpu_ns)  # less, if a child has gone unseen
        if used_ns <= NOTHING_NS + NOTHING_SHARE * (now_ns - before.since_ns):
            return before
    return Rest(activity.doing, now_ns, activity.cpu_ns)


@dataclass(frozen=True)
class Hang:
    """A rank that is to be ended: why, in words, and after how many seconds."""

    why: str
    seconds: float


def hang(
    phase: str,
    phase_s: float,
    doing: Doing,
    rest_s: float,
    *,
    waiting: Sequence[int],
    limits: Limits,
) -> Hang | None:
    """Whether a rank hangs that has been in `phase` for `phase_s` seconds, and is `doing` what it has rested
    in for `rest_s`, while the ranks `waiting` are in an exchange. None if it works, or is slow."""
    others = ", ".join(map(str, waiting))
    who = f"; waiting for it: rank {others}" if waiting else ""
    if rest_s > limits.hang_s:
        silent = f"no sign of life for {rest_s:.0f} s"
        if doing == "stopped":
            return Hang(f"{silent}, stopped in {phase}{who}", rest_s)
        if doing == "locked" and waiting and phase not in WAITING:
            return Hang(f"{silent}, asleep in a lock in {phase}{who}", rest_s)
    if phase_s > limits.step_s and phase in STEP:
        why = f"no end of {phase} after {phase_s:.0f} s, with --step-timeout {limits.step_s:g}{who}"
        return Hang(why, phase_s)
    return None
