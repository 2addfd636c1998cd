"""A world of threads in one process: for one rank, and for tests and scripts without MPI."""

from __future__ import annotations

import math
import platform
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from rankwise.comm.rendezvous import Rendezvous
from rankwise.comm.transport import COMBINE, Buffer, Op, Pending
from rankwise.comm.world import World
from rankwise.errors import RankLost
from rankwise.ledger.phases import Ledger
from rankwise.ledger.stalls import StallDetector
from rankwise.ledger.waits import Times

T = TypeVar("T")


class Killed(BaseException):
    """Ends a rank that is a thread, as SIGKILL ends a process: the others find out in their exchanges."""


class _Pending:
    """An exchange of which `finish` is what is left to do; it returns whose message came, or -1."""

    def __init__(self, finish: Callable[[], int]) -> None:
        self._finish = finish

    def poll(self) -> None:
        """It goes on by itself."""

    def wait(self, stalls: StallDetector) -> int:
        source = self._finish()
        stalls.skip()
        return source


class ThreadTransport:
    """One thread's place at the rendezvous. After `calls` calls it is killed, for tests."""

    why_no_sharing = ""

    def __init__(self, rank: int, size: int, rendezvous: Rendezvous, calls: float = math.inf) -> None:
        self._calls_left = calls
        self.in_threads = size > 1
        self._rendezvous = rendezvous
        self._member = rank
        self._take_place(list(range(size)))

    def allreduce(self, buffer: Buffer, op: Op, *, background: bool = False) -> _Pending:
        combine = COMBINE[op]

        def finish(parts: dict[int, Buffer]) -> None:
            buffer[...] = parts[0]
            for rank in range(1, self.size):
                combine(buffer, parts[rank], out=buffer)

        return self._collective(buffer.copy(), range(self.size), finish)

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> _Pending:
        def finish(parts: dict[int, Buffer]) -> None:
            if into is not None:
                into[...] = [parts[rank] for rank in range(self.size)]

        return self._collective(buffer.copy(), range(self.size if self.rank == root else 0), finish)

    def broadcast(self, buffer: Buffer, root: int) -> _Pending:
        def finish(parts: dict[int, Buffer]) -> None:
            buffer[...] = parts[root]

        mine = buffer.copy() if self.rank == root else None
        return self._collective(mine, range(root, root + 1), finish)

    def allgather(self, buffer: Buffer, into: Buffer) -> _Pending:
        def finish(parts: dict[int, Buffer]) -> None:
            into[...] = [parts[rank] for rank in range(self.size)]

        return self._collective(buffer.copy(), range(self.size), finish)

    def swap(self, buffer: Buffer, counts: Times, into: Buffer, counts_in: Times) -> _Pending:
        def finish(parts: dict[int, list[Buffer]]) -> None:
            into[...] = np.concatenate([parts[rank][self.rank] for rank in range(self.size)])

        return self._collective(np.split(buffer, np.cumsum(counts)[:-1]), range(self.size), finish)

    def send(self, buffer: Buffer, dest: int, tag: int = 0) -> _Pending:
        self._count_down()
        self._rendezvous.post(self.rank, dest, tag, buffer.copy())
        return _Pending(lambda: -1)

    def receive(
        self, buffer: Buffer, source: int | None, tag: int = 0, *, owing: Sequence[int] = ()
    ) -> _Pending:
        self._count_down()

        def finish() -> int:
            sender, content = self._rendezvous.fetch(self.rank, source, tag, owing)
            buffer[...] = content
            return sender

        return _Pending(finish)

    def set_aside(self, ranks: int) -> None:
        self._rendezvous.set_aside(self._member, ranks)
        self._take_place(list(range(ranks)))

    def stand_by(self, alive: Callable[[], None]) -> bool:
        self._count_down()
        return self._rendezvous.stand_by()

    def call_off(self, under_way: Iterable[Pending]) -> None:
        self._count_down()
        self._rendezvous.call_off()

    def repair(self, *, fill: bool) -> list[int]:
        self._count_down()
        members = list(self._rendezvous.repair(self._member, fill))
        self._take_place(members)
        return members

    def _take_place(self, members: list[int]) -> None:
        self.clock_of = [0] * len(members)
        hosts = [self._rendezvous.hosts[member] for member in members]
        self.host_of = [hosts.index(host) for host in hosts]
        self.rank = members.index(self._member) if self._member in members else -1
        self.size = len(members)
        self._number = 0

    def agree(self, mine: bool) -> bool:
        self._count_down()
        return self._rendezvous.agree(self._member, mine)

    def describe(self) -> str:
        return f"threads of Python {platform.python_version()}"

    def abort(self, code: int) -> None:
        self._rendezvous.abort()

    def close(self, whereabouts: str = "") -> None:
        self._rendezvous.end(self._member, whereabouts)

    def _collective(self, mine: Any, needed: range, finish: Callable[[dict[int, Any]], None]) -> _Pending:
        self._count_down()
        number, self._number = self._number, self._number + 1
        self._rendezvous.bring(number, self.rank, mine)

        def take() -> int:
            finish(self._rendezvous.take(number, self.rank, needed))
            return -1

        return _Pending(take)

    def _count_down(self) -> None:
        self._calls_left -= 1
        if self._calls_left < 0:
            raise Killed


def solo_world(ledger: Ledger | None = None) -> World:
    """The world of one rank; needs no MPI."""
    return World(ThreadTransport(0, 1, Rendezvous(1)), ledger)


def run_in_threads(
    size: int,
    program: Callable[[World], T],
    *,
    kill_at: Mapping[int, int] | None = None,
    hosts: Sequence[int] | None = None,
) -> list[T]:
    """Run `program` on `size` ranks, each a thread of this process; results in rank order.

    A rank that raises Killed has that as its result; `kill_at` maps a rank to the number of calls of its
    transport after which it does. `hosts` [ranks] gives the ranks hosts; by default all are on one.

    If a rank raises, the others are released from what they wait for, and the error of the first rank that
    failed is raised here; SystemExit is, when all have come to their ends. They are released too if this is
    interrupted; a rank that is computing then goes on to its next exchange, or to the end of the process. The
    threads share torch's global random state.
    """
    rendezvous = Rendezvous(size, hosts)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []
    exits: list[SystemExit] = []

    def work(rank: int) -> None:
        try:
            calls = (kill_at or {}).get(rank, math.inf)
            world = World(ThreadTransport(rank, size, rendezvous, calls))
            try:
                results[rank] = program(world)
            except SystemExit as ending:
                exits.append(ending)
            world.farewell()
            world.close()
        except Killed:
            results[rank] = Killed
        except BaseException as error:  # any: it is raised to the caller below
            failures.append(error)
            rendezvous.abort()
        finally:
            rendezvous.leave(rank)

    threads = [
        threading.Thread(target=work, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(size)
    ]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:  # Ctrl-C, or a time limit: a rank that hangs must not keep the process from ending
        rendezvous.abort()
        raise
    if failures:
        raise next((error for error in failures if not isinstance(error, RankLost)), failures[0])
    if exits:
        raise exits[0]
    return results
