"""Some of a world's ranks, with exchanges among them alone, made of messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rankwise.comm.transport import COMBINE, Buffer, Op
from rankwise.comm.world import World
from rankwise.ledger.phases import Ledger


class Ranks(Protocol):
    """Ranks that exchange together: a world, or a subgroup of some of its ranks."""

    @property
    def rank(self) -> int:
        """This one's place."""

    @property
    def size(self) -> int:
        """Their number."""

    @property
    def ledger(self) -> Ledger:
        """This rank's."""

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over all ranks, in place."""

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows on the root."""

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Overwrite every buffer with the root's."""

    def allgather(self, buffer: Buffer) -> Buffer:
        """All buffers as rows."""


class Subgroup:
    """Some ranks of a world, which call these exchanges in the same order; other ranks know nothing of it.

    It is made of the world's messages, so that its waiting is charged to the ranks that cause it, and a
    repair of the world is one of the subgroup: a new one is made of those that are left. Results are the
    same, to the bit, in each run and on each rank.
    """

    def __init__(self, world: World, ranks: Sequence[int]) -> None:
        self._world = world
        self._ranks = list(ranks)
        self._rank = self._ranks.index(world.rank)

    @property
    def rank(self) -> int:
        """This rank's place among the subgroup's."""
        return self._rank

    @property
    def size(self) -> int:
        """The number of its ranks."""
        return len(self._ranks)

    @property
    def ledger(self) -> Ledger:
        """That of the world."""
        return self._world.ledger

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over the subgroup, element by element, in place.

        Pieces go around a ring, first to be added up and then to be handed out, so that each rank sends
        2 (size - 1) / size times the buffer (Patarasuk, Yuan 2009, doi:10.1016/j.jpdc.2008.09.002).
        """
        if self.size == 1:
            return
        pieces = np.array_split(buffer.reshape(-1), self.size)
        incoming = np.empty_like(pieces[0])
        for turn in range(2 * (self.size - 1)):
            mine = pieces[(self.rank - turn) % self.size]
            theirs = pieces[(self.rank - turn - 1) % self.size]
            adds_up = turn < self.size - 1
            into = incoming[: len(theirs)] if adds_up else theirs
            receives = self._world.start_receive(into, self._ranks[self.rank - 1])
            sends = self._world.start_send(mine, self._ranks[(self.rank + 1) % self.size])
            receives.wait()
            sends.wait()
            if adds_up:
                COMBINE[op](theirs, into, out=theirs)

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows of one array [size, *shape] on the root; None elsewhere."""
        if self.rank != root:
            self._world.send(buffer, self._ranks[root])
            return None
        rows = np.empty((self.size, *buffer.shape), buffer.dtype)
        rows[root] = buffer
        for rank in self._others(root):
            self._world.receive(rows[rank], self._ranks[rank])
        return rows

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Overwrite the buffer of every rank of the subgroup with the root's."""
        if self.rank == root:
            for sends in [self._world.start_send(buffer, self._ranks[rank]) for rank in self._others(root)]:
                sends.wait()
        else:
            self._world.receive(buffer, self._ranks[root])

    def allgather(self, buffer: Buffer) -> Buffer:
        """All buffers as rows of one array [size, *shape], on every rank of the subgroup."""
        rows = np.empty((self.size, *buffer.shape), buffer.dtype)
        rows[self.rank] = buffer
        for turn in range(self.size - 1):
            receives = self._world.start_receive(
                rows[(self.rank - turn - 1) % self.size], self._ranks[self.rank - 1]
            )
            self._world.send(rows[(self.rank - turn) % self.size], self._ranks[(self.rank + 1) % self.size])
            receives.wait()
        return rows

    def _others(self, root: int) -> list[int]:
        return [rank for rank in range(self.size) if rank != root]
