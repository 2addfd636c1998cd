"""The command that starts ranks, and what of mpiexec's words is shown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.comm.mpi_environment import Mpiexec, allocated_hosts
from rankwise.launch import supervision
from rankwise.launch.mpiexec import SURVIVING_BETWEEN_HOSTS, RestartBackoff, command_line
from rankwise.launch.supervision import supervise
from rankwise.system import machine

OPEN_MPI = Mpiexec(Path("mpiexec"), "mpiexec (Open MPI) 5.0.11")
MPICH = Mpiexec(Path("mpiexec"), "HYDRA build details: Version: 5.0.2")


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES", "PBS_NODEFILE"):
        monkeypatch.delenv(name, raising=False)


def test_ranks_with_cores_of_their_own_stay_near_their_memory() -> None:
    """With a core for each rank, ranks are bound to NUMA domains."""
    words = " ".join(command_line(OPEN_MPI, 4, ["program"]))
    assert words.startswith("mpiexec -n 4 ")
    assert "--bind-to numa" in words
    assert words.endswith(" program")


def test_more_ranks_than_cores_yield() -> None:
    """With more ranks than cores nobody is bound, and waiting ranks yield."""
    words = " ".join(command_line(OPEN_MPI, 5, ["program"]))
    assert "--map-by :OVERSUBSCRIBE --bind-to none" in words
    assert "mpi_yield_when_idle 1" in words


def test_a_containers_share_binds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with a share of the CPUs ranks are not bound: others may hold the same cores."""
    monkeypatch.setattr(machine, "cpu_quota", lambda: 4.0)
    assert "--bind-to none" in " ".join(command_line(OPEN_MPI, 2, ["program"]))


def test_a_batch_job_of_several_hosts_is_left_to_mpiexec(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where a batch system gave several hosts, nothing confines ranks to this one's memory or cores."""
    plain = ["mpiexec", "-n", "8", "program"]
    assert allocated_hosts() == 1
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert command_line(OPEN_MPI, 8, ["program"]) == plain
    tolerant = command_line(OPEN_MPI, 8, ["program"], survives=True)
    assert tolerant == [*plain[:3], "--with-ft", "ulfm", *SURVIVING_BETWEEN_HOSTS, "program"]
    monkeypatch.delenv("SLURM_JOB_NUM_NODES")
    (tmp_path / "nodes").write_text("a\na\nb\n")
    monkeypatch.setenv("PBS_NODEFILE", str(tmp_path / "nodes"))
    assert command_line(OPEN_MPI, 8, ["program"]) == plain


def test_other_mpis_get_no_options_of_open_mpi() -> None:
    """MPICH's mpiexec is given the number of ranks alone."""
    assert command_line(MPICH, 3, ["program"]) == ["mpiexec", "-n", "3", "program"]


def test_pauses_grow_only_while_nothing_comes_of_it() -> None:
    """A restart waits a second; twice as long each time that no epoch came to its end since the last one, up
    to a minute."""
    pauses = RestartBackoff()
    assert [pauses.after(epochs) for epochs in (0, 0, 0, 3, 4, 4, 3, 9)] == [1, 2, 4, 1, 1, 2, 4, 1]
    assert [pauses.after(9) for _ in range(8)][-1] == 60


def test_banners_are_held_back_and_the_ranks_words_shown() -> None:
    """What ranks print is passed on line by line; what mpiexec says between rulers is kept for a failure
    that nothing else explains."""
    ruler = "-" * 60
    script = f"print('one\\n{ruler}\\nMPI_ABORT was invoked\\n{ruler}\\ntwo'); raise SystemExit(3)"
    shown: list[str] = []
    ending = supervise([sys.executable, "-c", script], shown.append)
    assert shown == ["one", "two"]
    assert (ending.code, ending.interrupted, ending.last_words) == (3, False, "MPI_ABORT was invoked")


def test_an_mpiexec_that_does_not_end_its_ranks_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a rank has left word that the run fails, and mpiexec goes on all the same, it is ended."""
    monkeypatch.setattr(supervision, "ABORT_S", 0.1)
    ending = supervise([sys.executable, "-c", "import time; time.sleep(60)"], print, lambda: True)
    assert (ending.code, ending.interrupted) == (-signal.SIGTERM, False)


def test_a_rank_without_a_plan_says_so_in_its_folder(tmp_path: Path) -> None:
    """A rank without a plan ends with code 2, prints nothing, and leaves word in its folder."""
    words = [sys.executable, "-P", "-m", "rankwise.launch.rank", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    failure = json.loads((tmp_path / "failure.json").read_bytes())
    assert "plan.json" in failure["message"]
    assert failure["exit_code"] == 2
