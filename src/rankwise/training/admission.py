"""How a rank that stood by comes in for one that was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.comm import World
from rankwise.data.sampler import Plan
from rankwise.errors import RankLost
from rankwise.ledger.ideal_time import IdealTime
from rankwise.strategies.compression import Memory
from rankwise.training.snapshots import Progress

if TYPE_CHECKING:
    from torch import Tensor

Standing = list[tuple[Progress, int]]
"""Where a rank was when another was lost, last, and where it can go back to; with the samples that it had
trained there since the last commit."""


@dataclass(frozen=True)
class JoinState:
    """What a newcomer gets from a rank that is there: everything that it cannot make itself. `history` are
    for whoever uses the synchroniser."""

    progress: Progress
    plan: Plan
    rounds: int
    memory: Memory
    replica: list[Tensor]
    ideal_time: IdealTime
    history: Any


def admit(
    world: World, standings: Sequence[Standing | None], make: Callable[[], JoinState] | None = None
) -> JoinState:
    """Give newcomers, whose standing is None, what they need; all ranks together.

    The last of the others makes it: it is a worker, if any of them is. Raises RankLost on all ranks if one of
    them was lost.
    """
    donor = max(rank for rank, standing in enumerate(standings) if standing)
    mine = make() if make and world.rank == donor else None
    join_state: JoinState | None = None
    try:
        join_state = world.broadcast_object(mine, donor)
    finally:
        world.confirm(join_state is not None)
    assert join_state is not None
    return join_state


def stand_by(world: World) -> JoinState | None:
    """Wait for a rank to be lost, to come in for it; returns None if the others are done without.

    Raises RankLost if nobody is left who knows how far the run was.
    """
    standings = world.stand_by()
    while standings is not None:
        if not any(standings):
            raise RankLost("all ranks were lost that knew how far the run was")
        try:
            join_state = admit(world, standings)
            world.arrive(join_state.ideal_time)
            return join_state
        except RankLost:
            standings = world.repair()
    return None
