"""A user's program as a rank: where its `Run` finds the world and the run folder.

`rankwise run` gives both. A program that python, mpiexec or srun started by itself makes them when it makes
its `Run`, and leaves them when it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from rankwise.comm import World, join, solo_world
from rankwise.comm.mpi import mpi_transport, mpi_world
from rankwise.comm.mpi_environment import started_as_rank
from rankwise.config import LOOP_OPTIONS, TrainConfig
from rankwise.errors import (
    ConfigError,
    Interrupted,
    RankwiseError,
    UsageError,
    one_line,
    unknown_name,
)
from rankwise.launch import program_process
from rankwise.launch.order import OpenFolder, Order, open_folder
from rankwise.launch.plan_file import read_asked, read_plan
from rankwise.launch.rank import ending_all_ranks, late_ledger, new_ledger, wait_for_start
from rankwise.plan import RunPlan
from rankwise.program_plan import DEFAULT_STRATEGY, of_world, program_plan
from rankwise.report.live import Display
from rankwise.runs import checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.training.admission import NotNeeded
from rankwise.training.agreement import require_same_options
from rankwise.training.folder_book import FolderBook
from rankwise.training.set_up import Say, stop_on_signal

RANK_0_S = 5.0
"""How long ranks that are to end leave it to rank 0 to end them all."""


@dataclass
class Seat:
    """Where a rank of a program sits: its world, the folder of the run, and who tells the user.

    A program makes one `Run`; `book` is where that is written down, of which a rank that only `stood_by` has
    none.
    """

    world: World
    folder: RunFolder
    say: Say
    book: FolderBook | None = None
    stood_by: bool = False

    def take(self, options: Mapping[str, Any]) -> tuple[RunPlan, FolderBook]:
        """The plan of a program's `Run` with these options, over which those of the command line win, and
        where it is written down; all ranks together. Raises UsageError."""
        if self.book is not None:
            raise ConfigError("a second Run was made: a program has one, for all its loops")
        require_same_options(self.world, options)
        given = read_plan(self.folder)
        asked = read_asked(self.folder) or {}
        known = {name: its for name, its in {**options, **asked}.items() if name not in ("out", "hosts")}
        plan = program_plan(
            of_world(known, self.world.size),
            given.program,
            mpi_survives=lambda: given.on_failure == "continue",
        )
        plan = plan.with_options(out=self.folder.path)
        start = None
        if self.folder.record.exists():
            start = checkpoint.newest(self.folder.checkpoints, on_damage=self._say_first)
            self._say_first(f"going on {start.where()}")
        epochs = asked.get("epochs")
        book = FolderBook(plan, self.world, self.folder, say=self.say, start=start, epochs=epochs)
        try:
            book.come_in(plan)
        except NotNeeded:
            self.stood_by = True
            raise
        self.book = book
        return plan, book

    def finish(self) -> None:
        """The program is at its end; all ranks together."""
        if self.stood_by:
            return
        self.world.farewell()
        if self.book is not None:
            self.book.complete()
            self.book.close()

    def _say_first(self, line: str) -> None:
        if self.world.rank == 0:
            self.say(line)


_seat: Seat | None = None


def run_options(strategy: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a program gives to its `Run`. Raises ConfigError for an option that a loop cannot have."""
    for name in options:
        if name not in LOOP_OPTIONS:
            if name in TrainConfig.model_fields:
                raise ConfigError(
                    f"Run({name}=...) was given, which a loop of one's own says itself: leave it out"
                )
            raise ConfigError(f"Run: {unknown_name('option', name, LOOP_OPTIONS)}")
    return {"strategy": strategy or DEFAULT_STRATEGY, **options}


def seat_of(options: Mapping[str, Any]) -> Seat:
    """The seat of this process, which it takes now if nobody has given it one."""
    global _seat
    if _seat is None:
        started = program_process.current
        _seat = _own_seat(options) if started is None else _seat_in(started)
    return _seat


