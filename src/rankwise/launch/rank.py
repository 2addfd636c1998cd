"""Being a rank: alone in this process, or one of those that mpiexec or srun started."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from rankwise.comm import World, solo_world
from rankwise.comm.mpi import mpi_world
from rankwise.config import TrainConfig
from rankwise.errors import (
    ConfigError,
    Interrupted,
    LaunchError,
    RankLost,
    RankwiseError,
    SupersededError,
    UsageError,
    one_line,
)
from rankwise.launch import preflight
from rankwise.launch.order import Order, discard, open_folder
from rankwise.ledger.phases import Ledger, measure_cost
from rankwise.report.live import Display
from rankwise.runs import checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system import machine
from rankwise.system.signals import handling
from rankwise.training.rank import Say, run

FIRST_WORD_S = 2.0
"""How long a rank that fails too leaves the first one to say why, before it ends the job itself."""


def train_alone(order: Order, flight: preflight.PreparedRun, folder: RunFolder) -> Record:
    """One rank, in this process, without MPI."""
    world = solo_world(_ledger())
    config = flight.config
    live = order.console.is_terminal
    with order.display(folder, config.epochs, flight.samples_per_epoch, live=live) as display:
        try:
            return _train(order, config, world, folder, display.say)
        except (UsageError, Interrupted):
            raise
        except KeyboardInterrupt:  # a second Ctrl-C, or one before the first step
            with contextlib.suppress(RankwiseError):
                folder.close("interrupted", "stopped at once")
            raise
        except Exception as error:
            told = _translated(error, world)
            with contextlib.suppress(RankwiseError):
                folder.close("failed", str(told))
            raise told from error


def train_as_rank(order: Order) -> tuple[Record, RunFolder, int]:
    """One rank of a world that mpiexec or srun made; all ranks return the record, its folder, their rank.

    A rank that fails leaves word in the folder (and to the user, unless a launcher of ours will), and
    ends all ranks, unless they can go on without it.
    """
    machine.die_with_parent(signal.SIGKILL)  # or it might stay behind when a host's daemon is lost
    folder = RunFolder(order.resume or order.config.out or Path()) if order.launched else None
    new: list[Path] = []
    try:
        world = mpi_world(_ledger())
    except LaunchError as error:
        if folder:
            _write_failure(folder, 0, error, error)
        raise
    try:
        if folder:
            record = _as_launched(order, world, folder)
        else:
            config = preflight.check(_among(order.config, world.size), resumes=order.resume is not None)
            mine = open_folder(order, config) if world.rank == 0 else None
            folder, new = world.allgather_object(mine)[0]
            record = _as_given(order, config, world, folder)
    except Interrupted:
        world.close()
        raise
    except SupersededError as error:
        world.abort(error.exit_code)  # without a word in a folder that is others' now
        raise
    except BaseException as error:
        if folder and world.survives and not isinstance(error, RankwiseError | KeyboardInterrupt):
            _die_alone(world, folder, error)
        _end_all_ranks(order, world, folder, new, error)
        raise
    world.close()
    return record, folder, world.rank


def _as_launched(order: Order, world: World, folder: RunFolder) -> Record:
    config = preflight.check(order.config, resumes=order.resume is not None)
    if world.size != config.processes:
        raise LaunchError(
            f"{config.processes} ranks were started, but this one sees {world.size}: mpiexec and the MPI "
            f"library of mpi4py ({world.describe()}) do not fit together; rankwise doctor shows both"
        )
    return _train(order, config, world, folder, lambda line: print(line, file=sys.stderr, flush=True))


def _among(config: TrainConfig, processes: int) -> TrainConfig:
    """The configuration for as many processes as the user's mpiexec started."""
    if processes <= config.spares:
        raise ConfigError(f"--spares {config.spares} of {processes} ranks leaves none to train")
    return config.model_copy(update={"ranks": processes - config.spares})


