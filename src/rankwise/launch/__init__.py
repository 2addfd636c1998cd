"""From options to running ranks: alone in this process, under a given MPI, or by our own mpiexec."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from rankwise.comm.mpi_environment import find_mpiexec, placement, started_as_rank
from rankwise.errors import ConfigError, RankwiseError, UsageError
from rankwise.launch import preflight
from rankwise.launch.forking import forks_of
from rankwise.launch.mpiexec import run_by_mpiexec
from rankwise.launch.order import Order, resumed, run_folder
from rankwise.launch.plan_file import read_plan
from rankwise.launch.preflight import PreparedRun
from rankwise.launch.tuning import tuned
from rankwise.plan import make_plan
from rankwise.program_plan import of_world, program_plan
from rankwise.report.progress_bar import showing_progress
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record, Target
from rankwise.system import head_start
from rankwise.system.user_code import require_python


@dataclass(frozen=True)
class ProgramResult:
    """A program that has come to its end. `record` is that of its `Run`, or else of its calls of MPI; None if
    others tell of it."""

    record: Record | None
    folder: Path


@dataclass(frozen=True)
class Result:
    """A finished run. `speaks` is whether this process is the one that tells the user about it."""

    record: Record
    folder: Path
    speaks: bool


def launch(order: Order) -> Result:
    """Run to the end, or go on with what an earlier run left.

    Under mpiexec or srun this process is one rank of the world it is given. Else one rank trains
    here, and several are started with mpiexec. Raises UsageError before training, Interrupted, or
    another RankwiseError.
    """
    if order.tune:
        order = tuned(order)
    if order.resume:
        stored_in = RunFolder(order.resume)
        stored = stored_in.read()
        order = resumed(order, stored_in, stored)
        target = Target.of(order.config.target_accuracy, stored.epochs, None)
        over = len(stored.epochs) >= order.config.epochs or (target is not None and target.reached)
        if stored.outcome == "completed" and over:
            order.say(f"{order.resume} is completed already: nothing to do")
            return Result(stored, stored_in.path, speaks=not started_as_rank())
    if started_as_rank():
        with head_start.importing():
            from rankwise.launch.rank import train_as_rank  # loads torch, which a launcher does not need

        record, folder, rank = train_as_rank(order)
        return Result(record, folder.path, speaks=rank == 0)
    for remark in order.remarks:
        order.say(remark)
    plan = make_plan(order.config, resumes=order.resume is not None)
    by_mpiexec = plan.ranks > 1 or plan.hosts is not None
    if by_mpiexec:
        find_mpiexec()  # before anything is decoded or written
    with contextlib.ExitStack() as stack:
        # It imports what ranks need while the data is prepared.
        forks = stack.enter_context(forks_of(plan)) if by_mpiexec else None
        with showing_progress(order.console) as on_progress:
            prepared = preflight.prepare(plan, on_progress)
        for remark in preflight.remarks(plan):  # of a run that can begin
            order.say(remark)
        folder = stack.enter_context(run_folder(order, plan))
        if by_mpiexec:
            written = run_by_mpiexec(order, prepared, folder, forks)
            assert written is not None  # it is no program of a user's
            record = written
        else:
            with head_start.importing():
                from rankwise.launch.rank import train_alone

            record = train_alone(order, prepared, folder)
        return Result(record, folder.path, speaks=True)


def launch_program(order: Order, program: tuple[str, ...]) -> ProgramResult:
    """Start a program on the ranks that `order` asks for, or let it go on with what an earlier run left, and
    wait for its end; `program` is its script and its arguments, which a resumed run knows by itself.

    Raises UsageError before training, Interrupted, or another RankwiseError.
    """
    if order.resume:
        stored_in = RunFolder(order.resume)
        stored = stored_in.read()
        program = program or read_plan(stored_in).program
        order = resumed(order, stored_in, stored)
        if stored.is_of_calls:
            raise ConfigError(
                f"{order.resume} holds a program that made no rankwise.Run, so there is nothing from which "
                "it could go on: start it anew"
            )
        epochs = order.config.given().get("epochs") or stored.config["epochs"]
        if stored.outcome == "completed" and len(stored.epochs) >= epochs:
            order.say(f"{order.resume} is completed already: nothing to do")
            return ProgramResult(stored, stored_in.path)
    if not program:
        raise ConfigError("no program was given: expected rankwise run [options] SCRIPT.py [its arguments]")
    require_python(Path(program[0]))
    if started_as_rank():
        return _program_as_given(order, program)
    for remark in order.remarks:
        order.say(remark)
    plan = program_plan(order.config, program)
    if plan.processes > 1:
        find_mpiexec()
    for remark in preflight.remarks(plan):
        order.say(remark)
    with run_folder(order, plan) as folder:
        try:
            record = run_by_mpiexec(
                order, PreparedRun(plan, order.config.given().get("epochs", 0), 0), folder
            )
        except RankwiseError:
            _show_calls(order, folder)
            raise
        if record is not None and record.is_of_calls:
            _show_calls(order, folder)
        return ProgramResult(record, folder.path)


def _program_as_given(order: Order, program: tuple[str, ...]) -> ProgramResult:
    """Be one rank of a program that a user's mpiexec or srun started."""
    from rankwise.launch.program_end import last_one_closes
    from rankwise.launch.program_given import given_folder
    from rankwise.launch.program_process import be_rank

    me = placement()
    plan = program_plan(of_world(order.config.given(), me.size), program)
    folder = given_folder(order, plan, me)

    def close() -> None:
        if last_one_closes(folder, plan, me.rank, me.size) is not None:
            _show_calls(order, folder)

    be_rank(folder, me, plan, close)
    return ProgramResult(None, folder.path)


def _show_calls(order: Order, folder: RunFolder) -> None:
    """Tell on stderr, as stdout is the program's, where the time of its ranks went."""
    from rankwise.report.program_summary import program_summary

    with contextlib.suppress(UsageError):
        record = folder.read()
        if record.is_of_calls:
            order.console.print(
                program_summary(record, str(folder.path)), markup=False, highlight=False, soft_wrap=True
            )


__all__ = ["Order", "ProgramResult", "Result", "launch", "launch_program"]
