"""Ranks with simulated time: threads whose clocks move when a program works or an exchange holds it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import ThreadTransport
from rankwise.ledger.phases import Ledger
from rankwise.ledger.stalls import StallDetector


class Clock:
    """A rank's clock: `now_ns` is the true time, calling it gives what the rank reads."""

    def __init__(self, offset_ns: int = 0, drift: float = 0.0) -> None:
        self.now_ns = 1_000_000
        self.stop_ns = 0
        self._offset_ns = offset_ns
        self._drift = drift

    def __call__(self) -> int:
        return self.now_ns + self._offset_ns + round(self.now_ns * self._drift)

    def work(self, duration_ns: int) -> None:
        """Compute for so long."""
        self.now_ns += duration_ns

    def stop_inside(self, duration_ns: int) -> None:
        """Be stopped for so long inside the next exchange of all ranks, as soon as it has begun."""
        self.stop_ns = duration_ns


class _Held:
    """An exchange that ends, in simulated time, a transfer after the last rank came that it needs."""

    def __init__(self, finish: Callable[[], int]) -> None:
        self._finish = finish

    def wait(self, stalls: StallDetector) -> int:
        stalls.look()
        source = self._finish()
        stalls.skip()
        return source


class SimulatedTransport(ThreadTransport):
    """Threads whose exchanges take simulated time. A sender is let go at once, as with small messages."""

    def __init__(self, outer: ThreadTransport, clock: Clock, transfer_ns: int, one_clock: bool) -> None:
        super().__init__(outer.rank, outer.size, outer._rendezvous)
        self.clock_of = [0] * self.size if one_clock else list(range(self.size))
        self._clock = clock
        self._transfer_ns = transfer_ns

    def _collective(self, mine: Any, needed: range, finish: Callable[[dict[int, Any]], None]) -> Any:
        number, self._number = self._number, self._number + 1
        clock = self._clock
        clock.now_ns, clock.stop_ns = clock.now_ns + clock.stop_ns, 0
        # To the others it is as if this rank had come only now.
        self._rendezvous.bring(number, self.rank, (clock.now_ns, mine))

        def take() -> int:
            brought = self._rendezvous.take(number, self.rank, needed)
            self._until(max((brought[rank][0] for rank in needed), default=0))
            finish({rank: value for rank, (_, value) in brought.items()})
            return -1

        return _Held(take)

    def send(self, buffer: Any, dest: int, tag: int = 0) -> Any:
        self._rendezvous.post(self.rank, dest, tag, (self._clock.now_ns, buffer.copy()))

        def finish() -> int:
            return -1

        return _Held(finish)

    def receive(self, buffer: Any, source: int | None, tag: int = 0, *, owing: Sequence[int] = ()) -> Any:
        def finish() -> int:
            sender, content = self._rendezvous.fetch(self.rank, source, tag, owing)
            sent_ns, value = content
            buffer[...] = value
            self._until(sent_ns)
            return sender

        return _Held(finish)

    def _until(self, came_ns: int) -> None:
        self._clock.now_ns = max(self._clock.now_ns, came_ns) + self._transfer_ns


Program = Callable[[World, Clock], None]


def simulate(
    size: int,
    program: Program,
    *,
    transfer_ns: int = 1_000,
    clocks: list[Clock] | None = None,
) -> list[World]:
    """Run a program on ranks with simulated time; their worlds, reconciled. Ranks with `clocks` of their own
    read different ones."""

    def start(outer: World) -> World:
        clock = clocks[outer.rank] if clocks else Clock()
        inner: Any = outer._transport
        transport = SimulatedTransport(inner, clock, transfer_ns, one_clock=clocks is None)
        world = World(transport, Ledger(clock, cpu_clock=lambda: 0))
        world.ledger.enter("other")
        program(world, clock)
        world.reconcile()
        return world

    return run_in_threads(size, start)


def token() -> np.ndarray:
    """Something to exchange."""
    return np.zeros(4)
