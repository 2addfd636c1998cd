"""The record of a program that made no `Run`, from what its ranks have logged."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from statistics import mean
from typing import Any

from rankwise.ledger.call_log import RankLog, read_logs
from rankwise.ledger.program_ledger import Line, RankTimes, account
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import (
    SCHEMA_VERSION,
    CallSite,
    Clock,
    Efficiency,
    Environment,
    Host,
    Outcome,
    Rank,
    Record,
    Samples,
    longest_waits,
    regions_of,
    utc_before,
)
from rankwise.system.machine import version_of

MOST_LINES = 2000
"""Lines of code that a record holds, those that cost most; each rank's calls lie in full in `calls/`."""


def record_of_calls(
    folder: RunFolder,
    config: dict[str, Any],
    outcome: Outcome,
    message: str | None,
    over_ns: int | None = None,
) -> Record | None:
    """What the ranks of a program have left in its folder, as a record; None if they left nothing. `config`
    is that of its plan; `over_ns` when it was over, on this host's clock."""
    logs = read_logs(folder.calls)
    if not logs:
        return None
    times = account(logs, over_ns)
    left = sorted((row for row in times if not row.is_over), key=lambda row: row.wall_ns)
    if left:
        told = ", ".join(f"rank {row.rank} {row.last}" for row in left[:3])
        told += f" and {len(left) - 3} more" if len(left) > 3 else ""
        message = f"{message + '; ' if message else ''}did not come to an end: {told}"
        outcome = "failed" if outcome == "completed" else outcome
    first = logs[0].said
    wall_ns = max(row.wall_ns for row in times)
    return Record(
        schema_version=SCHEMA_VERSION,
        rankwise_version=version_of("rankwise"),
        started_at=utc_before((time.monotonic_ns() - first["start_ns"]) / 1e9),
        launched_at=folder.launched_at,
        wall_s=wall_ns / 1e9,
        elapsed_s=wall_ns / 1e9,
        outcome=outcome,
        message=message,
        resumed_from_epoch=None,
        config={**config, "calls_logged": True},
        environment=_environment(logs),
        epochs=[],
        ranks=[_rank(row, log) for row, log in zip(times, logs, strict=True)],
        clock=Clock(error_bound_ns=max(log.said.get("clock_error_ns", 0) for log in logs), violations=0),
        efficiency=_efficiency(times),
        samples=Samples(expected=0, trained=0, duplicated=0, lost=0),
        faults=[],
        call_sites=_call_sites(times),
    )


def begin_calls(folder: RunFolder, config: dict[str, Any]) -> None:
    """A program is about to be started: keep its options for what its ranks may leave behind."""
    with suppress(OSError):
        folder.calls.mkdir(exist_ok=True)
        (folder.calls / "config.json").write_text(json.dumps(config))


def end_calls(folder: RunFolder) -> None:
    """The program has a record of its own: nothing is to be made of its calls."""
    with suppress(OSError):
        (folder.calls / "config.json").unlink()
        folder.calls.rmdir()  # unless other ranks have still to take theirs away


def left_behind(folder: RunFolder) -> Record | None:
    """The record of a program that nobody was left to write, None if the folder holds none."""
    try:
        config = json.loads((folder.calls / "config.json").read_bytes())
        return record_of_calls(folder, config, "failed", None)
    except (OSError, ValueError, LookupError):
        return None


def _rank(row: RankTimes, log: RankLog) -> Rank:
    said = log.said
    cpu_s = said.get("cpu_s", 0.0)
    return Rank(
        rank=row.rank,
        role="worker",
        host=said["host"],
        threads=said.get("threads", 1),
        wall_ns=row.wall_ns,
        phases_ns=row.phases_ns,
        **longest_waits(row.wait_on_ns),
        hidden_ns=0,
        cpu_s=cpu_s,
        cpu_percent=100e9 * cpu_s / max(row.wall_ns, 1),
        bytes_sent=row.bytes_sent,
        bytes_received=row.bytes_received,
        messages_sent=row.messages_sent,
        max_rss_bytes=said.get("max_rss_bytes", 0),
        pss_bytes=said.get("pss_bytes"),
        died_at_s=None if row.is_over else row.wall_ns / 1e9,
        has_mpi="mpi" in said,
        regions=regions_of(row.regions),
    )


def _call_sites(times: Sequence[RankTimes]) -> list[CallSite]:
    lines: list[Line] = [line for row in times for line in row.lines]
    lines.sort(key=lambda line: line.wait_ns + line.transfer_ns + line.pack_ns, reverse=True)
    return [
        CallSite(
            rank=line.rank,
            file=line.site.file,
            line=line.site.line,
            function=line.site.function,
            call=line.site.call,
            count=line.count,
            bytes=line.bytes,
            wait_ns=line.wait_ns,
            transfer_ns=line.transfer_ns,
            pack_ns=line.pack_ns,
            **longest_waits(line.wait_on_ns),
            late_at=dict(line.late_at.most_common(5)),
        )
        for line in lines[:MOST_LINES]
    ]


def _efficiency(times: Sequence[RankTimes]) -> Efficiency:
    """Of the time since start-up, what went into the program's own work."""
    useful = [row.phases_ns["compute"] for row in times]
    time_ns = max(row.wall_ns - row.phases_ns["startup"] for row in times)
    if not (max(useful) > 0 and time_ns > 0):
        return Efficiency()
    return Efficiency(parallel=mean(useful) / time_ns, load_balance=mean(useful) / max(useful))


def _environment(logs: Sequence[RankLog]) -> Environment:
    said = next((log.said for log in logs if "mpi" in log.said), logs[0].said)
    hosts = {log.said["host"]: log.said for log in logs}
    return Environment(
        python=said["python"],
        torch=version_of("torch"),
        mpi4py=said.get("mpi4py"),
        mpi=said.get("mpi", "none: the program did not come to it"),
        git_commit=None,
        hosts=[
            Host(
                name=name,
                cores=its.get("cores", 1),
                ranks=sum(log.said["host"] == name for log in logs),
                cpu_model=its.get("cpu_model", "unknown"),
            )
            for name, its in hosts.items()
        ],
        calls_from_c=sorted({name for log in logs for name in log.said.get("calls_from_c", [])}),
    )
