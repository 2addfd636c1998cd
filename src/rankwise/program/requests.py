"""Requests from the call that begins them to the one that ends them."""

from __future__ import annotations

from typing import Any

from rankwise.ledger.call_log import Kind
from rankwise.program.communicators import Communicators


class Requests:
    """The open requests of this rank, by handle, and messages that were found and not received yet."""

    def __init__(self, mpi: Any, world: Communicators, begun: dict[int, tuple[int, bool]]) -> None:
        self._mpi = mpi
        self._world = world
        self.open = begun
        """The row that began each, and whether only its end tells who sent."""
        self.persistent: dict[int, tuple[Kind, int, int, int, int]] = {}
        """What is started later: kind, communicator, the other rank, tag, bytes."""
        self._found: dict[int, tuple[int, int, int]] = {}

    def made(self, result: Any) -> None:
        """A call may have made a communicator."""
        if isinstance(result, tuple):
            result = result[0]
        if isinstance(result, self._mpi.Comm) and result != self._mpi.COMM_NULL:
            self._world.add(result)

    def probed(self, message: Any, comm: int, source: int, tag: int) -> None:
        """A probe has found a message, which is received by itself."""
        if isinstance(message, self._mpi.Message):
            self._found[message.handle] = comm, source, tag

    def message(self, message: Any) -> tuple[int, int, int]:
        """Communicator, sender and tag of a message that is received now."""
        return self._found.pop(message.handle, (-1, -1, -1))
