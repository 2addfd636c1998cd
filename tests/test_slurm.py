"""The batch script under a real Slurm."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import tiny
from .conftest import SURROUNDINGS
from .processes import wait_for
from .slurm import Slurm, why_not
from .test_cli import call
from .test_mpi import closes

pytestmark = [
    pytest.mark.mpi,
    pytest.mark.waits,
    pytest.mark.timeout(420),  # the first test may have to install Slurm
    pytest.mark.xdist_group("slurm"),  # of which a machine has one
]


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    """One Slurm for all tests of this file."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Slurm() as running:
        yield running


def submitted(slurm: Slurm, folder: Path, *words: str) -> str:
    """The number of a job that was written by the command line and given to sbatch in a folder."""
    here = f"export PATH={Path(sys.executable).parent}:$PATH PYTHONPATH={SURROUNDINGS['PYTHONPATH']}"
    script = folder / "job.sh"
    given = [*tiny.WORDS, "--ranks", "2", "--threads", "1", "--checkpoint-every", "20"]
    given += ["--out", str(folder / "run"), *words]
    assert call("submit", "slurm", "--setup", here, "--notice", "10", "--to", str(script), *given) == 0
    return slurm.run("sbatch", str(script), cwd=folder, check=True).split()[-1]


def ended(slurm: Slurm, job: str, folder: Path) -> Record:
    """The record of a run whose job has come to its end."""
    try:  # a job that is just being put back has one of the other states of an end for a moment
        wait_for(lambda: slurm.job(job).get("JobState") == "COMPLETED", 180)
    except AssertionError:
        log = "\n".join(path.read_text() for path in folder.glob("*.log"))
        raise AssertionError(f"{slurm.job(job)}\n{log}\n{slurm.words()}") from None
    record = RunFolder(folder / "run").read()
    assert record.outcome == "completed"
    assert record.samples.trained == record.samples.expected > 0
    assert record.samples.lost == record.samples.duplicated == 0
    assert closes(record)
    return record


def test_a_job_trains(slurm: Slurm, tmp_path: Path) -> None:
    """The script that was written is taken by sbatch and trains on as many ranks as were asked for, which go
    on when one dies."""
    job = submitted(slurm, tmp_path, "--epochs", "3", "--fault", "kill:rank=1,epoch=2,step=2")
    record = ended(slurm, job, tmp_path)
    assert len(record.ranks) == 2
    assert [(fault.rank, fault.action) for fault in record.faults] == [(1, "continue")]


def test_a_job_goes_on_after_a_notice(slurm: Slurm, tmp_path: Path) -> None:
    """Slurm's notice makes the run save itself and the script put the job back into the queue; started once
    more it goes on to its end with all samples."""
    job = submitted(slurm, tmp_path, "--epochs", "100")
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 2)
    slurm.run("scancel", "--signal=USR1", "--batch", job, check=True)
    wait_for(lambda: slurm.job(job).get("Restarts") == "1", 60)
    stopped = RunFolder(tmp_path / "run").read()
    assert stopped.outcome == "interrupted"
    assert len(stopped.epochs) < 100
    # Slurm lets a job that was put back wait for two minutes; the same script goes on at once.
    slurm.run("scancel", job, check=True)
    again = slurm.run("sbatch", str(tmp_path / "job.sh"), cwd=tmp_path, check=True).split()[-1]
    record = ended(slurm, again, tmp_path)
    assert len(record.epochs) == 100
    assert record.resumed_from_epoch is not None
