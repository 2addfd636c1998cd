"""What a user's own script calls to do what the command line does."""

from __future__ import annotations

from pathlib import Path

from rankwise.config import TrainConfig
from rankwise.launch import Order, launch
from rankwise.runs.record import Record


def train(config: TrainConfig, *, resume: Path | str | None = None, tune: bool = False) -> Record:
    """Train as `rankwise train` does, and return the record.

    Starts ``config.ranks`` ranks unless mpiexec or srun started this script, in which case every
    rank calls this and every rank gets the record. With `resume`, what is set in `config` changes the
    options that the run in that folder was started with; with `tune` short runs find out first how this
    machine trains this fastest. Raises RankwiseError.
    """
    return launch(Order(config, resume=Path(resume) if resume else None, tune=tune)).record
