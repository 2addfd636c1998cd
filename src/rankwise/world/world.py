"""One rank's view of all ranks, with its time and its bytes accounted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rankwise.ledger import Ledger
from rankwise.world.waits import Pattern, split

SETTLE_AFTER = 4096
"""Exchanges after which ranks compare their logs at the latest; bounds the memory of a log."""

Buffer = NDArray[Any]
Op = Literal["sum", "max"]


class Transport(Protocol):
    """What carries bytes between ranks. Every call is collective: all ranks make it, in the same order."""

    rank: int
    size: int
    one_clock: bool
    """Whether all ranks read the same monotonic clock, as those of one host do."""

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
        self.wait_on_ns: Counter[int] = Counter()
        self.clock_violations = 0
        self._log: list[tuple[int, int, int, int]] = []

    def allreduce(self, buffer: Buffer, op: Op = "sum") -> None:
        """Sum (or maximum) over all ranks, element by element, in place."""
        if self.size > 1:
            with self._exchange(Pattern.ALL_TO_ALL):
                self._transport.allreduce(buffer, op)
            self.traffic.add(sent=buffer.nbytes, received=buffer.nbytes, messages=1)

    def gather(self, buffer: Buffer, root: int = 0) -> Buffer | None:
        """All buffers as rows of one array [size, *shape] in rank order on the root; None elsewhere."""
        into = np.empty((self.size, *buffer.shape), buffer.dtype) if self.rank == root else None
        with self._exchange(Pattern.ALL_TO_ONE, root):
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
            with self._exchange(Pattern.ONE_TO_ALL, root):
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
        with self._exchange(Pattern.ALL_TO_ALL):
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

    def settle(self) -> None:
        """Tell waiting from transfer in all exchanges since the last time; all ranks together.

        Until then an exchange counts as transfer as a whole, and so it stays where ranks have clocks of
        their own. `wait_on_ns` has the waiting by the rank that was waited for.
        """
        log, self._log = self._log, []
        if self.size == 1 or not self._transport.one_clock:
            return
        logs = np.array(self.allgather_object(np.array(log, np.int64).reshape(-1, 4)))
        found = split(logs, self.rank)
        self.ledger.move("transfer", "wait", found.wait_ns)
        self.wait_on_ns.update(found.wait_on_ns)
        self.clock_violations += found.violations

    @contextmanager
    def _exchange(self, pattern: Pattern, root: int = 0) -> Iterator[None]:
        before = self.ledger.enter("transfer")
        entered_ns = self.ledger.mark_ns
        try:
            yield
        finally:
            self.ledger.enter(before)
        self._log.append((pattern, root, entered_ns, self.ledger.mark_ns))
        if len(self._log) > SETTLE_AFTER:  # at the same exchange on every rank
            self.settle()
