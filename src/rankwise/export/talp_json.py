"""The JSON that TALP of DLB writes and `talp-pages` reads: efficiencies of a whole run.

TALP knows its factors by other names: parallel efficiency = load balance x communication efficiency, and
communication efficiency is the product of what rankwise calls serialization and transfer. Load balance is
split into that of the ranks inside a node and that of the nodes (DLB 3.5, src/talp/perf_metrics.c).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import UsageError
from rankwise.export.run_content import RunContent
from rankwise.ledger.phases import EXCHANGING, USEFUL
from rankwise.runs.record import Rank

LAYOUT = "3.8"
"""The version of DLB whose layout this is."""


def write_talp(runs: Sequence[RunContent], path: Path) -> list[str]:
    """Write one run to the file `path`, or several into the folder `path`, a file each.

    `talp-pages` compares the files that lie in one folder below the one it is given. Raises UsageError if a
    run has no efficiencies.
    """
    contents = [json.dumps(talp(run), indent=1, allow_nan=False) + "\n" for run in runs]
    if len(runs) == 1:
        path.write_text(contents[0], encoding="utf-8")
        return []
    folder = path / "runs"
    folder.mkdir(parents=True)
    for number, (run, content) in enumerate(zip(runs, contents, strict=True), start=1):
        name = re.sub(r"[^\w.-]+", "-", Path(run.name).resolve().name)
        (folder / f"{number:02d}-{name}.json").write_text(content, encoding="utf-8")
    return []


def talp(run: RunContent) -> dict[str, Any]:
    """A run as TALP would have written it, over the time since start-up; times in ns."""
    record = run.record
    found = record.efficiency
    rows = [row for row in record.ranks if row.role != "spare"]
    if found.parallel is None or found.load_balance is None or not rows:
        why = "no rank computed" if record.is_of_calls else "nothing was trained"
        raise UsageError(f"{run.name} has no efficiencies, as {why}: talp needs them")
    communication = found.parallel / found.load_balance
    work = ("compute",) if record.is_of_calls else USEFUL
    useful = {row.rank: _sum(row, work) for row in rows}
    by_host: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        by_host[row.host].append(useful[row.rank])
    busiest_node = max(sum(host) / len(host) for host in by_host.values())
    busiest, mean = max(useful.values()), sum(useful.values()) / len(rows)
    region = {
        "numCpus": len(rows),
        "numMpiRanks": len(rows),
        "numNodes": len(by_host),
        "avgCpus": float(len(rows)),
        "numGpus": 0,
        "cycles": 0,
        "instructions": 0,
        "numMeasurements": 1,
        "numMpiCalls": sum(row.messages_sent for row in rows),
        "numOmpParallels": 0,
        "numOmpTasks": 0,
        "elapsedTime": max(row.wall_ns - row.phases_ns["startup"] for row in rows),
        "usefulTime": sum(useful.values()),
        "mpiTime": sum(_sum(row, EXCHANGING) for row in rows),
        "ompLoadImbalanceTime": 0,
        "ompSchedulingTime": 0,
        "ompOutsideParallelTime": 0,
        "parallelEfficiency": found.parallel,
        "mpiParallelEfficiency": found.parallel,
        "mpiCommunicationEfficiency": communication,
        "mpiLoadBalance": found.load_balance,
        "mpiLoadBalanceIn": busiest_node / busiest,
        "mpiLoadBalanceOut": mean / busiest_node,
        "ompParallelEfficiency": 1.0,
        "ompLoadBalance": 1.0,
        "ompSchedulingEfficiency": 1.0,
        "ompCoverageEfficiency": 1.0,
    }
    return {
        "dlbVersion": LAYOUT,
        "timestamp": record.started_at,
        "resources": {"numCpus": len(rows), "numNodes": len(by_host), "numMpiRanks": len(rows), "numGpus": 0},
        # talp-pages wants a commit wherever there is any metadata
        "metadata": {
            "gitCommit": record.environment.git_commit or "",
            "writtenBy": f"rankwise {record.rankwise_version}",
            "run": run.name,
            "threadsOfARank": max(row.threads for row in rows),
        },
        "Application": {"Global": region},
    }


def _sum(row: Rank, phases: Sequence[str]) -> int:
    return sum(row.phases_ns.get(phase, 0) for phase in phases)
