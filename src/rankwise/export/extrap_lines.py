"""Measurements for Extra-P, as JSON lines: the seconds of an epoch, or of a program, over the number of
ranks."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.export.run_content import OUTSIDE, RunContent
from rankwise.ledger.phases import PHASES
from rankwise.ledger.program_ledger import PROGRAM_PHASES
from rankwise.runs.record import Record

ENOUGH = 5
"""Numbers of ranks below which Extra-P itself warns."""

FIXED = (
    "dataset", "model", "program", "batch_size", "optimizer", "precision", "train_limit", "val_limit",
    "evaluate_every", "checkpoint_every",
)  # fmt: skip
"""Options that must be the same in all runs, lest a model over ranks mixes two things."""

FIXED_IF_SEVERAL = ("strategy", "topology", "sync_every", "compress")
"""The same, of runs with more than one rank: one rank alone has nothing to keep in step."""


def write_extrap(runs: Sequence[RunContent], path: Path) -> list[str]:
    """Write the epochs of all runs to `path`, or of programs the whole runs; returns what a reader should
    know, a line each.

    Raises UsageError if the runs do not differ in their number of ranks, or differ in something else, or one
    has no epoch, or a program did not come to its end.
    """
    numbers = {_ranks(run.record) for run in runs}
    if len(numbers) < 2:
        raise UsageError(
            f"extrap needs runs on different numbers of ranks, these have {min(numbers)}: give two or more"
        )
    _require_alike(runs)
    whole, names = ("program", PROGRAM_PHASES) if runs[0].record.is_of_calls else ("epoch", PHASES)
    phases = [_phases(run) for run in runs]
    told = [name for name in names if all(phases) and any(sum(its[name]) for its in phases)]
    with path.open("w", encoding="utf-8") as file:
        for run, seconds in zip(runs, phases, strict=True):
            at = {"params": {"ranks": _ranks(run.record)}, "metric": "time"}
            record = run.record
            walls = [record.wall_s] if record.is_of_calls else [row.wall_s for row in record.epochs]
            lines = {whole: walls}
            lines |= {f"{whole}->{name}": seconds[name] for name in told}  # Extra-P wants each at all numbers
            file.writelines(
                json.dumps(at | {"callpath": place, "value": values}, allow_nan=False) + "\n"
                for place, values in lines.items()
            )
    remarks = []
    if not told:
        remarks.append("not all runs have the timelines of all ranks: only whole epochs are written")
    if len(numbers) < ENOUGH:
        remarks.append(
            f"{len(numbers)} numbers of ranks: Extra-P asks for at least {ENOUGH}, its model of fewer is weak"
        )
    for name, values in (
        ("threads", {max(row.threads for row in run.record.ranks) for run in runs}),
        ("CPUs", {tuple(sorted({host.cpu_model for host in run.record.environment.hosts})) for run in runs}),
    ):
        if len(values) > 1:
            remarks.append(f"the runs differ in {name}: a model over ranks takes that for their number")
    return remarks


def _ranks(record: Record) -> int:
    return sum(row.role != "spare" for row in record.ranks)


def _require_alike(runs: Sequence[RunContent]) -> None:
    first = runs[0]
    for run in runs:
        if run.record.is_of_calls != first.record.is_of_calls:
            program, training = (run, first) if run.record.is_of_calls else (first, run)
            raise UsageError(
                f"{program.name} is a program without a rankwise.Run, {training.name} is a training: extrap "
                "needs runs that differ in their number of ranks alone"
            )
        if run.record.is_of_calls:
            if run.record.outcome != "completed":
                raise UsageError(
                    f"{run.name} did not come to its end ({run.record.outcome}): extrap needs whole runs of "
                    "a program"
                )
        elif not run.record.epochs:
            raise UsageError(f"{run.name} has no finished epoch: extrap needs the times of epochs")
    for name in ("program",) if first.record.is_of_calls else (*FIXED, *FIXED_IF_SEVERAL):
        asked = [run for run in runs if name in FIXED or _ranks(run.record) > 1]
        for run in asked[1:]:
            one, other = (_shown(its.record.config.get(name)) for its in (asked[0], run))
            if one != other:
                raise UsageError(
                    f"{asked[0].name} has {name} {one}, {run.name} has {other}: "
                    "extrap needs runs that differ in their number of ranks alone"
                )


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _phases(run: RunContent) -> dict[str, list[float]]:
    """The mean over its ranks of the seconds of each phase, epoch by epoch, or of a whole program; empty if
    they are not known."""
    working = {row.rank for row in run.record.ranks if row.role != "spare"}
    ns: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for time in run.phases:
        if time.rank not in working or (time.epoch == OUTSIDE and not run.record.is_of_calls):
            continue
        if time.epoch is None:
            return {}
        ns[time.phase][time.epoch] += time.ns
    return {phase: [each / len(working) / 1e9 for each in epochs.values()] for phase, epochs in ns.items()}
