"""A world of threads in one process: for one rank, and for tests and scripts without MPI."""

from __future__ import annotations

import math
import platform
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from rankwise.comm.transport import COMBINE, Buffer, Op, Pending
from rankwise.comm.world import World
from rankwise.errors import RankLost
from rankwise.ledger.phases import Ledger
from rankwise.ledger.stalls import StallDetector

T = TypeVar("T")


class Killed(BaseException):
    """Ends a rank that is a thread, as SIGKILL does a process: the others find out in their exchanges."""


class _Rendezvous:
    """Where the threads of one world meet: what each rank brought to each collective exchange, and
    messages on their way. Of `size` ranks those in `working` take part, and the others stand by. `hosts` are
    the ranks' hosts."""

    def __init__(self, size: int, hosts: Sequence[int] | None = None) -> None:
        self.size = size
        self.hosts = hosts or [0] * size
        self.strength = size
        self.changed = threading.Condition()
        self.brought: dict[int, dict[int, Any]] = defaultdict(dict)
        self.gone: dict[int, int] = defaultdict(int)
        self.messages: dict[tuple[int, int], list[tuple[int, Any]]] = defaultdict(list)
        self.broken = False
        self.live = set(range(size))
        self.is_whole = True
        self.aside: set[int] = set()
        self.called_off = False
        self.repairing: dict[int, bool] = {}
        self.repairs = 0
        self.working = list(range(size))
        self.votes: dict[int, bool] = {}
        self.verdict = False

    def bring(self, number: int, rank: int, value: Any) -> None:
        """Bring a value to the collective exchange of this number."""
        with self.changed:
            self.brought[number][rank] = value
            self.changed.notify_all()

    def take(self, number: int, rank: int, needed: range) -> dict[int, Any]:
        """What the needed ranks bring, as soon as they have; each rank takes part once."""
        with self.changed:
            self._until(rank, lambda: self.brought[number].keys() >= set(needed))
            found = dict(self.brought[number])
            self.gone[number] += 1
            if self.gone[number] == self.size:
                del self.brought[number], self.gone[number]
            return found

    def post(self, source: int, dest: int, tag: int, value: Any) -> None:
        """Send a message."""
        with self.changed:
            self.messages[dest, tag].append((source, value))
            self.changed.notify_all()

    def fetch(self, rank: int, source: int | None, tag: int) -> tuple[int, Any]:
        """The first message for a rank with a tag, from `source` or from anybody."""
        with self.changed:
            inbox = self.messages[rank, tag]
            # As under MPI, a message is not lost because somebody else is, until ranks begin to repair.

            def ready() -> bool:
                return any(source in (None, sender) for sender, _ in inbox)

            def lost() -> bool:
                cut = source is None or self.called_off or self.working[source] not in self.live
                return cut and not self.is_whole

            self._until(rank, ready, lost)
            place = next(place for place, (sender, _) in enumerate(inbox) if source in (None, sender))
            return inbox.pop(place)

    def leave(self, member: int) -> None:
        """A rank is gone, killed or at its end: whoever needs it finds out in an exchange."""
        with self.changed:
            self.live.discard(member)
            self.repairing.pop(member, None)
            self.is_whole = self.is_whole and member not in self.working
            self.changed.notify_all()

    def set_aside(self, member: int, ranks: int) -> None:
        """Those from this rank on stand by, once all have come here."""
        with self.changed:
            self.aside.add(member)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.broken or self.aside >= self.live)
            self.strength = ranks
            self.working = list(range(ranks))
            self.size = ranks

    def stand_by(self) -> bool:
        """Wait for a call; returns False if there is nobody left who could."""
        with self.changed:
            self.changed.wait_for(
                lambda: self.broken or self.called_off or not self.live.intersection(self.working)
            )
            return self.called_off and not self.broken

    def call_off(self) -> None:
        """What ranks are in has failed."""
        with self.changed:
            self.is_whole = False
            self.called_off = True
            self.changed.notify_all()

    def repair(self, member: int, fill: bool) -> list[int]:
        """Meet all that are left; returns those that work from now on."""
        with self.changed:
            self.repairing[member] = fill
            self.changed.notify_all()
            number = self.repairs
            self.changed.wait_for(
                lambda: self.broken or self.repairs > number or self.repairing.keys() >= self.live
            )
            if self.broken:
                raise RankLost("the ranks were ended while they repaired their world")
            if self.repairs == number:  # the first that sees all of them speaks for all
                self.repairs += 1
                others = sorted(self.live.difference(self.working))
                self.working = [rank for rank in self.working if rank in self.live]
                if all(self.repairing.values()):
                    self.working += others[: self.strength - len(self.working)]
                self.size = len(self.working)
                self.brought.clear()
                self.gone.clear()
                self.messages.clear()
                self.repairing.clear()
                self.is_whole = True
                self.called_off = False
                self.changed.notify_all()
            return self.working

    def agree(self, member: int, mine: bool) -> bool:
        """Whether all that are left of those that work say yes, and nobody was lost."""
        with self.changed:
            votes = self.votes
            votes[member] = mine
            self.changed.notify_all()
            self.changed.wait_for(
                lambda: (
                    self.broken
                    or votes is not self.votes
                    or votes.keys() >= self.live.intersection(self.working)
                )
            )
            if self.broken:
                raise RankLost("the ranks were ended while they repaired their world")
            if votes is self.votes:  # the first that sees all of them speaks for all
                self.verdict = self.is_whole and all(votes.values())
                self.votes = {}
                self.changed.notify_all()
            return self.verdict

    def abort(self) -> None:
        """Release everybody who waits."""
        with self.changed:
            self.broken = True
            self.changed.notify_all()

    def _until(self, rank: int, ready: Callable[[], bool], lost: Callable[[], object] | None = None) -> None:
        lost = lost or (lambda: not self.is_whole)
        self.changed.wait_for(lambda: self.broken or lost() or ready())
        # As under MPI an exchange may succeed on one rank and fail on another; but one to which all have come
        # is no longer lost, also where one of them was first out of it and has failed by now.
        if not ready():
            raise RankLost(f"rank {rank} waited for a rank that has ended")


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
    """One thread's place at the rendezvous. After so many `calls` it is killed, for tests."""

    def __init__(self, rank: int, size: int, rendezvous: _Rendezvous, calls: float = math.inf) -> None:
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

    def send(self, buffer: Buffer, dest: int, tag: int = 0) -> _Pending:
        self._count_down()
        self._rendezvous.post(self.rank, dest, tag, buffer.copy())
        return _Pending(lambda: -1)

    def receive(self, buffer: Buffer, source: int | None, tag: int = 0) -> _Pending:
        self._count_down()

        def finish() -> int:
            sender, content = self._rendezvous.fetch(self.rank, source, tag)
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

    def close(self) -> None:
        """Nothing to leave: the threads end by themselves."""

    def _collective(self, mine: Any, needed: range, finish: Callable[[dict[int, Buffer]], None]) -> _Pending:
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
    return World(ThreadTransport(0, 1, _Rendezvous(1)), ledger)


def run_in_threads(
    size: int,
    program: Callable[[World], T],
    *,
    kill_at: Mapping[int, int] | None = None,
    hosts: Sequence[int] | None = None,
) -> list[T]:
    """Run `program` on `size` ranks, each a thread of this process; results in rank order.

    A rank that raises Killed has that as its result; `kill_at` says after how many calls of its transport
    a rank does. `hosts` [ranks] makes believe that the ranks are on these hosts; otherwise all are on one.

    If a rank raises, the others are released from whatever they wait for, and the error of the
    first rank that failed is raised here. So they are if this is interrupted; a rank that is computing then
    goes on to its next exchange, or to the end of the process. The threads share torch's global random state.
    """
    rendezvous = _Rendezvous(size, hosts)
    results: list[Any] = [None] * size
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            calls = (kill_at or {}).get(rank, math.inf)
            results[rank] = program(World(ThreadTransport(rank, size, rendezvous, calls)))
        except Killed:
            results[rank] = Killed
        except BaseException as error:  # handed to the caller below, whatever it is
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
    return results
