"""The processes that tests start: what is told of those that hang, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from rankwise.comm.mpi_environment import find_mpiexec

from . import processes
from .conftest import Command, launched, mpiexec_words
from .processes import Process

HANGING = """
import sys, time
from mpi4py import MPI
import numpy as np

def stands_here():
    print("rank 1 sleeps", file=sys.stderr, flush=True)
    print("rank 1 begins", flush=True)
    time.sleep(1000)

def waits_here():
    MPI.COMM_WORLD.Allreduce(np.ones(1), np.ones(1))

MPI.COMM_WORLD.Barrier()
(waits_here, stands_here)[MPI.COMM_WORLD.rank]()
"""


def start(command: Command, *words: str) -> Process:
    """Two ranks, as soon as they hang."""
    process = command.start(*mpiexec_words(2), command.python, *words)
    assert process.stdout is not None
    assert process.stdout.readline() == "rank 1 begins\n"
    return process


@pytest.mark.mpi
@pytest.mark.parametrize("warm", [False, True])
def test_a_timeout_tells_where_each_rank_stands(
    request: pytest.FixtureRequest, tmp_path: Path, warm: bool
) -> None:
    """Which rank is at which line, and what was printed until then; also of forks of a warm Python."""
    if warm and not find_mpiexec().is_open_mpi:
        pytest.skip("ranks are forked from a warm Python on Open MPI alone")
    python = request.getfixturevalue("warm_python") if warm else sys.executable
    with launched(tmp_path, python) as command:
        check_what_a_timeout_tells(command, tmp_path)


def check_what_a_timeout_tells(command: Command, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    process = start(command, "hanging.py")
    with pytest.raises(AssertionError) as caught:
        process.communicate(timeout=2)
    told = str(caught.value)
    assert told.index("rank 0") < told.index("in waits_here") < told.index("rank 1")
    assert told.index("rank 1") < told.index("in stands_here") < told.index("stderr so far\nrank 1 sleeps")


@pytest.mark.mpi
@pytest.mark.parametrize("mpiexec_too", [False, True])
def test_nothing_is_left_of_a_killed_job(tmp_path: Path, mpiexec_too: bool) -> None:
    """Neither a process nor a file in shared memory or the temporary folder is there when the test's command
    is closed, whether mpiexec could tidy up or not."""
    if not find_mpiexec().is_open_mpi:
        pytest.skip("other MPIs have other files, or none")
    with launched(tmp_path) as command:
        process = start(command, "-c", HANGING)
        ours = command.belongings
        stacks = [stack for stack in ours.stacks() if stack.rank]
        assert [stack.rank for stack in stacks] == ["0", "1"]
        assert {process.pid, *(stack.pid for stack in stacks)} <= set(ours.processes())
        (files,) = ours.files().values()
        assert len(files) == 3  # a segment each, and mpiexec's folder
        if mpiexec_too:
            process.kill()
        for stack in stacks:
            os.kill(stack.pid, signal.SIGKILL)
    assert not any(path.exists() for path in files)
    assert ours.processes() == []


def test_what_a_test_leaves_is_named_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in a session of its own whose parent has ended fails its test; those of another test are left
    alone."""
    code = (
        "from subprocess import *;"
        "Popen(['sleep', '987'], start_new_session=True, stdout=DEVNULL, stderr=DEVNULL)"
    )
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    with launched(tmp_path) as other:
        neighbour = other.start("sleep", "987")
        with pytest.raises(AssertionError) as caught, launched(tmp_path) as command:
            assert command(sys.executable, "-c", code).code == 0
        first, second = str(caught.value).splitlines()[:2]
        assert "left behind" in first
        assert "sleep 987" in second
        assert command.belongings.processes() == []
        assert neighbour.poll() is None
