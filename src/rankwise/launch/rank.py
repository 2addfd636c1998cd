"""Being a rank: alone in this process, one of those that our launcher started for a run folder, or one of
those that a user's mpiexec or srun started."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from rankwise.comm import World, solo_world
from rankwise.comm.mpi import may_vanish, mpi_transport, mpi_world
from rankwise.errors import (
    ConfigError,
    Interrupted,
    LaunchError,
    RankLost,
    RankwiseError,
    SupersededError,
    UsageError,
)
from rankwise.launch.failures import translated, write_failure
from rankwise.launch.order import OpenFolder, Order, open_folder
from rankwise.launch.plan_file import read_plan
from rankwise.launch.preflight import PreparedRun
from rankwise.ledger.phases import Ledger, measure_cost
from rankwise.plan import RunPlan, make_plan
from rankwise.report.live import Display
from rankwise.runs import checkpoint, resize
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.survival import causes, crashes
from rankwise.system import machine
from rankwise.system.process_end import end_process
from rankwise.training.agreement import require_same_options
from rankwise.training.rank import get_ready, run
from rankwise.training.set_up import Say, stop_on_signal

LOOK_S = 0.02
"""How often a rank that waits to take over looks whether it is to."""

FIRST_WORD_S = 2.0
"""How long a rank that fails too leaves the first one to say why, before it ends the job itself."""


def train_alone(order: Order, prepared: PreparedRun, folder: RunFolder) -> Record:
    """One rank, in this process, without MPI."""
    world = solo_world(new_ledger())
    plan = read_plan(folder)
    live = order.console.is_terminal
    with order.display(folder, plan.epochs, prepared.samples_per_epoch, live=live) as display:
        try:
            return _train(plan, world, folder, display.say)
        except (UsageError, Interrupted):
            raise
        except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
            with contextlib.suppress(RankwiseError):
                folder.close("interrupted", "stopped at once")
            raise
        except Exception as error:
            told = translated(error, world.rank, world.size)
            with contextlib.suppress(RankwiseError):
                folder.close("failed", str(told))
            raise told from error


def main() -> None:
    """``python -P -m rankwise.launch.rank FOLDER [START]``: one of the ranks that our launcher started; with
    the name of a START one that takes over once that is the run's.

    Ends with the exit code of its error, which stands in the folder, and prints nothing of it: the launcher
    tells the user.
    """
    folder = RunFolder(Path(sys.argv[1]))
    code = 0
    try:
        train_as_launched(folder, *sys.argv[2:])
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    except RankwiseError as error:
        code = error.exit_code
    end_process(code, ends_libraries=not may_vanish())


def train_as_launched(folder: RunFolder, mark: str = "") -> Record:
    """One rank of the run whose plan is in `folder`; with a `mark` one of those that take over when the start
    of this name begins.

    A rank that fails leaves word in the folder, and ends all ranks, unless they can go on without it.
    """
    machine.die_with_parent(signal.SIGKILL)  # or it might stay behind when a host's daemon is lost
    if mark:
        plan, world = take_over(folder, mark)
    else:
        try:
            plan = read_plan(folder)
            world = mpi_world(new_ledger())
        except UsageError as error:
            write_failure(folder, 0, error, error)
            raise
    with ending_all_ranks(world, folder, lambda told: None):
        _require_size(world, plan)
        say = partial(print, file=sys.stderr, flush=True)
        record = _train(plan, world, folder, say, is_refilled=True)
    world.close()
    return record


def take_over(folder: RunFolder, mark: str) -> tuple[RunPlan, World]:
    """Get ready for the run, and wait until the present ranks have left it to those of the start `mark`.

    The time of this rank begins then: until then it was others' run. Until then, too, what goes wrong ends
    these ranks alone.
    """
    transport = mpi_transport()
    world = World(transport)
    with ending_all_ranks(world, None, lambda told: print(f"rankwise: {told}", file=sys.stderr, flush=True)):
        plan = read_plan(folder, is_next=True)
        _require_size(world, plan)
        get_ready(plan)
        wait_for_start(world, folder, mark)
    with ending_all_ranks(world, folder, lambda told: None):
        return plan, World(transport, late_ledger())


def wait_for_start(world: World, folder: RunFolder, mark: str) -> None:
    """Say that these ranks are ready, and wait until the start of this name begins; all ranks together."""
    world.barrier()
    told = world.rank != 0
    while not folder.has_begun(mark):
        told = told or resize.tell(folder.resize, "ready")  # again, if the disk is full just now
        time.sleep(LOOK_S)


def _require_size(world: World, plan: RunPlan) -> None:
    if world.size != plan.processes:
        raise LaunchError(
            f"{plan.processes} ranks were started, but this one sees {world.size}: mpiexec and the MPI "
            f"library of mpi4py ({world.describe()}) do not fit together; rankwise doctor shows both"
        )


def train_as_rank(order: Order) -> tuple[Record, RunFolder, int]:
    """One rank of a world that a user's mpiexec or srun made; all ranks return the record, its folder, their
    rank. Rank 0 makes the plan and the folder.

    A rank that fails leaves word in the folder and to the user, and ends all ranks, unless they can go on
    without it. Raises ConfigError if ranks were given different options.
    """
    machine.die_with_parent(signal.SIGKILL)
    world = mpi_world(new_ledger())
    with ending_all_ranks(world, None, lambda told: order.say(f"rankwise: {told}")):
        require_same_options(world, order.config.model_dump(mode="json", exclude={"out"}))
        mine = _opened(order, world.size) if world.rank == 0 else None
        opened: OpenFolder = world.allgather_object(mine)[0]
    folder = opened.folder
    with ending_all_ranks(world, folder, lambda told: _tell(order, opened, told)):
        record = _as_given(order, read_plan(folder), world, folder)
    world.close()
    if mine is not None:
        mine.release()
    return record, folder, world.rank


def _opened(order: Order, processes: int) -> OpenFolder:
    """The folder of a run with as many processes as the user's mpiexec started."""
    spares = order.config.spares
    if processes <= spares:
        raise ConfigError(f"--spares {spares} of {processes} ranks leaves none to train")
    if order.config.elastic:
        raise ConfigError(
            f"--elastic {order.config.elastic} was given, but under mpiexec or srun nobody can start other "
            "ranks: leave it out, or let rankwise train start the ranks"
        )
    config = order.config.model_copy(update={"ranks": processes - spares})
    return open_folder(replace(order, config=config), make_plan(config, resumes=order.resume is not None))


