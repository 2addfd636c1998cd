"""The world of threads keeps the contract of the world of MPI."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from rankwise.comm import World, run_in_threads, solo_world
from rankwise.comm.mpi_environment import started_as_rank
from rankwise.errors import RankwiseError

from .conftest import Command
from .world_contract import check


def test_threads_keep_the_contract(ranks: int) -> None:
    """Ranks that are threads exchange what ranks under MPI do, for any number of them."""
    run_in_threads(ranks, check)


def test_one_rank_needs_nobody() -> None:
    """The world of one rank keeps the contract without threads or MPI."""
    check(solo_world())


def test_ranks_that_hang_do_not_keep_the_process(command: Command) -> None:
    """If the one who started ranks is interrupted, ranks that wait in an exchange are released, and one that
    computes for ever ends with the process."""
    program = """
import os, signal, threading
import numpy as np
from rankwise.errors import RankLost
from rankwise.comm import run_in_threads

signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may ignore it
released = threading.Event()

def program(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGINT)
        threading.Event().wait()
    try:
        world.allreduce(np.ones(1))
    except RankLost:
        released.set()

try:
    run_in_threads(2, program)
except KeyboardInterrupt:
    print(released.wait(20))
"""
    done = command(sys.executable, "-c", program, timeout=30)
    assert (done.code, done.out) == (0, "True\n"), done


def test_an_exchange_to_which_all_came_is_not_lost() -> None:
    """A rank that is slow to leave an exchange gets its result, also if the other has failed since."""
    got: list[float] = []

    def program(world: World) -> None:
        value = np.array([float(world.rank + 1)])
        exchange = world.start_allreduce(value)
        if world.rank == 1:
            exchange.wait()
            raise RankwiseError("the first that is through fails")
        for thread in threading.enumerate():
            if thread.name == "rank-1":
                thread.join()
        exchange.wait()
        got.append(float(value[0]))

    with pytest.raises(RankwiseError, match="the first that is through fails"):
        run_in_threads(2, program)
    assert got == [3.0]


@pytest.mark.parametrize("mark", ["OMPI_COMM_WORLD_SIZE", "PMI_RANK", "PMIX_RANK"])
def test_ranks_are_told_by_their_environment(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process started by mpiexec or srun is told from one that was not."""
    assert not started_as_rank()
    monkeypatch.setenv(mark, "0")
    assert started_as_rank()


def test_importing_starts_no_mpi() -> None:
    """`import rankwise`, and even loading every public name, does not load MPI, let alone start it."""
    code = (
        "import rankwise, sys\n"
        "for name in rankwise.__all__: getattr(rankwise, name)\n"
        "print('mpi4py.MPI' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
