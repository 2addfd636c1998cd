"""mpi4py's own demo programs, as its source archive carries them, run under the ledger as without it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rankwise.runs.folder import RunFolder

from .conftest import Command, mpiexec_words
from .sources import find_or_unpack

DEMOS = (
    "helloworld.py",
    *(f"mpi-ref-v1/ex-2.{number}.py" for number in ("01", "08", "16", "29", "32", "34", "35")),
    *(f"mpi-ref-v1/ex-3.{number:02d}.py" for number in (1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13)),
    *(f"nxtval/nxtval-{name}.py" for name in ("mpi3", "onesided", "scalable", "threads")),
    *(f"init-fini/test_{number}.py" for number in range(7)),
    *("init-fini/test_mpi40.py", "reductions/test_reductions.py", "sequential/test_seq.py"),
    *("threads/sendrecv.py", "compute-pi/cpi-cco.py", "compute-pi/cpi-rma.py", "futures/run_hello.py"),
    *("futures/run_cpi.py", "futures/run_primes.py", "nxtval/nxtval-dynproc.py"),
    *("mandelbrot/mandelbrot-seq.py", "mandelbrot/mandelbrot.py"),
    *(f"profiling/{name}.py" for name in ("cpi", "ring", "threads")),
    "reductions/reductions.py",
)

TELLS_TIMES = (
    *("reductions/test_reductions.py", "sequential/test_seq.py", "threads/sendrecv.py", "profiling/cpi.py"),
    *("mandelbrot/mandelbrot-seq.py", "mandelbrot/mandelbrot.py"),
)
"""What these print is another thing each time."""

ASK = ("compute-pi/cpi-cco.py", "compute-pi/cpi-rma.py")
"""These ask for numbers until one is 0: Open MPI's mpiexec keeps an empty input open for ever."""


@pytest.fixture(scope="session")
def sources() -> Path:
    found = find_or_unpack()
    if found is None:
        pytest.skip("the source archive of mpi4py cannot be had from the package index")
    return found


@pytest.mark.full
@pytest.mark.mpi
@pytest.mark.cold  # as people run them
@pytest.mark.timeout(240)
@pytest.mark.parametrize("demo", DEMOS)
def test_a_demo_ends_as_without(command: Command, tmp_path: Path, sources: Path, demo: str) -> None:
    """Its exit code and what it prints are the same; each rank's time closes, if it left any."""
    shutil.copytree(sources / "demo", tmp_path / "demo")
    path = f"demo/{demo}"
    answers = ("sh", "-c", 'printf "100\\n0\\n" | "$@"', "sh") if demo in ASK else ()
    words = (*answers, *mpiexec_words(2), command.python)
    plain = command(*words, path)
    if plain.code:
        pytest.skip(f"it does not run without the ledger: code {plain.code}, {plain.err[-300:]}")
    seen = command(*words, "-m", "rankwise", "run", "--out", "run", path)
    assert seen.code == 0, seen
    if demo not in TELLS_TIMES:
        assert sorted(seen.out.splitlines()) == sorted(plain.out.splitlines())
    ranks = RunFolder(tmp_path / "run").read().ranks
    assert len(ranks) == 2
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in ranks)
