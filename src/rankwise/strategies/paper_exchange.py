"""The paper's own exchange, with its author's stopwatch beside the ledger.

The paper reports under a second of communication in a run of many minutes. Here weights travel as in
its code, as messages between two ranks, and a stopwatch runs where its author's ran:

- worker: around sending its weights, and around loading those that came back;
- master: after each message has arrived, around the average, and around sending it out.

No `receive` is timed, so all waiting falls between the stopwatch's readings: a rank that comes early
waits in a `receive`. What it shows is `author_communication_s` in the record's `ranks[].measured`, to be
set beside ``transfer`` and ``wait`` of the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rankwise.comm import World
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.averaging import Averaged, ParameterAveraging, RoundState
from rankwise.strategies.compression import Flat
from rankwise.strategies.exchange import add_up_rows
from rankwise.strategies.recovery import Recovery

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

MEASURED = "author_communication_s"


class _Stopwatch:
    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self.elapsed_ns = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        started_ns = self._clock()
        yield
        self.elapsed_ns += self._clock() - started_ns


@dataclass(frozen=True)
class PaperExchange(ParameterAveraging):
    """Parameter averaging by messages to and from a master, timed as the paper's author did.

    The master adds in rank order, and sends the mean before it evaluates it, not after; else the
    exchange is the author's.
    """

    topologies: ClassVar[tuple[str, ...]] = ("master",)
    recovery: ClassVar = Recovery.FAIL_STOP

    def prepare(self, state: RoundState, replica: Replica, batch: Batch, world: World) -> Averaged:
        watch = _Stopwatch(world.ledger.clock)
        exchange = _as_master if world.rank == 0 else _as_worker
        flat = exchange(replica, batch, world, watch)
        if flat[-1]:
            raise Interrupted(f"stopped in epoch {batch.epoch}")
        return Averaged(flat[:-1], _timed(state, watch), replica.optimizer.param_groups[0]["lr"])

    def commit(self, state: RoundState, replica: Replica, prepared: Averaged, world: World) -> RoundState:
        watch = _Stopwatch(world.ledger.clock)
        with watch.running():
            state = super().commit(state, replica, prepared, world)
        return _timed(state, watch)


def _timed(state: RoundState, watch: _Stopwatch) -> RoundState:
    total_s = state.measured.get(MEASURED, 0.0) + watch.elapsed_ns / 1e9
    return replace(state, measured={MEASURED: total_s})


def _as_worker(replica: Replica, batch: Batch, world: World, watch: _Stopwatch) -> Flat:
    with watch.running():
        with world.ledger.phase("pack"):
            flat = replica.pack(tail=1)
            flat[-1] = world.stopping
        world.send(flat, 0)
    world.receive(flat, 0)
    return flat


def _as_master(replica: Replica, batch: Batch, world: World, watch: _Stopwatch) -> Flat:
    with world.ledger.phase("pack"):
        flat = replica.pack(tail=1)
        flat[-1] = world.stopping
        rows: Flat = np.tile(flat, (world.size, 1))
    message = np.empty_like(flat)
    for _ in range(world.size - 1):
        source = world.receive(message)
        with watch.running():
            rows[source] = message
    with watch.running():
        stops = rows[:, -1].any()
        if not stops:
            with world.ledger.phase("optimizer"):
                rows *= batch.weights.astype(rows.dtype)[:, None]
                add_up_rows(rows, batch.weights, out=flat)
        flat[-1] = stops
        for worker in range(1, world.size):
            world.send(flat, worker)
    return flat
