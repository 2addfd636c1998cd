"""What this machine has for rankwise, on one page."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from rankwise import data
from rankwise.doctor.mpi import examine_mpi
from rankwise.system import limits, machine

LIBRARIES = ("rankwise", "torch", "mpi4py", "numpy")


def examine(cache_dir: Path | None = None) -> dict[str, Any]:
    """Versions, MPI, cores and datasets, as JSON can hold them. `problems` are for the user to mend.

    MPI is not started: its library is loaded by a process of its own.
    """
    problems: list[str] = []
    prepared = data.prepared(cache_dir)
    cores = machine.usable_cores()
    if line := limits.shared_memory_short(cores):
        problems.append(line)
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in LIBRARIES},
        "mpi": examine_mpi(problems),
        "host": machine.host_name(),
        "cpu_model": machine.cpu_model(),
        "allowed_cpus": len(machine.allowed_cpus()),
        "usable_cores": cores,
        "container_quota_cpus": machine.cpu_quota(),
        "shared_memory_bytes": limits.shared_memory_bytes(),
        "threads_auto": {str(n): max(1, cores // n) for n in (1, 2, 4, 8)},
        "datasets": [{"name": item.name, "bytes": item.size, "path": str(item.path)} for item in prepared],
        "problems": problems,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def page(facts: dict[str, Any]) -> RenderableType:
    """The facts of `examine` for a person."""
    mpi = facts["mpi"]
    survival = "yes (ULFM)" if mpi["survives"] else "no: a failure ends the job"
    sets = "\n".join(f"{item['name']}  {item['bytes'] / 1e6:,.0f} MB" for item in facts["datasets"])
    rows = {
        "versions": "\n".join(
            f"{name} {version or 'missing'}" for name, version in facts["versions"].items()
        ),
        "mpiexec": f"{mpi['mpiexec_version']}\n{mpi['mpiexec']}" if mpi["mpiexec"] else "none",
        "MPI library of mpi4py": "\n".join(
            filter(None, (mpi["library"] or "none", mpi["library_path"], mpi["library_because"]))
        ),
        "MPIs installed": "\n".join(mpi["installed"]) or "none",
        "MPI can survive a lost rank": survival,
        "host": f"{facts['host']}, {facts['cpu_model']}",
        "cores": f"{facts['usable_cores']} usable, {facts['allowed_cpus']} CPUs allowed",
        "container's share": f"{facts['container_quota_cpus']} CPUs"
        if facts["container_quota_cpus"]
        else "all",
        "shared memory": "none"
        if facts["shared_memory_bytes"] is None
        else f"{facts['shared_memory_bytes'] / 1e6:,.0f} MB",
        "threads a rank, by ranks": ", ".join(f"{t} for {n}" for n, t in facts["threads_auto"].items()),
        "datasets in the cache": sets or "none yet: rankwise data prepare NAME",
        "to mend": "\n".join(facts["problems"]) or "nothing",
    }
    table = Table(title="rankwise doctor", show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def hosts_page(facts: dict[str, Any]) -> RenderableType:
    """The facts of `launch.links.survey` for a person."""
    hosts = Table("host", "calls itself", "versions", title="hosts")
    for host in facts["hosts"]:
        versions = ", ".join(f"{name} {version}" for name, version in host["versions"].items())
        hosts.add_row(host["name"], host["calls_itself"], versions)
    links = Table("between", title="what lies between them")
    for head in ("latency, us", "Mbit/s", "both ways, Mbit/s each", "second clock ahead, ms", ""):
        links.add_column(head, justify="right")
    for link in facts["links"]:
        links.add_row(
            " - ".join(link["hosts"]),
            f"{link['latency_s'] * 1e6:,.0f}",
            f"{link['bytes_per_s'] * 8 / 1e6:,.0f}",
            f"{link['both_bytes_per_s'] * 8 / 1e6:,.0f}",
            f"{link['ahead_s'] * 1e3:,.2f} +- {link['ahead_error_s'] * 1e3:.2f}",
            "slowest" if link["hosts"] == facts["slowest"] else "",
        )
    mend = "\n".join(f"to mend: {problem}" for problem in facts["problems"]) or "to mend: nothing"
    return Group(*([hosts, links] if facts["links"] else [hosts]), mend)
