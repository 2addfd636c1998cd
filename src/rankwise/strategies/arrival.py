"""How a rank that stood by comes in for one that was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.compression import Memory
from rankwise.data.sampler import Plan
from rankwise.errors import RankLost
from rankwise.strategies.past import Position
from rankwise.world import World
from rankwise.world.replay import Replay

if TYPE_CHECKING:
    from torch import Tensor

Standing = list[tuple[Position, int]]
"""Where a rank was when another was lost, last, and where it can go back to; with the samples that it had
trained there since the last commit."""


@dataclass(frozen=True)
class Arrival:
    """What a newcomer gets from a rank that is there: everything that it cannot make itself. `books` are for
    whoever uses the synchroniser."""

    position: Position
    plan: Plan
    rounds: int
    memory: Memory
    replica: list[Tensor]
    replay: Replay
    books: Any


def let_in(
    world: World, standings: Sequence[Standing | None], make: Callable[[], Arrival] | None = None
) -> Arrival:
    """Give newcomers, whose standing is None, what they need; all ranks together.

    The last of the others makes it: it is a worker, if any of them is. Raises RankLost on all ranks if one of
    them was lost.
    """
    donor = max(rank for rank, standing in enumerate(standings) if standing)
    mine = make() if make and world.rank == donor else None
    arrival: Arrival | None = None
    try:
        arrival = world.broadcast_object(mine, donor)
    finally:
        world.confirm(arrival is not None)
    assert arrival is not None
    return arrival


def stand_by(world: World) -> Arrival | None:
    """Wait for a rank to be lost, to come in for it; returns None if the others are done without.

    Raises RankLost if nobody is left who knows how far the run was.
    """
    standings = world.stand_by()
    while standings is not None:
        if not any(standings):
            raise RankLost("all ranks were lost that knew how far the run was")
        try:
            arrival = let_in(world, standings)
            world.arrive(arrival.replay)
            return arrival
        except RankLost:
            standings = world.repair()
    return None
