"""The world of threads keeps the contract of the world of MPI."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rankwise.world import run_in_threads, solo_world
from rankwise.world.surroundings import started_as_rank

from .world_contract import check


def test_threads_keep_the_contract(ranks: int) -> None:
    """Ranks that are threads exchange what ranks under MPI do, for any number of them."""
    run_in_threads(ranks, check)


def test_one_rank_needs_nobody() -> None:
    """The world of one rank keeps the contract without threads or MPI."""
    check(solo_world())


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
