"""How a rank that stood by comes in for one that was lost."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rankwise.comm import World
from rankwise.data.sampler import Plan
from rankwise.errors import RankLost
from rankwise.ledger.ideal_time import IdealTime
from rankwise.strategies.base import Strategy
from rankwise.strategies.compression import Flat, Memory
from rankwise.training.copies import NoCopies, Own, Standing, meeting_point, newest_of_rank_0, takers
from rankwise.training.snapshots import Progress

if TYPE_CHECKING:
    from rankwise.models.snapshot import Content


class NotNeeded(SystemExit):
    """A rank that stood by is at its end, and so is its program."""


@dataclass(frozen=True)
class JoinState:
    """What a newcomer gets from a rank that is there: everything that it cannot make itself. `history` is for
    its observer, up to the loss of the ranks in `lost`, found at `found_at_s` of the Unix clock, in whose
    places are those in `new`."""

    progress: Progress
    plan: Plan
    rounds: int
    memory: Memory
    replica: Content
    ideal_time: IdealTime
    history: Any
    lost: list[int]
    new: list[int]
    found_at_s: float

    def owning(self, own: Own) -> JoinState:
        """With what the rank whose place the newcomer takes had of its own."""
        tensors, rest = self.replica
        tensors = [own.tensors.get(place, tensor) for place, tensor in enumerate(tensors)]
        return replace(self, replica=(tensors, rest), memory={**self.memory, **own.memory})


def replicated(memory: Memory, strategy: Strategy[Any]) -> Memory:
    """The arrays of a rank's memory that are the same on all ranks."""
    return {name: array for name, array in memory.items() if name in strategy.replicated}


def admit(
    world: World,
    standings: Sequence[Standing | None],
    make: Callable[[], JoinState] | None = None,
    copies: NoCopies | None = None,
    of_rank_0: Flat | None = None,
) -> tuple[JoinState | None, Flat | None]:
    """Give newcomers, whose standing is None, what they need, and a rank 0 in the place of a lost one what
    that one had alone; all ranks together. Returns both, None where there are no newcomers, or rank 0 needs
    nothing.

    The last of the others makes it, since that one is a worker if any of them is. What a lost rank had of its
    own one of them has in its `copies`, and what rank 0 had as its copy `of_rank_0`. Raises RankLost on all
    ranks if one of them was lost.
    """
    newest = newest_of_rank_0(standings)
    if all(standings) and newest is None:
        return None, None
    progress = meeting_point(standings, world.members)
    donor = max(rank for rank, standing in enumerate(standings) if standing)
    # Before the others wait for it, as it may fail: what users keep may be of any kind.
    mine = pickle.dumps(make()) if make and world.rank == donor and not all(standings) else b""
    sent = b""
    copy: Flat | None = None
    own: Own | None = None
    done = False
    try:
        if newest is not None:
            copy = world.broadcast_object(of_rank_0 if world.rank == newest.holder else None, newest.holder)
        if not all(standings):
            sent = world.broadcast_object(mine, donor)
        for member, holder, newcomer in takers(standings, world.members, progress):
            if newcomer is not None:
                its = copies.own_of(member, progress) if copies and world.rank == holder else None
                its = world.broadcast_object(its, holder)
                own = its if world.rank == newcomer else own
        done = True
    finally:
        world.confirm(done)
    join_state: JoinState | None = pickle.loads(sent) if sent else None
    if join_state is not None and own is not None:
        join_state = join_state.owning(own)
    return join_state, copy


def stand_by(world: World) -> JoinState | None:
    """Wait until this rank takes the place of a lost one; returns None if the run ends without that.

    Raises RankLost if no rank is left that knows how far the run was.
    """
    standings = world.stand_by()
    while standings is not None:
        if not any(standings):
            raise RankLost("all ranks were lost that knew how far the run was")
        try:
            join_state, _ = admit(world, standings)
            assert join_state is not None  # there is a newcomer: this rank
            world.arrive(join_state.ideal_time)
            return join_state
        except RankLost:
            standings = world.repair()
    return None


def come_in(world: World, ranks: int) -> JoinState | None:
    """All ranks from the number `ranks` on stand by; all together.

    Returns what one of them gets when it takes the place of a lost one, and None on those that were there
    from the beginning. Raises NotNeeded on a rank for which the run ends before.
    """
    world.set_aside(ranks)
    if world.rank >= 0:
        return None
    world.survives = True  # no rank needs it yet
    join_state = stand_by(world)
    if join_state is None:
        raise NotNeeded(0)
    return join_state
