"""One rank's view of all ranks, with its time and its bytes accounted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rankwise.ledger import Ledger

Buffer = NDArray[Any]
Op = Literal["sum", "max"]


class Transport(Protocol):
    """What carries bytes between ranks. Every call is collective: all ranks make it, in the same order."""

    rank: int
    size: int

    def allreduce(self, buffer: Buffer, op: Op) -> None:
        """Combine the buffers of all ranks element by element, in place on every rank."""

    def gather(self, buffer: Buffer, root: int, into: Buffer | None) -> None:
        """Put rank k's buffer into row k of `into`, which only the root has."""

    def broadcast(self, buffer: Buffer, root: int) -> None:
        """Overwrite every rank's buffer with the root's."""

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order. Pickled: for set-up and farewell, never for weights."""

    def describe(self) -> str:
        """The library behind this transport, with its version."""

    def abort(self, code: int) -> None:
        """End all ranks at once, this one included, without waiting for anybody."""

    def close(self) -> None:
        """Leave in good order, all ranks together."""


@dataclass
class Traffic:
    """Payload that this rank handed to the transport and took from it (not what a library adds)."""

    bytes_sent: int = 0
    bytes_received: int = 0
    messages_sent: int = 0

    def add(self, *, sent: int, received: int, messages: int) -> None:
        """Count one exchange."""
        self.bytes_sent += sent
        self.bytes_received += received
        self.messages_sent += messages


class World:
    """All ranks as this one sees them.

    Buffers are contiguous numpy arrays of the same shape and dtype on every rank. `stopping` is set
    by whoever wants the run to end (a signal handler); strategies carry it to all ranks with the
    next synchronisation, so that all of them stop at the same point.
    """

    def __init__(self, transport: Transport, ledger: Ledger | None = None) -> None:
        self._transport = transport
        self.ledger = ledger or Ledger()
        self.traffic = Traffic()
        self.stopping = False
        self.rank = transport.rank
        self.size = transport.size

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over all ranks, element by element, in place."""
        if self.size > 1:
            with self._exchange():
                self._transport.allreduce(buffer, op)
            self.traffic.add(sent=buffer.nbytes, received=buffer.nbytes, messages=1)

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows of one array [size, *shape] in rank order on the root; None elsewhere."""
        into = np.empty((self.size, *buffer.shape), buffer.dtype) if self.rank == root else None
        with self._exchange():
            self._transport.gather(buffer, root, into)
        others = (self.size - 1) * buffer.nbytes
        if self.rank == root:
            self.traffic.add(sent=0, received=others, messages=0)
        else:
            self.traffic.add(sent=buffer.nbytes, received=0, messages=1)
        return into

    def broadcast(self, buffer: Buffer, root: int = 0) -> None:
        """Overwrite the buffer of every rank with the root's."""
        if self.size > 1:
            with self._exchange():
                self._transport.broadcast(buffer, root)
            others = (self.size - 1) * buffer.nbytes
            if self.rank == root:
                self.traffic.add(sent=others, received=0, messages=self.size - 1)
            else:
                self.traffic.add(sent=0, received=buffer.nbytes, messages=0)

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's picklable value, in rank order. For set-up and farewell, never for weights."""
        if self.size == 1:
            return [value]
        with self._exchange():
            return self._transport.allgather_object(value)

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        self.allgather_object(None)

    def describe(self) -> str:
        """The library behind this world, with its version."""
        return self._transport.describe()

    def abort(self, code: int) -> None:
        """End all ranks at once."""
        self._transport.abort(code)

    def close(self) -> None:
        """Leave in good order, all ranks together."""
        self._transport.close()

    @contextmanager
    def _exchange(self) -> Iterator[None]:
        # The whole exchange counts as transfer for now, the wait for a late rank included.
        with self.ledger.phase("transfer"):
            yield
