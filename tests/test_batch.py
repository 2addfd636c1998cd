"""Inside a batch system: what its variables say, and shells that mpiexec or srun started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankwise.comm.mpi_environment import Mpiexec, mpi_environment, placement, started_as_rank
from rankwise.launch.command_line import command_line
from rankwise.system import machine
from rankwise.system.batch import allocation
from rankwise.system.hosts import Host

OPEN_MPI = Mpiexec(Path("mpiexec"), "mpiexec (Open MPI) 5.0.11")
MPICH = Mpiexec(Path("mpiexec"), "HYDRA build details: Version: 5.0.2")
FOREIGN = ("SLURM_", "PBS_", "LSB_", "PE_", "OMPI_", "PMI", "MPI_LOCAL", "PRTE_", "HYDI_")


@pytest.fixture(autouse=True)
def _outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is in no job, and has four cores."""
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    for name in os.environ:
        if name.startswith(FOREIGN) or name == "JOB_ID":
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "4", "SLURM_TASKS_PER_NODE": "2(x3),1"}, (4, 7)),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_TASKS_PER_NODE": "1"}, (1, 1)),
        (
            {
                "SLURM_JOB_ID": "7",
                "SLURM_JOB_NUM_NODES": "3",
                "SLURM_TASKS_PER_NODE": "8(x3)",
                "SLURM_STEP_NUM_NODES": "1",
                "SLURM_STEP_TASKS_PER_NODE": "1",
            },
            (1, 1),
        ),
        ({"PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": "7.head", "PBS_NODEFILE": "{}/nodes"}, (2, 5)),
        ({"PBS_JOBID": "7.head", "PBS_NODEFILE": "{}/nodes"}, None),
        ({"PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBID": "7", "PBS_NODEFILE": "{}/gone"}, None),
        ({"LSB_JOBID": "7", "LSB_DJOB_HOSTFILE": "{}/nodes"}, (2, 5)),
        ({"LSB_JOBID": "7", "LSB_MCPU_HOSTS": "n1 4 n2 2"}, (2, 6)),
        ({"LSB_JOBID": "7", "LSB_HOSTS": "n1 n1 n2"}, (2, 3)),
        ({"JOB_ID": "7", "PE_HOSTFILE": "{}/pe"}, (2, 6)),
        ({"JOB_ID": "7"}, None),
        ({}, None),
    ],
)
def test_what_batch_systems_say(
    tmp_path: Path, variables: dict[str, str], expected: tuple[int, int] | None
) -> None:
    """Hosts and slots of a job by the variables and files that each system gives to it; what is not complete
    counts for nothing, as for mpiexec."""
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn1\nn2\n")
    (tmp_path / "pe").write_text("n1 4 all.q@n1 UNDEFINED\nn2 2 all.q@n2 UNDEFINED\n")
    found = allocation({name: value.format(tmp_path) for name, value in variables.items()})
    assert (found and (found.host_count, found.slots)) == expected


def in_job(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_job_of_one_task_has_room_for_all_its_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On one host cores decide, not the slots of a batch system, which has one for a task of many cores."""
    (tmp_path / "nodes").write_text("n1\n")
    in_job(monkeypatch, SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="1", SLURM_TASKS_PER_NODE="1")
    words = command_line(OPEN_MPI, 4, ["program"])
    assert words[words.index("ras") + 1] == "^slurm,pbs,tm,lsf,gridengine"
    assert "numa" in words
    assert command_line(MPICH, 4, ["p"]) == [
        *("mpiexec", "-n", "4", "-prepend-rank", "-rmk", "user", "-launcher", "fork", "p")
    ]
    monkeypatch.delenv("SLURM_JOB_ID")
    assert "ras" not in command_line(OPEN_MPI, 4, ["program"])


def test_an_mpiexec_that_does_not_know_the_batch_system_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Open MPI was built without it, it gets the job's hosts as if they had been given; otherwise all
    ranks would start on one host, without a word."""
    in_job(monkeypatch, LSB_JOBID="7", LSB_MCPU_HOSTS="n1 4 n2 2")
    for reads in (False, True):
        monkeypatch.setattr(Mpiexec, "reads_hosts_of", lambda self, job, reads=reads: reads)
        assert ("n1:4,n2:2" in command_line(OPEN_MPI, 6, ["program"])) != reads
    found = allocation()
    assert found is not None
    assert found.hosts == (Host("n1", 4), Host("n2", 2))


@pytest.mark.parametrize(
    ("variables", "is_rank"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, False),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMIX_RANK": "0"}, False),
        ({"PMIX_RANK": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"PMIX_RANK": "0", "SLURM_NTASKS": "8"}, True),
        ({}, False),
    ],
)
def test_a_shell_of_an_interactive_job_is_no_rank(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], is_rank: bool
) -> None:
    """What is left in the only process of a world, or of a step, keeps nobody from starting ranks."""
    in_job(monkeypatch, **variables)
    assert started_as_rank() == is_rank
    if not is_rank:
        assert placement().size == 1


def test_what_is_left_of_an_mpiexec_does_not_reach_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """mpiexec is called without the variables by which a rank finds another one; settings stay, and so does
    all in a rank of several."""
    left = {"PMI_RANK": "0", "PMI_SIZE": "1", "PMI_FD": "9", "PMIX_NAMESPACE": "x", "HYDI_CONTROL_FD": "7"}
    left |= {"MPI_LOCALRANKID": "0", "OMPI_COMM_WORLD_RANK": "0", "PRTE_LAUNCHED": "1", "PMIX_RANK": "0"}
    kept = {"OMPI_MCA_btl_tcp_if_include": "eth0", "PMIX_MCA_gds": "hash", "PRTE_MCA_plm_ssh_agent": "rsh"}
    in_job(monkeypatch, **left, **kept)
    environment = mpi_environment()
    assert not left.keys() & environment.keys()
    assert environment.items() >= kept.items()
    monkeypatch.setenv("PMI_SIZE", "2")
    assert mpi_environment().items() >= {"PMI_SIZE": "2", "PMIX_NAMESPACE": "x"}.items()
