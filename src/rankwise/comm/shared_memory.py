"""Sums over the ranks of one host, in memory that all of them map, and not by a library's messages.

No message is sent, and no MPI window is made, as these do not survive a lost rank. The memory has no name in
any folder: it is gone with the last process that maps it, however that one ends.
"""

from __future__ import annotations

import math
import mmap
import os
import platform
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from rankwise.comm.transport import COMBINE, Buffer, Op
from rankwise.errors import OutOfStepError
from rankwise.system.call_sites import here

CAPACITY = 32 << 20
"""Bytes of the largest buffer that is added up here. Pages of the memory are there once they are used."""

WHOLE = 64 << 10
"""Bytes that each rank reads from each other one rather than that it adds up a part of them for all. Of two
ranks it reads the other's in any case: its own part of the sum and the other's are as many bytes."""

LINE = 64
"""Bytes of a line of the cache, of which each rank has one for what it tells the others."""

_WORDS = LINE // 8
_GENERATION = 1 << 40
_OPS: list[Op] = [*COMBINE]

Spot = Callable[[], bool]


class Offer(NamedTuple):
    """Where the others find the memory that a process has made, and by what they know it."""

    pid: int
    file: int
    token: bytes


class SharedMemory:
    """What the ranks of one host have in common: for each rank a line of words, and two slots for what it
    brings to a sum; and two for sums. Ranks are known by the numbers with which they began.

    A rank writes what it brings into a slot and then counts its word up (`came`), and reads what others
    brought once they have come as far. It takes the slots in turn: a slot is written again only when all have
    come to the next sum, and so are done with it. That order of writes holds on x86-64, where every processor
    sees what another has stored in the order in which it was stored.
    """

    def __init__(self, file: int, ranks: int) -> None:
        slots = 2 * (ranks + 1)
        self._head = -(-(LINE * (ranks + 1)) // mmap.PAGESIZE) * mmap.PAGESIZE
        size = self._head + slots * CAPACITY
        if os.fstat(file).st_size < size:
            os.ftruncate(file, size)
        memory = mmap.mmap(file, size)
        self.words = memoryview(memory)[: self._head].cast("q")
        self._bytes = np.frombuffer(memory, np.uint8)
        self._views: dict[tuple[int, int, int, np.dtype[Any]], Buffer] = {}
        self.ranks = ranks
        self._turn = 0

    def begin_again(self, generation: int) -> None:
        """After a repair, of which this is the how-manieth: all that are left count from a new number, above
        what any of them had come to. They have met, so that none is in a sum any more."""
        self._turn = generation * _GENERATION

    def next_turn(self) -> int:
        """The number of the next sum."""
        self._turn += 1
        return self._turn

    def slot(self, owner: int, turn: int, size: int, dtype: np.dtype[Any]) -> Buffer:
        """What a rank brings to a sum, as `size` numbers; behind the last rank's lie the sums themselves."""
        key = owner, turn % 2, size, dtype
        if (view := self._views.get(key)) is None:
            start = self._head + (2 * owner + turn % 2) * CAPACITY
            view = self._bytes[start : start + size * dtype.itemsize].view(dtype)
            self._views[key] = view
        return view

    def came(self, number: int, count: int) -> None:
        """A rank has come this far: what it wrote before is there for all that read this."""
        self.words[number * _WORDS] = count

    def all_came(self, numbers: Sequence[int], count: int) -> Spot:
        """Asks whether all of these ranks have come this far."""
        words, places = self.words, [number * _WORDS for number in numbers]
        if len(places) == 1:
            place = places[0]
            return lambda: words[place] >= count

        def look() -> bool:
            while places and words[places[-1]] >= count:
                places.pop()
            return not places

        return look

    def mark(self, number: int, turn: int, what: int) -> None:
        """Tell of what kind this rank's part in a sum is."""
        self.words[number * _WORDS + 1 + turn % 2] = what

    def mark_of(self, number: int, turn: int) -> int:
        """What a rank that has come told of its part."""
        return self.words[number * _WORDS + 1 + turn % 2]


class Sum:
    """One rank's part in a sum over `members`, itself among them. What it brings is there for the others at
    once; `add_up` overwrites its buffer, once `meet` has let it through.

    Sums are formed in the order of the ranks, each number by one rank or alike by all, so that all ranks get
    the same bits, and get them each time.
    """

    def __init__(
        self, memory: SharedMemory, members: Sequence[int], rank: int, buffer: Buffer, op: Op
    ) -> None:
        self._memory = memory
        self._members = members
        self._rank = rank
        self._number = members[rank]
        self._others = [number for number in members if number != self._number]
        self._flat = buffer.reshape(-1)
        self._combine = COMBINE[op]
        self._kind = (buffer.nbytes << 16) | (buffer.dtype.num << 8) | _OPS.index(op)
        self._turn = memory.next_turn()
        self._slot(self._number)[...] = self._flat
        memory.mark(self._number, self._turn, self._kind)
        memory.came(self._number, 2 * self._turn - 1)

    def add_up(self, meet: Callable[[Spot], None]) -> None:
        """Come to the sum's end; `meet` returns when what it is given says so. Raises OutOfStepError if other
        ranks add up something else."""
        memory, turn = self._memory, self._turn
        meet(memory.all_came(self._others, 2 * turn - 1))
        for rank, number in enumerate(self._members):
            if memory.mark_of(number, turn) != self._kind:
                raise OutOfStepError(
                    f"rank {rank} brings another kind or number of numbers to an exchange than rank "
                    f"{self._rank} at {here()}: make the same exchanges in the same order on all ranks"
                )
        rows = [self._slot(number) for number in self._members]
        with np.errstate(over="ignore", invalid="ignore"):  # not a number is what strategies look for
            if len(rows) <= 2 or self._flat.nbytes <= WHOLE:
                self._combined(rows, self._flat)
                return
            total = self._slot(memory.ranks)
            mine = _part(self._flat.size, self._rank, len(rows), self._flat.itemsize)
            self._combined([row[mine] for row in rows], total[mine])
        memory.came(self._number, 2 * turn)
        meet(memory.all_came(self._others, 2 * turn))
        self._flat[...] = total

    def _slot(self, owner: int) -> Buffer:
        return self._memory.slot(owner, self._turn, self._flat.size, self._flat.dtype)

    def _combined(self, rows: Sequence[Buffer], out: Buffer) -> None:
        first, *rest = rows
        if not rest:
            out[...] = first
        for row in rest:
            self._combine(first, row, out=out)
            first = out


def _part(size: int, rank: int, ranks: int, item_bytes: int) -> slice:
    """A rank's part of `size` numbers, in whole lines of the cache."""
    length = math.ceil(size / ranks * item_bytes / LINE) * LINE // item_bytes
    return slice(min(rank * length, size), min((rank + 1) * length, size))


def takes(buffer: Buffer) -> bool:
    """Whether a buffer can be added up here."""
    return buffer.nbytes <= CAPACITY and buffer.dtype.kind in "iuf" and buffer.flags.c_contiguous


def why_not() -> str:
    """Why a process of this machine cannot add up in shared memory; empty if it can."""
    if platform.machine() != "x86_64":
        return f"a {platform.machine()} processor may show stores in another order than they were made"
    return "" if hasattr(os, "memfd_create") else "this system has no memfd_create"


def make(ranks: int) -> tuple[SharedMemory, Offer]:
    """Memory for this many ranks, and where the others find it until `Offer.file` is closed. Raises
    OSError."""
    file = os.memfd_create("rankwise")
    try:
        memory = SharedMemory(file, ranks)
    except BaseException:
        os.close(file)
        raise
    token = secrets.token_bytes(LINE)
    memory.words.cast("B")[LINE * ranks : LINE * (ranks + 1)] = token
    return memory, Offer(os.getpid(), file, token)


def close(offer: Offer) -> None:
    """All have found the memory: from here on it lasts as long as any of them."""
    os.close(offer.file)


def find(offer: Offer, ranks: int) -> SharedMemory:
    """The memory that another process has made. Raises OSError, also where it is another's, as numbers of
    processes may mean others in a container."""
    file = os.open(f"/proc/{offer.pid}/fd/{offer.file}", os.O_RDWR | os.O_CLOEXEC)
    try:
        # Looked at before it could be made longer.
        if os.pread(file, LINE, LINE * ranks) != offer.token:
            raise OSError("the process of that number is another one")
        return SharedMemory(file, ranks)
    finally:
        os.close(file)
