"""A user's program as a rank: its calls of MPI are logged, until it makes a `Run`, which sees to that itself.

MPI is the program's: nothing here begins it, and torch is loaded by who uses it.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import io
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import FrameType, ModuleType

from rankwise.comm.mpi_environment import Placement, placement
from rankwise.errors import ConfigError, Interrupted, LaunchError, ProgramEnded, RankwiseError, UsageError
from rankwise.launch.failures import print_traceback, translated, write_failure
from rankwise.launch.plan_file import read_plan
from rankwise.plan import RunPlan
from rankwise.program.session import Session, end_all_ranks
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import end_calls
from rankwise.survival import crashes
from rankwise.system import machine
from rankwise.system.files import write_atomically
from rankwise.system.namesakes import keep_apart
from rankwise.system.signals import handling
from rankwise.system.user_code import is_source

PLACE_S = 60.0
"""How long ranks wait for rank 0 to say where it is to be found."""


class ProgramRank:
    """This process as a rank of a program, of which `folder` is the run. `at_end` is called when all is over.

    A `Run` that the program makes takes `take_over`, with what is to end it: well, or by an error. A rank
    that waits for the start `mark` until then has no part in the run: whatever goes wrong ends these ranks
    alone.
    """

    def __init__(self, folder: RunFolder, me: Placement, at_end: Callable[[], None], mark: str = "") -> None:
        self.folder = folder
        self.mark = mark
        self._me = me
        self._at_end = at_end
        self._session: Session | None = None
        if not mark:
            several = me.local_size != me.size
            self._session = Session(folder.calls, me.rank, me.size, several_hosts=several)
        self._finish: Callable[[], None] | None = None
        self._fail: Callable[[BaseException], None] | None = None

    def take_over(self, finish: Callable[[], None], fail: Callable[[BaseException], None]) -> None:
        """The program has made a `Run`, with a record of its own: what it does in MPI is logged no more."""
        self._finish, self._fail = finish, fail
        if self._session is not None:
            self._session.discard()
            self._session = None
            if self._me.rank == 0:
                end_calls(self.folder)

    def run(self, program: Sequence[str], spares: int) -> None:
        """Run the script to its end, on ranks of which the last are `spares`. Raises what it raises, after
        having left word and ended all ranks, and ConfigError if spares wait nowhere."""
        start = self.mark or self.folder.start
        tell_as_torchrun(self._me, self.folder, ranks=self._me.size - spares, start=start)
        code = 0
        atexit.register(lambda: self._over(code))  # before any of the program's own, so behind them
        try:
            with _interrupted_by_sigusr1(), self.crashes_written_down(begins=not self.mark):
                if self._session is not None:
                    self._session.begin()
                run_script(program)
                if self._finish is not None:
                    self._finish()
                elif self.mark:
                    raise ConfigError("the program made no rankwise.Run, in which its ranks could take over")
                elif spares:
                    raise ConfigError(
                        f"--spares {spares} was given, but the program made no rankwise.Run, in which they "
                        "wait: leave it out"
                    )
        except BaseException as error:
            code = getattr(error, "exit_code", Interrupted.exit_code if _is_stop(error) else 1)
            if not isinstance(error, RankwiseError) and not _is_stop(error):
                print_traceback(error, __file__)
            if self._fail is not None:
                self._fail(error)
            else:
                self._leave_word(error)
            raise

    def _leave_word(self, error: BaseException) -> None:
        """Of a program without a `Run`: the first reason counts, and all ranks end with it."""
        told = translated(error, self._me.rank, self._me.size)
        code = Interrupted.exit_code if _is_stop(error) else told.exit_code
        if not self.mark:
            write_failure(self.folder, self._me.rank, told, error)
        elif isinstance(error, RankwiseError):
            print(f"rankwise: {told}", file=sys.stderr)
        if self._session is not None:
            self._session.end(code, str(told))
            self._session.close()
        sys.stdout.flush()
        sys.stderr.flush()
        end_all_ranks(code)

    def _over(self, code: int) -> None:
        if self._session is not None:
            self._session.end(code)
            self._session.close()
            self._at_end()

    def crashes_written_down(self, *, begins: bool = True) -> contextlib.AbstractContextManager[None]:
        """While inside, if this rank `begins` to have part in the run and there are others."""
        if self._me.size == 1 or not begins:
            return contextlib.nullcontext()
        return crashes.written_down(self.folder.crash_of(self._me.rank))


current: ProgramRank | None = None
"""This process's, if `rankwise run` has started it."""