def _as_given(order: Order, config: TrainConfig, world: World, folder: RunFolder) -> Record:
    if world.rank != 0:
        return _train_as_understudy(order, config, world, folder)
    if order.config.ranks not in (1, config.ranks):
        order.say(f"--ranks {order.config.ranks} was given, but there are {config.ranks}: these are used")
    for remark in order.remarks:
        order.say(remark)
    # Ranks may see a terminal though mpiexec's output is a file, so here are lines and no bar.
    with order.display(folder, config.epochs, 0, live=False) as display:
        return _train(order, config, world, folder, display.say)


def _train_as_understudy(order: Order, config: TrainConfig, world: World, folder: RunFolder) -> Record:
    """As a rank that shows nothing, until it has become rank 0."""
    with contextlib.ExitStack() as stack:
        displays: list[Display] = []

        def say(line: str) -> None:
            if world.rank == 0 and not displays:
                done = len(folder.read_metrics())
                display = order.display(folder, config.epochs, 0, live=False, done=done)
                displays.append(stack.enter_context(display))
            (displays[0].say if displays else order.say)(line)

        return _train(order, config, world, folder, say)


def _train(order: Order, config: TrainConfig, world: World, folder: RunFolder, say: Say) -> Record:
    start = None
    folder.take_part()
    with _stop_on_signal(world):
        if order.resume:
            tell = say if world.rank == 0 else _silent
            start = checkpoint.newest(folder.checkpoints, on_damage=tell)
            tell(f"going on after epoch {start.epoch} of {config.epochs}")
        return run(config, world, folder, say=say, start=start)


def _silent(_: str) -> None:
    """Ranks other than 0 keep their remarks to themselves."""


def _ledger() -> Ledger:
    return Ledger(start_ns=machine.process_start_ns(), cost_ns=measure_cost())


@contextlib.contextmanager
def _stop_on_signal(world: World) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM and SIGUSR1 ask the run to stop at its next synchronisation."""

    def ask(number: int, _frame: FrameType | None) -> None:
        if world.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person asked twice: at once
        world.stopping = True

    with handling((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1), ask):
        yield


def _translated(error: BaseException, world: World) -> RankwiseError:
    """A foreign error as one of ours, in one line that names the rank."""
    if isinstance(error, UsageError):
        return error
    where = f"rank {world.rank} on {machine.host_name()} failed: " if world.size > 1 else ""
    kind = "" if isinstance(error, RankwiseError) else f"{type(error).__name__}: "
    return RankwiseError(f"{where}{kind}{one_line(error)}")


def _end_all_ranks(
    order: Order, world: World, folder: RunFolder | None, new: list[Path], error: BaseException
) -> None:
    """Say what happened, once, and end the whole job: a rank that just left would hang the others."""
    told = _translated(error, world)
    # Without a folder it is wrong use, which all ranks find alike.
    first = _write_failure(folder, world.rank, told, error) if folder else world.rank == 0
    if not first:
        time.sleep(FIRST_WORD_S)
    elif not order.launched:
        order.say(f"rankwise: {told}")
        if isinstance(told, UsageError):
            discard(new)
        elif folder:
            time.sleep(0.2)  # rank 0 may be just writing the record
            with contextlib.suppress(RankwiseError):
                folder.close("failed", str(told))
    world.abort(told.exit_code)


def _die_alone(world: World, folder: RunFolder, error: BaseException) -> None:
    """Leave word of why, and end: the other ranks go on, and tell the user."""
    folder.leave_words(
        world.number,
        "crash",
        f"{type(error).__name__}: {one_line(error)}",
        traceback="".join(traceback.format_exception(error)),
    )
    machine.kill_self()


def _write_failure(folder: RunFolder, rank: int, told: RankwiseError, error: BaseException) -> bool:
    """Leave word of the run's first failure, and of what was behind it; returns whether it was the first."""
    content = {
        "rank": rank,
        "message": str(told),
        "exit_code": told.exit_code,
        "may_restart": not isinstance(error, RankwiseError) or isinstance(error, RankLost),
        "traceback": "".join(traceback.format_exception(error)),
    }
    return folder.leave_failure(content)
