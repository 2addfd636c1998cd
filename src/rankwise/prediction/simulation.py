"""Rounds in which not all ranks meet: workers at a server, by discrete events, and neighbours."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import simpy

from rankwise.prediction.slowest import Seconds

MOST_EXCHANGES = 20_000
"""Exchanges that are simulated at most; the rest of a longer epoch takes as long per exchange."""


@dataclass(frozen=True)
class Outcome:
    """How long the simulated epoch took, and seconds that its ranks, workers first, waited in the mean."""

    makespan_s: float
    worker_wait_s: float
    master_wait_s: float = 0.0


@dataclass
class _Desk:
    """What the server knows: the rounds that each worker has done, and the workers that it holds back until
    others have caught up."""

    done: list[int]
    held: list[tuple[int, simpy.Event]] = field(default_factory=list)


def serve_all(
    workers: int,
    rounds: int,
    round_s: Seconds,
    *,
    transfer_s: float,
    serve_s: float,
    seed: int,
    answers_behind: bool = False,
    max_staleness: int | None = None,
) -> Outcome:
    """Workers that compute a round (drawn from `round_s` [n]), send to a server, and wait for its answer.

    The server takes one message after the other, each for `serve_s` and two transfers through its port, or
    one if the system sends the answers (`answers_behind`), one after the other too. With `max_staleness` it
    holds workers back that are ahead of the slowest by more exchanges.
    """
    simulated = max(1, min(rounds, MOST_EXCHANGES // workers))
    random = np.random.default_rng(seed)
    env = simpy.Environment()
    master, port = simpy.Resource(env, capacity=1), simpy.Resource(env, capacity=1)
    desk = _Desk([0] * workers)
    busy_s = (1 if answers_behind else 2) * transfer_s + serve_s
    waited = np.zeros(workers)

    def admitted(worker: int) -> simpy.Event:
        event = env.event()
        if max_staleness is None or desk.done[worker] - min(desk.done) <= max_staleness:
            return event.succeed()
        desk.held.append((worker, event))
        return event

    def let_go() -> None:
        slowest = min(desk.done)
        for entry in list(desk.held):
            if max_staleness is not None and desk.done[entry[0]] - slowest <= max_staleness:
                desk.held.remove(entry)
                entry[1].succeed()

    def work(worker: int, times_s: Seconds) -> Generator[Any, Any, None]:
        for time_s in times_s:
            yield env.timeout(time_s)
            came_s = env.now
            yield admitted(worker)
            with master.request() as turn:
                yield turn
                waited[worker] += env.now - came_s + serve_s
                yield env.timeout(busy_s)
            if answers_behind:
                served_s = env.now
                with port.request() as turn:
                    yield turn
                    waited[worker] += env.now - served_s
                    yield env.timeout(transfer_s)
            desk.done[worker] += 1
            if max_staleness is not None:
                let_go()

    for worker in range(workers):
        env.process(work(worker, random.choice(round_s, simulated)))
    env.run()
    longer = rounds / simulated
    idle_s = float(env.now) - workers * simulated * busy_s
    return Outcome(float(env.now) * longer, float(waited.mean()) * longer, idle_s * longer)


def gossip(
    distances: Callable[[int, int], Sequence[int]],
    ranks: int,
    rounds: int,
    round_s: Seconds,
    *,
    exchange_s: float,
    seed: int,
) -> Outcome:
    """Ranks that mix with their neighbours after each round, for which they wait: in the round `number` rank
    i receives from the ranks i - d (modulo `ranks`), d in `distances(ranks, number)`.

    The events of a round follow from those of the round before by a maximum, so no queue of events is needed:
    t_i <- max over i and those that send to i of (t + round) + exchange.
    """
    simulated = max(1, min(rounds, 100 * MOST_EXCHANGES // ranks))
    random = np.random.default_rng(seed)
    now_s, waited_s = np.zeros(ranks), 0.0
    for number in range(simulated):
        came_s = now_s + random.choice(round_s, ranks)
        away = {distance % ranks for distance in distances(ranks, number)} - {0}
        if len(away) == ranks - 1:  # all others, without a shift for each
            met_s = np.full(ranks, came_s.max())
        else:
            met_s = np.max([came_s, *(np.roll(came_s, distance) for distance in away)], axis=0)
        waited_s += float((met_s - came_s).mean())
        now_s = met_s + exchange_s
    longer = rounds / simulated
    # An epoch ends when all have come to its end.
    end_s = float(now_s.max())
    return Outcome(end_s * longer, (waited_s + end_s - float(now_s.mean())) * longer)
