"""What a record holds about ranks and the machine: each rank's row, efficiencies, the environment."""

from __future__ import annotations

import platform
import subprocess
import sys
from typing import Any

import torch

from rankwise.comm import World
from rankwise.ledger.phases import USEFUL
from rankwise.plan import RunPlan
from rankwise.runs.record import Efficiency, Environment, Host, Rank, Role, longest_waits, regions_of
from rankwise.system import limits, machine


def standing_by(config: RunPlan, world: World, threads: int) -> list[Rank]:
    """The rows of the ranks that will stand by, up to now, since from here on they sleep. All ranks
    together."""
    if not config.spares:
        return []
    rows = world.allgather_object(rank_row(world, "spare", threads, {}))
    return [Rank(**row) for row in rows[config.ranks :]]


def rank_row(world: World, role: Role, threads: int, measured: dict[str, float]) -> dict[str, Any]:
    """This rank's row in the record, up to now."""
    totals = world.ledger.close()
    cpu_s = machine.cpu_seconds() - world.ledger.cpu_s_before
    traffic = world.traffic
    return {
        "rank": world.number,
        "role": role,
        "host": machine.host_name(),
        "threads": threads,
        "wall_ns": totals.wall_ns,
        "phases_ns": totals.phases_ns,
        "off_cpu_ns": totals.off_cpu_ns,
        **longest_waits(world.exchange_log.wait_on_ns),
        "hidden_ns": world.exchange_log.hidden_ns,
        "ideal_ns": world.exchange_log.ideal_ns(),
        "barrier_wait_ns": world.barrier_wait_ns if world.cross_check else None,
        "measured": measured,
        "regions": regions_of(world.exchange_log.regions.times()),
        "cpu_s": cpu_s,
        "cpu_percent": 100e9 * cpu_s / max(totals.wall_ns, 1),
        "bytes_sent": traffic.bytes_sent,
        "bytes_received": traffic.bytes_received,
        "messages_sent": traffic.messages_sent,
        "messages_received": traffic.messages_received,
        "max_rss_bytes": machine.max_rss_bytes(),
        "pss_bytes": limits.pss_bytes(),
        "died_at_s": None,
    }


def cpu_percent(rows: list[Rank], hosts: list[Host]) -> float:
    """The CPU time of all ranks, in percent of the time of all cores of their hosts."""
    cores = sum(host.cores for host in hosts)
    return 100e9 * sum(row.cpu_s for row in rows) / (max(row.wall_ns for row in rows) * cores)


def efficiency(rows: list[Rank]) -> Efficiency:
    """The POP efficiencies, over the time since start-up (https://pop-coe.eu/node/69).

    With U the useful time of each rank, T the time that all took, and T_ideal the time that they would have
    taken on a network that costs nothing: load balance = mean U / max U, serialization =
    max U / T_ideal, transfer = T_ideal / T, and parallel efficiency is their product, mean U / T.
    """
    rows = [row for row in rows if row.role != "spare"]
    useful = [sum(row.phases_ns[phase] for phase in USEFUL) for row in rows]
    time_ns = max(row.wall_ns - row.phases_ns["startup"] for row in rows)
    ideal_ns = max(row.ideal_ns for row in rows)
    if not max(useful):
        return Efficiency()
    mean = sum(useful) / len(useful)
    return Efficiency(
        parallel=mean / time_ns,
        load_balance=mean / max(useful),
        serialization=max(useful) / ideal_ns,
        transfer=ideal_ns / time_ns,
    )


def environment(world: World, hosts: list[Host]) -> Environment:
    """What the run runs on, as this rank sees it; the git commit on rank 0 alone."""
    mpi4py = sys.modules.get("mpi4py")
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        mpi4py=mpi4py.__version__ if mpi4py else None,
        mpi=world.describe(),
        git_commit=_git_commit() if world.rank == 0 else None,
        hosts=hosts,
    )


def _git_commit() -> str | None:
    """The commit checked out in the current folder, or None."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
