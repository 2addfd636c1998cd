"""How a rank that stood by comes in for one that was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rankwise.comm import World
from rankwise.data.sampler import Plan
from rankwise.errors import RankLost
from rankwise.ledger.ideal_time import IdealTime
from rankwise.strategies.base import Strategy
from rankwise.strategies.compression import Memory
from rankwise.training.snapshots import Progress

if TYPE_CHECKING:
    from rankwise.models.snapshot import Content

Standing = list[tuple[Progress, int]]
"""Where a rank can go back to, and at the end where it was when another was lost; each with the samples that
the rank had trained there since the last commit."""


@dataclass(frozen=True)
class JoinState:
    """What a newcomer gets from a rank that is there: everything that it cannot make itself. `history` is for
    its observer."""

    progress: Progress
    plan: Plan
    rounds: int
    memory: Memory
    replica: Content
    ideal_time: IdealTime
    history: Any


def replicated(memory: Memory, strategy: Strategy[Any]) -> Memory:
    """The arrays of a rank's memory that are the same on all ranks."""
    return {name: array for name, array in memory.items() if name in strategy.replicated}


def admit(
    world: World, standings: Sequence[Standing | None], make: Callable[[], JoinState] | None = None
) -> JoinState:
    """Give newcomers, whose standing is None, what they need; all ranks together.

    The last of the others makes it, since that one is a worker if any of them is. Raises RankLost on all
    ranks if one of them was lost.
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
    """Wait until this rank takes the place of a lost one; returns None if the run ends without that.

    Raises RankLost if no rank is left that knows how far the run was.
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
