"""What a user's own script calls to do what the command line does."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

from rankwise.comm import World
from rankwise.config import TrainConfig
from rankwise.launch import Order, launch
from rankwise.launch.program import run_options, seat_of
from rankwise.program_plan import of_world, program_plan
from rankwise.runs.record import Record
from rankwise.training.admission import come_in
from rankwise.training.agreement import require_same_options
from rankwise.training.book import Book
from rankwise.training.options import RunOptions
from rankwise.training.run import Run as Loop


def train(config: TrainConfig, *, resume: Path | str | None = None, tune: bool = False) -> Record:
    """Train as `rankwise train` does, and return the record.

    Starts ``config.ranks`` ranks unless mpiexec or srun started this script, in which case every
    rank calls this and every rank gets the record. With `resume`, what is set in `config` changes the
    options that the run in that folder was started with; with `tune` short runs find out first how this
    machine trains this fastest. Raises RankwiseError.
    """
    return launch(Order(config, resume=Path(resume) if resume else None, tune=tune)).record


class Run(Loop):
    __doc__ = Loop.__doc__

    def __init__(
        self, strategy: str | None = None, *, world: World | None = None, **options: Unpack[RunOptions]
    ) -> None:
        """Begin a run; all ranks together, once in a program.

        `strategy` is how ranks keep in step, allreduce unless given; on one rank it says nothing. `options`
        are those of `rankwise run` that a loop can have. What `rankwise run` is given wins over both. A
        `world` of threads (`rankwise.run_in_threads`) is for tests, and leaves no run folder. Raises
        ConfigError, one line, for what does not fit, or differs between ranks.
        """
        given = run_options(strategy, options)
        if world is not None:
            require_same_options(world, given)
            plan = program_plan(of_world(given, world.size), ("",))
            super().__init__(plan, world, Book(come_in(world, plan.ranks)))
        else:
            seat = seat_of(given)
            plan, book = seat.take(given)
            super().__init__(plan, seat.world, book)