def _as_given(order: Order, plan: RunPlan, world: World, folder: RunFolder) -> Record:
    if world.rank != 0:
        return _train_as_understudy(order, plan, world, folder)
    if order.config.ranks not in (1, plan.ranks):
        order.say(f"--ranks {order.config.ranks} was given, but there are {plan.ranks}: these are used")
    for remark in order.remarks:
        order.say(remark)
    # Ranks may see a terminal though mpiexec's output is a file, so here are lines and no bar.
    with order.display(folder, plan.epochs, 0, live=False) as display:
        return _train(plan, world, folder, display.say)


def _train_as_understudy(order: Order, plan: RunPlan, world: World, folder: RunFolder) -> Record:
    """As a rank that shows nothing, until it has become rank 0."""
    with contextlib.ExitStack() as stack:
        displays: list[Display] = []

        def say(line: str) -> None:
            if world.rank == 0 and not displays:
                done = len(folder.read_metrics())
                display = order.display(folder, plan.epochs, 0, live=False, done=done)
                displays.append(stack.enter_context(display))
            (displays[0].say if displays else order.say)(line)

        return _train(plan, world, folder, say)


def _train(plan: RunPlan, world: World, folder: RunFolder, say: Say, *, is_refilled: bool = False) -> Record:
    """From the newest checkpoint, if a run has left a record in the folder."""
    start = None
    folder.take_part()
    with stop_on_signal(world), crashes_written_down(world, folder):
        if folder.record.exists():
            tell = say if world.rank == 0 else _silent
            start = checkpoint.newest(folder.checkpoints, on_damage=tell)
            tell(f"going on {start.where(plan.epochs)}")
        return run(plan, world, folder, say=say, start=start, is_refilled=is_refilled)


def crashes_written_down(world: World, folder: RunFolder) -> contextlib.AbstractContextManager[None]:
    """Where there are other ranks, which may go on."""
    if world.size == 1:
        return contextlib.nullcontext()
    return crashes.written_down(folder.crash_of(world.number))


def _silent(_: str) -> None:
    """Ranks other than 0 keep their remarks to themselves."""


def new_ledger() -> Ledger:
    return Ledger(start_ns=machine.process_start_ns(), cost_ns=measure_cost())


def late_ledger() -> Ledger:
    """Of a rank whose time begins now, and not when its process began."""
    return Ledger(cost_ns=measure_cost(), cpu_s_before=machine.cpu_seconds())


@contextlib.contextmanager
def ending_all_ranks(
    world: World, folder: RunFolder | None, tell: Callable[[RankwiseError], None]
) -> Iterator[None]:
    """A rank that fails inside ends the whole job, if the others cannot go on: one that just left would hang
    them. `tell` is called once, on the rank that failed first."""
    try:
        yield
    except Interrupted:
        world.close()
        raise
    except SupersededError as error:
        world.abort(error.exit_code)  # without a word in a folder that is others' now
        raise
    except BaseException as caught:
        alone = world.survives and not isinstance(caught, RankwiseError | KeyboardInterrupt)
        cause = _die_alone(world, folder, caught) if folder and alone else caught
        if folder and isinstance(cause, RankLost):
            cause = causes.find_crashes(folder, world.members) or cause
        told = translated(cause, world.rank, world.size, folder)
        # Without a folder it is wrong use, of which rank 0 knows.
        if write_failure(folder, world.rank, told, cause) if folder else world.rank == 0:
            tell(told)
        else:
            time.sleep(FIRST_WORD_S)
        world.abort(told.exit_code)
        raise


def _tell(order: Order, opened: OpenFolder, told: RankwiseError) -> None:
    """Tell the user what happened, and leave the folder as it should be."""
    order.say(f"rankwise: {told}")
    if isinstance(told, UsageError):
        opened.discard()
    else:
        time.sleep(0.2)  # rank 0 may be just writing the record
        with contextlib.suppress(RankwiseError):
            opened.folder.close("failed", str(told))


def _die_alone(world: World, folder: RunFolder, error: BaseException) -> BaseException:
    """Leave word of why, and end: the other ranks go on, and tell the user. Returns what ends all of them
    instead, if the same has ended another one before."""
    of_all = causes.leave_crash(folder, world.number, error)
    if of_all is None:
        machine.kill_self()
    return of_all or error


if __name__ == "__main__":
    main()
