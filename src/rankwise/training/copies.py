"""What only one rank has, kept by a second rank too, so that it is not lost with the first.

After each commit a rank sends it to another one, on another host where there is one: the state of an
optimiser of its own, and what its compression has left out. A rank that comes in for a lost one begins with
that one's; where none comes in, what compression has left out is added to that of the rank that kept it.
Buffers, in which ranks differ within an epoch, are not kept: training does not read them.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor

from rankwise.comm import World
from rankwise.strategies.base import State, Strategy
from rankwise.strategies.compression import Memory
from rankwise.strategies.exchange import LEFT_OUT
from rankwise.training.snapshots import Progress, Snapshots

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


@dataclass(frozen=True)
class Standing:
    """Where a rank can go back to, and at the end where it was when another was lost; each with the samples
    that the rank had trained there since the last commit. It was one of these `members`, and keeps copies of
    those in `held`, each as of these commits; None where none are kept. What it knows of rank 0's is the
    copy of the number `of_rank_0`; None where rank 0 has nothing alone, and of rank 0 itself."""

    points: list[tuple[Progress, int]]
    members: Sequence[int] = ()
    held: Mapping[int, Sequence[Progress]] | None = None
    of_rank_0: int | None = None


@dataclass(frozen=True)
class Own:
    """What only one rank had after a commit: its optimiser's tensors, by their places in a snapshot, and
    arrays of its strategy's memory."""

    tensors: dict[int, Tensor]
    memory: Memory


class Taker(NamedTuple):
    """The rank `holder` keeps a copy of the lost `member`, with which the rank `newcomer` begins, if any."""

    member: int
    holder: int
    newcomer: int | None


def meeting_point(standings: Sequence[Standing | None], members: Sequence[int]) -> Progress:
    """Where ranks that go on in step meet: at the last commit that all have; or at the one before if a rank
    was lost before it had sent a copy as of the last one, and had sent one as of that, or none before."""
    there = [[progress for progress, _ in standing.points] for standing in standings if standing]
    last = min(points[-1] for points in there)
    if last.closed or not last.rounds:
        return last
    before = replace(last, rounds=last.rounds - 1)
    if not all(before in points for points in there):
        return last
    keep = [its for its in standings if its and its.held is not None]
    were = {member for its in keep for member in (*its.members, *(its.held or ()))}
    sent = {member for its in keep for member in its.held or ()}
    for member in were - {*members}:
        goes_back = member not in sent or _holder(standings, member, before) is not None
        if goes_back and _holder(standings, member, last) is None:
            return before
    return last


class Newest(NamedTuple):
    """The newest copy of what rank 0 alone has: its number, and the first rank that holds it."""

    number: int
    holder: int


def newest_of_rank_0(standings: Sequence[Standing | None]) -> Newest | None:
    """Of a rank 0 that was lost; None where rank 0 is the one before, or it has nothing alone."""
    if standings[0] is None or standings[0].of_rank_0 is None:
        return None
    numbers = [-1 if its is None or its.of_rank_0 is None else its.of_rank_0 for its in standings]
    return Newest(max(numbers), numbers.index(max(numbers)))


def takers(standings: Sequence[Standing | None], members: Sequence[int], progress: Progress) -> list[Taker]:
    """Who begins with what of the ranks that were lost, alike on all `members` [ranks], newcomers too."""
    lost = sorted({member for its in standings if its for member in its.held or ()} - {*members})
    newcomers = [rank for rank, standing in enumerate(standings) if standing is None]
    found = []
    for member in lost:
        holder = _holder(standings, member, progress)
        if holder is not None:
            found.append(Taker(member, holder, newcomers.pop(0) if newcomers else None))
    return found


def _holder(standings: Sequence[Standing | None], member: int, progress: Progress) -> int | None:
    """The rank that keeps a copy of a member as of the last commit before this point; the first of several,
    None if there is none."""
    of_ranks = [_as_of((its.held or {}).get(member, ()), progress) if its else None for its in standings]
    newest = max(filter(None, of_ranks), default=None)
    return of_ranks.index(newest) if newest else None


def _as_of(held: Sequence[Progress], progress: Progress) -> Progress | None:
    """Of the commits that are kept the last one before this point; None if it is not there. None was made in
    an epoch of which no round is over: the last one is of an epoch before."""
    if progress.rounds:
        commit = replace(progress, closed=False)
        return commit if commit in held else None
    return max((its for its in held if its.epoch < progress.epoch), default=None)