def _seat_in(started: program_process.ProgramRank) -> Seat:
    """Of a program that `rankwise run` started, which ends it."""
    inside = contextlib.ExitStack()
    seat: Seat | None = None

    def finish() -> None:
        assert seat is not None
        with ending_all_ranks(seat.world, folder, lambda told: None):
            seat.finish()
        inside.close()
        seat.world.close()

    def fail(error: BaseException) -> None:
        inside.close()
        if seat is not None:
            with ending_all_ranks(seat.world, folder, lambda told: None):
                raise error

    folder = started.folder
    started.take_over(finish, fail)
    if started.mark:
        world = _taking_over(folder, started.mark)
        inside.enter_context(started.crashes_written_down())
    else:
        world = mpi_world(new_ledger()) if started_as_rank() else solo_world(new_ledger())
    seat = Seat(world, folder, lambda line: print(line, file=sys.stderr, flush=True))
    inside.enter_context(stop_on_signal(world))
    return seat


def _taking_over(folder: RunFolder, mark: str) -> World:
    """The world of ranks that have waited here until the start `mark` began. Their time begins then: until
    then it was others' run."""
    transport = mpi_transport() if started_as_rank() else None
    world = World(transport) if transport else solo_world()
    with ending_all_ranks(world, None, lambda told: print(f"rankwise: {told}", file=sys.stderr, flush=True)):
        _make_a_step()
        wait_for_start(world, folder, mark)
    folder.take_part()
    return World(transport, late_ledger()) if transport else solo_world(late_ledger())


def _make_a_step() -> None:
    """Of nothing: much of torch is imported by the first one, for which the run is not to wait."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight])
    weight.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _own_seat(options: Mapping[str, Any]) -> Seat:
    """Of a program that python, mpiexec or srun started: rank 0 makes the folder."""
    world = join()
    program = tuple(sys.argv) if sys.argv[0] else ("python",)
    opened: OpenFolder | None = None
    order = Order(TrainConfig())
    if world.rank == 0:
        config = of_world(options, world.size)
        order = Order(config)
        opened = open_folder(order, program_plan(config, program))
    folder: RunFolder = world.allgather_object(opened.folder if opened else None)[0]
    folder.take_part()
    display = order.display(folder, 0, 0, live=False)
    seat = Seat(world, folder, display.say)
    _end_with_program(seat, opened, display)
    return seat


def _end_with_program(seat: Seat, opened: OpenFolder | None, display: Display) -> None:
    """When the program ends, so does its run, well or with the program's error; signals ask it to stop."""
    inside = contextlib.ExitStack()
    inside.enter_context(stop_on_signal(seat.world))
    if seat.world.rank == 0:
        inside.enter_context(display)
    end_before = sys.excepthook
    failed = False

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        nonlocal failed
        failed = True
        inside.close()
        stopped = isinstance(error, Interrupted | KeyboardInterrupt)
        if opened is not None and isinstance(error, UsageError):
            opened.discard()
        elif opened is None and (stopped or isinstance(error, UsageError)):
            # All ranks raise it, and rank 0 has to see to the folder before it ends them.
            time.sleep(RANK_0_S)
        else:
            with contextlib.suppress(RankwiseError):
                words = one_line(error) or kind.__name__
                seat.folder.close("interrupted" if stopped else "failed", words)
        if seat.world.size == 1 and isinstance(error, RankwiseError):
            print(f"rankwise: {error}", file=sys.stderr, flush=True)
            sys.exit(error.exit_code)
        end_before(kind, error, trace)

    def leave() -> None:
        if failed:
            return
        try:
            seat.finish()
        except BaseException as error:
            fail(type(error), error, error.__traceback__)
            raise
        inside.close()
        if seat.world.rank == 0:
            display.say(f"run folder: {seat.folder.path}")

    sys.excepthook = fail
    atexit.register(leave)
