"""Joining the world from a script of the user's own."""

from __future__ import annotations

import atexit
import sys
import traceback
from functools import cache
from types import TracebackType

from rankwise.comm.mpi import mpi_world
from rankwise.comm.mpi_environment import started_as_rank
from rankwise.comm.threads import solo_world
from rankwise.comm.world import World
from rankwise.errors import RankwiseError


def join() -> World:
    """The ranks that mpiexec or srun started together with this process, or this one alone.

    Alone no MPI is needed. From here on an uncaught exception in one rank ends all of them: left to
    itself it would hang the others. Each call under MPI returns the same world, which knows all exchanges.
    """
    if not started_as_rank():
        return solo_world()
    return _joined()


@cache
def _joined() -> World:
    world = mpi_world()

    def end_all_ranks(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        stderr = sys.__stderr__  # torch.distributed calls this hook with another one, which it shows later
        if isinstance(error, RankwiseError):
            print(f"rankwise: {error}", file=stderr, flush=True)
            world.abort(error.exit_code)
        traceback.print_exception(kind, error, trace, file=stderr)
        print(f"rank {world.rank} failed, so all {world.size} ranks end", file=stderr, flush=True)
        world.abort(1)

    def leave() -> None:
        try:
            world.farewell()
        except BaseException as error:  # any: Python would go on to its end, and others wait for ever
            end_all_ranks(type(error), error, error.__traceback__)
        world.close()

    sys.excepthook = end_all_ranks
    atexit.register(leave)
    return world