class NoCopies:
    """None are kept."""

    @property
    def held(self) -> Mapping[int, Sequence[Progress]] | None:
        """The commits as of which copies are kept, by the member whose they are."""
        return None

    def exchange(self, progress: Progress, state: State) -> int:
        """Give this rank's own to another rank, and keep that of one; all ranks together, after a commit.
        Returns the bytes that were sent. Raises RankLost."""
        return 0

    def own_of(self, member: int, progress: Progress) -> Own:
        """What a lost member had of its own at this point, of which this rank keeps a copy."""
        raise KeyError(member)

    def settle(self, found: Sequence[Taker], progress: Progress, state: Any) -> Any:
        """Ranks were lost, and others have come in: what a newcomer began with is its own now. Returns this
        rank's state with what compression has left out on lost ranks whose places are empty."""
        return state


class Copies(NoCopies):
    """Those of one rank."""

    def __init__(
        self,
        replica: Replica,
        strategy: Strategy[Any],
        world: World,
        snapshots: Snapshots,
        *,
        keeps_optimizer: bool,
    ) -> None:
        self._strategy = strategy
        self._world = world
        self._snapshots = snapshots
        self._of_optimizer = replica.of_optimizer if keeps_optimizer else range(0)
        self._held: dict[int, dict[Progress, bytes]] = {}
        self._last = Progress()  # the commit after which copies were exchanged last

    @property
    def held(self) -> Mapping[int, Sequence[Progress]]:
        return {member: [*its] for member, its in self._held.items()}

    def exchange(self, progress: Progress, state: State) -> int:
        world = self._world
        if world.size == 1:
            return 0
        with world.ledger.phase("recovery"):
            tensors: list[Tensor] = []
            if self._of_optimizer:
                tensors, _ = self._snapshots.commit_at(progress).content()
            own = Own(
                {place: tensors[place] for place in self._of_optimizer},
                {name: its for name, its in state.memory.items() if name not in self._strategy.replicated},
            )
            mine = np.frombuffer(pickle.dumps(own), np.uint8)
        to, source = _partners(world)
        length = np.empty(1, np.int64)
        self._swap(np.array([len(mine)]), to, length, source)
        theirs = np.empty(int(length[0]), np.uint8)
        self._swap(mine, to, theirs, source)
        self._held.setdefault(world.members[source], {})[progress] = theirs.tobytes()
        # Ranks may go back by one commit, and by then another may be this one's neighbour.
        for member, kept in [*self._held.items()]:
            recent = {commit: own for commit, own in kept.items() if commit >= self._last}
            self._held[member] = recent
            if not recent:
                del self._held[member]
        self._last = progress
        return len(mine)

    def _swap(self, mine: np.ndarray, to: int, theirs: np.ndarray, source: int) -> None:
        receiving = self._world.start_receive(theirs, source)
        sending = self._world.start_send(mine, to)
        receiving.wait()
        sending.wait()

    def own_of(self, member: int, progress: Progress) -> Own:
        kept = self._held[member]
        commit = _as_of([*kept], progress)
        if commit is None:
            raise KeyError(member)
        own: Own = pickle.loads(kept[commit])
        return own

    def settle(self, found: Sequence[Taker], progress: Progress, state: Any) -> Any:
        members = self._world.members
        for member, holder, newcomer in found:
            if holder != self._world.rank:
                continue
            if newcomer is not None:
                self._held[members[newcomer]] = self._held.pop(member)
                continue
            memory = self.own_of(member, progress).memory
            if LEFT_OUT in memory:
                before = state.memory.get(LEFT_OUT, np.float32(0))
                state = state.remember(**{LEFT_OUT: before + memory[LEFT_OUT]})
        self._held = {member: its for member, its in self._held.items() if member in members}
        return state


def _partners(world: World) -> tuple[int, int]:
    """Whom a rank gives its copy to, and whose it keeps: in the order of hosts, as many places further as the
    largest host has ranks, unless that one has more than all others together."""
    order = [rank for host in world.hosts for rank in host]
    step = max(map(len, world.hosts)) % world.size or 1
    place = order.index(world.rank)
    return order[(place + step) % world.size], order[place - step]
