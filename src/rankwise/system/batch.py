"""What a batch system says of the job around this process: how many hosts and slots, and sometimes which.

One row for each system. A row counts only where all of its `marks` are set: mpiexec, too, passes over a
`PBS_NODEFILE` without the other two, for instance in a shell that ssh opened on a node.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import ConfigError
from rankwise.system.hosts import Host, added_up, read_hostfile

Environment = Mapping[str, str]


@dataclass(frozen=True)
class Allocation:
    """What a job has: its batch system, how many hosts, room for how many ranks on them as that system
    counts, and the hosts themselves if it names them one by one.

    `components` are the parts of Open MPI's runtime of which one reads the same.
    """

    system: str
    components: tuple[str, ...]
    host_count: int
    slots: int
    hosts: tuple[Host, ...] = ()


@dataclass(frozen=True)
class BatchSystem:
    """A row of the table: by which variables a job of this system is known, and who reads its hosts."""

    name: str
    components: tuple[str, ...]
    marks: tuple[str, ...]
    read: Callable[[Environment], tuple[Host, ...] | tuple[int, int] | None]

    def allocation(self, environment: Environment) -> Allocation | None:
        """What this system says, None if it is not there or says nothing that can be read."""
        if not all(environment.get(mark) for mark in self.marks):
            return None
        found: tuple[Host, ...] | tuple[int, int] | None = None
        with suppress(ConfigError, ValueError):
            found = self.read(environment)
        if not found:
            return None
        if isinstance(found[0], int):
            hosts, slots = found
            assert isinstance(hosts, int)
            assert isinstance(slots, int)
            return Allocation(self.name, self.components, hosts, slots)
        named = tuple(host for host in found if isinstance(host, Host))
        slots = sum(host.slots for host in named)
        return Allocation(self.name, self.components, len(named), slots, named)


def _slurm(environment: Environment) -> tuple[int, int] | None:
    """Slurm says numbers as ``2(x3),1``: two tasks on each of three nodes, and one on a fourth. A step's own
    numbers count before those of its job."""
    hosts = _number(environment, "SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
    if hosts is None:
        return None
    said = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE", "")
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", said)
    return hosts, sum(int(tasks) * int(nodes or 1) for tasks, nodes in parts) or hosts


def _pbs(environment: Environment) -> tuple[Host, ...]:
    return read_hostfile(Path(environment["PBS_NODEFILE"]))


def _lsf(environment: Environment) -> tuple[Host, ...] | None:
    """A file with a line for each slot; else ``LSB_MCPU_HOSTS``, which has numbers, or ``LSB_HOSTS``."""
    if path := environment.get("LSB_DJOB_HOSTFILE"):
        with suppress(ConfigError):
            return read_hostfile(Path(path))
    words = environment.get("LSB_MCPU_HOSTS", "").split()
    if words and len(words) % 2 == 0:
        return added_up(Host(name, int(n)) for name, n in zip(words[::2], words[1::2], strict=True))
    return added_up(Host(name, 1) for name in environment.get("LSB_HOSTS", "").split())


def _grid_engine(environment: Environment) -> tuple[Host, ...]:
    return read_hostfile(Path(environment["PE_HOSTFILE"]))


SYSTEMS = (
    BatchSystem("Slurm", ("slurm",), ("SLURM_JOB_ID",), _slurm),
    BatchSystem("PBS", ("pbs", "tm"), ("PBS_ENVIRONMENT", "PBS_JOBID", "PBS_NODEFILE"), _pbs),
    BatchSystem("LSF", ("lsf",), ("LSB_JOBID",), _lsf),
    BatchSystem("Grid Engine", ("gridengine",), ("JOB_ID", "PE_HOSTFILE"), _grid_engine),
)


def allocation(environment: Environment = os.environ) -> Allocation | None:
    """What the batch system around this process has given to its job, None outside of one."""
    for system in SYSTEMS:
        found = system.allocation(environment)
        if found is not None:
            return found
    return None


def _number(environment: Environment, *names: str) -> int | None:
    for name in names:
        if environment.get(name, "").isdecimal():
            return int(environment[name])
    return None