def _without_input() -> None:
    """Let a program that reads its input find the end of it: Open MPI's mpiexec keeps rank 0's open."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def run_as_launched(folder: RunFolder, mark: str = "") -> None:
    """Be one rank of the program whose plan is in `folder`; with a `mark` one of those that take over when
    the start of this name begins. Ends with the exit code of its error, which stands in the folder and is the
    launcher's to tell."""
    machine.die_with_parent(signal.SIGKILL)
    _without_input()
    try:
        try:
            plan = read_plan(folder, is_next=bool(mark))
            me = placement()
            if me.size != plan.processes:
                raise LaunchError(
                    f"{plan.processes} ranks were started, but this one is told that there are {me.size}: "
                    "mpiexec does not do as it was asked; rankwise doctor shows which it is"
                )
        except UsageError as error:
            if not mark:
                write_failure(folder, 0, error, error)
            raise
        be_rank(folder, me, plan, mark=mark)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except RankwiseError as error:
        sys.exit(error.exit_code)
    except Exception:  # of the program, which has been shown
        sys.exit(1)


def be_rank(
    folder: RunFolder,
    me: Placement,
    plan: RunPlan,
    at_end: Callable[[], None] = lambda: None,
    *,
    mark: str = "",
) -> None:
    """Run the program of a plan as a rank of the run in `folder`; with a `mark` as one that has part in it
    when the start of this name begins. Raises what it raises."""
    global current
    if not mark:
        folder.take_part()
    current = ProgramRank(folder, me, at_end, mark)
    current.run(plan.program, plan.spares)


def run_script(program: Sequence[str]) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` does: as ``__main__``, with its own folder first where
    modules are found. Raises ProgramEnded if it ends with another exit code than 0."""
    script, *_ = program
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Line by line: a pipe's is kept back until it is full, and with PYTHONUNBUFFERED, as in
            # containers, a line goes out in parts, between which mpiexec may put those of another rank.
            stream.reconfigure(line_buffering=True, write_through=False)
    sys.argv = list(program)
    path = Path(script).resolve()
    folder = path.parent
    keep_apart(folder, path)
    sys.path.insert(0, str(folder))
    try:
        if is_source(Path(script)):
            _run_as_main(script)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as ending:
        if ending.code not in (None, 0):
            raise ProgramEnded(ending.code) from None


def _run_as_main(script: str) -> None:
    """Run a file of Python's source as Python does, whose `__file__` is absolute where ``sys.argv[0]`` is as
    it was given: a program that starts itself again looks at both. runpy makes them the same."""
    path = os.path.join(os.getcwd(), script)
    main = ModuleType("__main__")
    main.__dict__.update(
        __file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path), __builtins__=builtins
    )
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_bytes(), path, "exec", dont_inherit=True), main.__dict__)


def tell_as_torchrun(me: Placement, folder: RunFolder, *, ranks: int, start: str) -> None:
    """Set what programs of torch.distributed look for: RANK, WORLD_SIZE (`ranks`, without those that stand
    by), LOCAL_RANK, LOCAL_WORLD_SIZE, and where rank 0 of this `start` is to be found, which it writes into
    the folder. Raises LaunchError if it does not."""
    if me.rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            name = "127.0.0.1" if me.local_size == me.size else socket.gethostname()
            write_atomically(folder.rank_0, f"{name} {free.getsockname()[1]} {start}".encode())
    give_up = time.monotonic() + PLACE_S
    while True:
        with contextlib.suppress(OSError, ValueError):
            address, port, its = folder.rank_0.read_text().split(" ", 2)
            if its == start:
                break
        if time.monotonic() > give_up:
            raise LaunchError(f"rank 0 did not come within {PLACE_S:.0f} s, or {folder.path} is not shared")
        time.sleep(0.01)
    os.environ |= {
        "RANK": str(me.rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(me.local_rank),
        "LOCAL_WORLD_SIZE": str(me.local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }


def _is_stop(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | Interrupted)


@contextlib.contextmanager
def _interrupted_by_sigusr1() -> Iterator[None]:
    """While inside, what our launcher sends for Ctrl-C does what Ctrl-C would do to the program."""

    def interrupt(_number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if callable(handler):
            handler(signal.SIGINT, frame)

    with handling((signal.SIGUSR1,), interrupt):
        yield
