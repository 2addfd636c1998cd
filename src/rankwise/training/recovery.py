"""What a rank does when another is lost, or when what it computed is not a number.

An exchange may have succeeded on one rank and failed on another. So the ranks that are left meet, go back to
the last commit that all of them have, deal anew what the lost ranks had not brought in, and let spares in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rankwise.comm import World
from rankwise.data.sampler import RoundSampler
from rankwise.errors import DivergedError, Interrupted, RankLost
from rankwise.strategies.base import NotFiniteError, Strategy
from rankwise.survival.fault_injection import NoFaults
from rankwise.training.admission import JoinState, admit, replicated
from rankwise.training.copies import Copies, NoCopies, Standing, meeting_point, takers
from rankwise.training.observer import Observer, Recovered
from rankwise.training.snapshots import Progress, Snapshots, Work

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

MOST_DROPS = 3
"""Times in a row that a rank may find that what it computed is not a number."""

MOST_FRUITLESS = 3
"""Recoveries in a row in which it turns out that no rank was lost."""


class NoRankRecovery:
    """Where a lost rank ends the run: nothing is kept to go back to."""

    survives = False
    """Whether the other ranks go on when one is lost."""

    begun_again = 0
    """How often a round was begun again."""

    def round_begins(self) -> None:
        """A round begins, after a commit of all ranks, or goes on where a run was stopped in it."""

    def exchange(self) -> AbstractContextManager[None]:
        """Around an exchange and its commit, which may have to be taken back."""
        return nullcontext()

    def committed(self) -> None:
        """A round is committed, and the next one begins."""

    def recover(self, *, fill: bool) -> None:
        """Go on without ranks that were lost, from the last commit that all have; all that are left call it.

        With `fill` spares take their places. Raises RankLost where a lost rank ends the run.
        """
        raise RankLost("a rank was lost")

    def drop(self, why: str) -> None:
        """Begin the round again, without what is not a number. Raises DivergedError(why) after MOST_DROPS
        times in a row, and at once where nothing is kept."""
        raise DivergedError(why)

    def undo(self) -> None:
        """Take the last commit back. Raises RuntimeError if there is none that can be."""
        raise RuntimeError("there is no step to undo")


class RankRecovery(NoRankRecovery):
    """Keeps what a rank needs to go on without others, and does it.

    A recovery moves `work` back, which the synchroniser moves on. A rank that stood by begins from its
    `join_state`.
    """

    survives = True

    def __init__(
        self,
        work: Work,
        replica: Replica,
        strategy: Strategy[Any],
        sampler: RoundSampler,
        world: World,
        *,
        min_ranks: int,
        spares: int,
        keeps_copies: bool,
        faults: NoFaults,
        observer: Observer,
        join_state: JoinState | None,
    ) -> None:
        self._work = work
        self._replica = replica
        self._strategy = strategy
        self._sampler = sampler
        self._world = world
        self._min_ranks = min_ranks
        self._faults = faults
        self._observer = observer
        self._members = list(world.members)
        self._snapshots = Snapshots(
            replica,
            world.ledger,
            begins_again=strategy.recovery.keeps_local_work or strategy.recovery.syncs_every_step,
            keeps_commits=(spares > 0 and strategy.recovery.keeps_local_work)
            or strategy.recovery.syncs_every_step,
            undoes_exchanges=strategy.undoes_exchanges,
        )
        self._copies = NoCopies()
        if keeps_copies:
            self._copies = Copies(
                replica,
                strategy,
                world,
                self._snapshots,
                keeps_optimizer=spares > 0 and not strategy.shares_optimizer,
            )
        self._at_start = (0, 0, 0)  # batches and samples under way when the round began, and batches made
        self._drops = 0
        self._fruitless = 0
        self._there: list[int] = []
        self._found_at_s = 0.0
        self._committed_ns = world.ledger.clock()
        self._found_ns: int | None = None  # when the loss was found after which no round is committed yet
        if join_state is not None:
            self._join(join_state)

    def round_begins(self) -> None:
        self._begin_round(None if self._work.under_way else self._work.progress)

    @contextmanager
    def exchange(self) -> Iterator[None]:
        self._snapshots.exchange_begins(self._work.state, self._work.progress)
        try:
            yield
        except (NotFiniteError, Interrupted):
            self._snapshots.exchange_is_off()
            raise

    def committed(self) -> None:
        self._drops = 0
        self._snapshots.all_came()
        self.round_begins()
        if self._found_ns is not None:
            self._observer.committed((self._world.ledger.clock() - self._found_ns) / 1e9)
            self._found_ns = None
        work = self._work
        if sent := self._copies.exchange(work.progress, work.state):
            sent_before = work.state.measured.get("copy_bytes", 0)
            measured = {**work.state.measured, "copy_bytes": sent_before + sent}
            work.state = replace(work.state, measured=measured)

    def recover(self, *, fill: bool) -> None:
        started_ns = self._world.ledger.clock()
        self._found_at_s = time.time()
        log = self._world.exchange_log
        waited_ns, log.failed_ns = log.failed_ns, 0
        undone_ns = started_ns - waited_ns - self._committed_ns
        self._there = there = list(self._members)
        while not self._regroup(fill=fill):
            there += [member for member in self._members if member not in there]
        lost, new = self._changes()
        self._fruitless = 0 if lost else self._fruitless + 1
        if self._fruitless > MOST_FRUITLESS:
            raise RankLost("exchanges fail again and again, though no rank was lost")
        self.begun_again += 1
        self._begin_round(None)
        progress = self._work.progress
        if not progress.closed:
            self._found_ns = self._found_ns or started_ns
        seconds = (self._world.ledger.clock() - started_ns) / 1e9
        drops = not self._strategy.recovery.keeps_local_work
        self._observer.recovered(
            Recovered(lost, new, seconds, progress, waited_ns / 1e9, max(0, undone_ns) / 1e9, drops)
        )

    def _changes(self) -> tuple[list[int], list[int]]:
        """The ranks that were lost in this recovery, and those that came in."""
        lost = [member for member in self._there if member not in self._members]
        return lost, [member for member in self._members if member not in self._there]

    def drop(self, why: str) -> None:
        self._drops += 1
        if self._drops == MOST_DROPS:
            raise DivergedError(why)
        work = self._work
        with self._world.ledger.phase("recovery"):
            self._snapshots.begin_again()
            batches, samples, work.made = self._at_start
            del work.under_way[batches:]
            dropped = {**work.state.measured, "dropped": work.state.measured.get("dropped", 0) + 1}
            state = replace(work.state, pending=samples, measured=dropped)
            work.state = self._strategy.recover(state, self._replica, self._world)
        self.begun_again += 1

    def undo(self) -> None:
        self._work.go_back(*self._snapshots.undo())

    def _begin_round(self, committed: Progress | None) -> None:
        """A round begins, after a commit at this progress, or again after a recovery."""
        self._committed_ns = self._world.ledger.clock()
        work = self._work
        self._at_start = len(work.under_way), work.state.pending, work.made
        self._snapshots.round_begins(committed)

    def _regroup(self, *, fill: bool) -> bool:
        """Meet the ranks that are left; returns whether those that came in have all that they need."""
        world, work = self._world, self._work
        now = work.progress, work.state.pending + work.ahead
        number, copy = self._strategy.copy_of_rank_0(work.state) or (None, None)
        mine = Standing([*self._snapshots.reached(), now], self._members, self._copies.held, number)
        with self._faults.during("recovery"):
            standings: list[Standing | None] = world.repair(mine, fill=fill)
        if world.size < self._min_ranks:
            raise RankLost(f"{world.size} ranks are left, fewer than the {self._min_ranks} of --min-ranks")
        with world.ledger.phase("recovery"):
            self._redistribute(standings, ahead=self._meet(standings))
            work.state = self._strategy.recover(work.state, self._replica, world)
            if not self._strategy.recovery.keeps_local_work:
                work.under_way.clear()
            if self._strategy.recovery.syncs_every_step:
                self._snapshots.commit_at(work.progress).restore()
            try:
                _, copy = admit(world, standings, self._join_state, self._copies, copy)
            except RankLost:
                return False
            numbers = [its.of_rank_0 for its in standings if its and its.of_rank_0 is not None]
            newest = max(numbers, default=0)
            work.state = self._strategy.follow_rank_0(work.state, self._replica, world, newest, copy)
            found = takers(standings, world.members, work.progress)
            work.state = self._copies.settle(found, work.progress, work.state)
            return True

    def _meet(self, standings: Sequence[Standing | None]) -> list[int]:
        """Bring this rank to the point from which all go on; returns how many rounds ahead of it each rank
        stays."""
        work = self._work
        first = meeting_point(standings, self._world.members)
        last = first if self._strategy.recovery.synchronous else replace(first, rounds=work.progress.rounds)
        while work.progress > last:
            self.undo()
        self._snapshots.forget_steps()
        if self._strategy.recovery.synchronous:
            return [0] * len(standings)
        mine = work.progress.rounds - first.rounds
        work.state = replace(work.state, rounds=work.state.rounds - mine)
        work.progress = first
        return [its.points[-1][0].rounds - first.rounds if its else 0 for its in standings]

    def _redistribute(self, standings: Sequence[Standing | None], ahead: list[int]) -> None:
        """Deal what lost ranks had not brought in to the ranks of the new world."""
        world, work = self._world, self._work
        before = [
            self._members.index(member) if standing else None
            for member, standing in zip(world.members, standings, strict=True)
        ]
        self._members = list(world.members)
        done = [self._kept(standing) for standing in standings]
        self._sampler.redistribute(
            work.progress.epoch, work.progress.rounds, before, done, ahead, left_out=work.left_out
        )
        work.made = 0
        work.ahead += sum(map(len, work.trained[len(work.trained) - ahead[world.rank] :]))

    def _kept(self, standing: Standing | None) -> int:
        """Samples of the round under way that are in a rank's replica, and stay there."""
        if not standing or not self._strategy.recovery.keeps_local_work:
            return 0
        if self._strategy.recovery.synchronous:
            return dict(standing.points).get(self._work.progress, 0)
        return standing.points[-1][1]

    def _join_state(self) -> JoinState:
        """What a newcomer gets from this rank."""
        work = self._work
        return JoinState(
            work.progress,
            self._sampler.plan(work.progress.epoch),
            work.state.rounds,
            replicated(work.state.memory, self._strategy),
            self._snapshots.commit_at(work.progress).content(),
            self._world.exchange_log.ideal_time,
            self._observer.history,
            *self._changes(),
            self._found_at_s,
        )

    def _join(self, join_state: JoinState) -> None:
        """Be where the others are."""
        work = self._work
        work.progress = join_state.progress
        self._sampler.follow(join_state.plan, self._world.rank)
        snapshot = self._replica.snapshot()
        snapshot.fill(join_state.replica)
        snapshot.restore()
        work.state = replace(work.state, rounds=join_state.rounds, memory=join_state.memory)
        self._faults.begin(work.progress.epoch, self._sampler.steps(work.progress.epoch))
        if not work.progress.closed:
            work.state = self._strategy.open_epoch(work.state, self._replica, self._world)
        self.round_begins()
        seconds = max(0.0, time.time() - join_state.found_at_s)
        self._observer.recovered(Recovered(join_state.lost, join_state.new, seconds, work.progress))
