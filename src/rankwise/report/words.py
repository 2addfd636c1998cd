"""Numbers as people read them."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.runs.record import Efficiency, Fault, Target


def count(number: int, noun: str) -> str:
    """A number of things: 1 rank, 2 ranks."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def percent(share: float) -> str:
    """A fraction in percent, with a decimal where it is small: 31%, 7.5%."""
    return f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"


def loss(value: float | None) -> str:
    """A loss, or that it is not known: 1.2345, unknown."""
    return "unknown" if value is None else f"{value:.4f}"


def target(found: Target) -> str:
    """When an accuracy was reached: 12 s after launch, 9 s after the first step, 1 s of it evaluation."""
    parts = [
        f"{duration(seconds)} {what}"
        for seconds, what in (
            (found.from_launch_s, "after launch"),
            (found.from_first_step_s, "after the first step"),
            (found.evaluation_s, "of it evaluation"),
        )
        if seconds is not None
    ]
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds with three digits, below one as milliseconds: 7.22 s, 34.2 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def losses(found: Sequence[Fault]) -> str:
    """Which ranks a run lost: lost rank 1 (kill) in epoch 2, and went on; rank 0 (hang) in epoch 3, and began
    again. Nothing if it lost none."""
    ways = {"continue": "and went on", "restart": "and began again"}
    told = [
        f"{f'rank {fault.rank}' if fault.rank >= 0 else 'a rank'} ({fault.kind}) in epoch {fault.epoch}, "
        f"{ways[fault.action]}"
        for fault in found
    ]
    return f"lost {'; '.join(told)}" if told else ""


CAUSES = {
    "lost_work": "lost work",
    "detection": "detection",
    "repair": "repair",
    "pauses": "pauses",
    "fewer_ranks": "fewer ranks",
}
"""What a run lost time to, in words."""


def goodput(found: Efficiency) -> str:
    """What faults and stops cost: goodput 91.20%: lost to pauses 6.10%, fewer ranks 2.70%; recovered after
    52 ms in the mean. Nothing if they cost nothing."""
    costs = [
        f"{CAUSES.get(cause, cause)} {share:.2%}"
        for cause, share in found.goodput_lost.items()
        if share >= 0.00005
    ]
    if found.goodput is None or not costs:
        return ""
    mean = f"; recovered after {duration(found.mean_recovery_s)} in the mean" if found.mean_recovery_s else ""
    return f"goodput {found.goodput:.2%}: lost to {', '.join(costs)}{mean}"
