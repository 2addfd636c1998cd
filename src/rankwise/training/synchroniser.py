"""One rank's part in keeping step: the batches it trains, and `step()`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rankwise.comm import World
from rankwise.data.partition import Indices
from rankwise.data.sampler import NOTHING, Batch, Sampler
from rankwise.errors import ConfigError, DivergedError, RankLost
from rankwise.runs.checkpoint import Checkpoint
from rankwise.strategies.base import NotFiniteError, State, Strategy, start_alike
from rankwise.strategies.compression import Memory
from rankwise.survival.fault_injection import NoFaults
from rankwise.training.admission import JoinState, Standing, admit
from rankwise.training.snapshots import Progress, Snapshots

if TYPE_CHECKING:
    from torch import nn

    from rankwise.models.replica import Replica


T = TypeVar("T")

MOST_DROPS = 3
"""Times in a row that a rank may find that what it computed is not a number."""

MOST_FRUITLESS = 3
"""Recoveries in a row in which it turns out that no rank was lost."""

SETTLE_ROUNDS = 1024
"""Rounds of an epoch, of which all ranks make the same number, after which logs are compared: an epoch of
nothing but messages has no exchange at which the world could do it by itself."""


class Synchroniser:
    """Joins a replica, a strategy and a sampler. The only point of synchronisation is `step()`::

        for batch in synchroniser.batches(epoch):
            optimizer.zero_grad()
            loss_of(batch.indices).backward()
            synchroniser.step()          # in place of optimizer.step()

    Ranks without work (a master, a worker whose shard has run out) take their part in the rounds
    while they iterate, and their loop body is not run. `rate_factor` says, from how many epochs are over and
    how many workers there are, what the learning rates that the optimiser came with are multiplied by.

    With `survives` a rank that is lost does not end the others: what it had not brought in is dealt to
    them, and they go on. `on_recovery` then gets the ranks that were lost, by the numbers with which they
    began, those that came in, and how long it took in seconds; `on_next_commit` the seconds until the next
    round was committed. The last commit can then be taken back by `undo`: an exchange may have succeeded on
    one rank and failed on another. An epoch's end is a commit of its own, after its last round.

    `spares` ranks stand by. One that comes in for another begins from its `join_state`, at the last commit,
    in which `history` says what else it needs.
    """

    def __init__(
        self,
        replica: Replica,
        strategy: Strategy[Any],
        sampler: Sampler,
        world: World,
        *,
        rate_factor: Callable[[float, int], float] | None = None,
        survives: bool = False,
        min_ranks: int = 1,
        spares: int = 0,
        faults: NoFaults | None = None,
        join_state: JoinState | None = None,
    ) -> None:
        self.replica = replica
        self.world = world
        self.sampler = sampler
        self.progress = Progress()
        self.on_recovery: Callable[[list[int], list[int], float], None] = lambda lost, new, seconds: None
        self.on_next_commit: Callable[[float], None] = lambda seconds: None
        self.history: Callable[[], Any] = lambda: None
        self._strategy = strategy
        self._batch: Batch | None = None
        self._counts_from_0 = False
        self._begun_again = 0
        self._members = list(world.members)
        self._fruitless = 0
        self._does_again = False
        self._rate_factor = rate_factor
        self._rates = [group["lr"] for group in replica.optimizer.param_groups]
        self.survives = survives
        self._min_ranks = min_ranks
        self.faults = faults or NoFaults()
        world.in_exchange = self.faults.in_exchange
        self._found_ns: int | None = None
        self._snapshots = Snapshots(
            replica,
            world.ledger,
            undoes=survives,
            begins_again=survives
            and (strategy.recovery.keeps_local_work or strategy.recovery.syncs_every_step),
            keeps_commits=(spares > 0 and strategy.recovery.keeps_local_work)
            or strategy.recovery.syncs_every_step,
        )
        self._at_start = (0, 0)
        self._drops = 0
        self._over = 0  # samples of rounds ahead of the others', which belong to the round under way since
        self._trained: list[Indices] = []
        self._under_way: list[Indices] = []
        self._fill = True
        if join_state is None:
            start_alike(replica, world)
        self.state: State = strategy.init(replica, world)
        if join_state is not None:
            self._take_over(join_state)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that this rank trains in `epoch`, each to be followed by one `step()`; if
        `retry_until_all` does the epoch again, what is left of them. A loop may count its epochs from 0 or
        from 1: those of batches count from 1. Raises ConfigError for a negative one."""
        if epoch < 0:
            raise ConfigError(f"batches({epoch}) was called: epochs count from 0 or from 1")
        self._counts_from_0 = self._counts_from_0 or epoch == 0
        epoch += self._counts_from_0
        if self.progress.epoch != epoch or not self._does_again:
            self.progress = Progress(epoch, closed=False)
            self._trained.clear()
            self.faults.begin(epoch, self.sampler.steps(epoch))
            self.state = self._strategy.open_epoch(self.state, self.replica, self.world)
            self._round_begins(self.progress)
        while not self.progress.closed:
            try:
                yield from self._rounds_of(epoch)
                if self.progress.rounds == len(self.sampler.rounds(epoch)):
                    self._close(epoch)
            except RankLost:
                self.recover()

    def step(self) -> None:
        """Use the gradients of the current batch, and synchronise if the strategy has it due now."""
        if self._batch is None:
            raise RuntimeError("step() stands alone: call it once in each turn of a loop over batches()")
        batch, self._batch = self._batch, None
        self.faults.at("compute")
        try:
            self._step(batch)
        except RankLost:
            self.recover()

    def drop(self, why: str) -> None:
        """In place of `step()`, for a batch whose loss is not a number: it is not averaged in.

        The round is trained again from its beginning. Raises DivergedError after three times in a row, and at
        once where a lost rank ends the run, as then nothing is kept to go back to.
        """
        if not self.survives:
            raise DivergedError(why)
        if not self._strategy.recovery.keeps_local_work:
            self.step()  # part of it may be under way to the others: all find it out together
            return
        self._batch = None
        self._drop(why)

    def resume(self, checkpoint: Checkpoint, worker: int | None) -> None:
        """Go on from a checkpoint; `worker` is this rank's number among workers, None for a master."""
        checkpoint.restore(self.replica, 0 if self.shares_optimizer else worker)
        memory = {**self._replicated(checkpoint.memory_of(0)), **checkpoint.memory_of(self.world.rank)}
        rounds = checkpoint.notes.get("rounds", 0)
        self.state = replace(self.state, memory=memory, rounds=rounds)

    @property
    def model(self) -> nn.Module:
        """What a loop calls: the replica's model, unless the strategy wraps it, as ddp does."""
        return self.replica.module

    @property
    def shares_optimizer(self) -> bool:
        """Whether rank 0's optimiser state is that of all ranks."""
        return self._strategy.shares_optimizer

    def trained(self) -> Indices:
        """The samples of this epoch that this rank has brought in, each as often as it was; on rank 0 with
        those that ranks brought in before they were lost."""
        credited = self.sampler.credited(self.progress.epoch) if self.world.rank == 0 else NOTHING
        return np.concatenate([NOTHING, *self._trained, credited])

    def undo(self) -> None:
        """Take the last commit back: replica and state are as they were when its exchange began."""
        self.state, progress = self._snapshots.undo()
        if progress.rounds < self.progress.rounds:
            self._under_way = [self._trained.pop()]
        self.progress = progress

    def retry_until_all(self, action: Callable[[], T], *, fill: bool = True) -> T:
        """Do what all ranks do together, and do it again if a rank was lost before all had done it. What is
        done may train an epoch, which then goes on from where it was. Without `fill` nobody comes in for a
        lost rank."""
        self._fill = fill
        while True:
            try:
                result = action()
                if self.survives:
                    self.world.confirm()
                self._does_again = False
                return result
            except RankLost:
                self.recover()
                self._does_again = True

    def recover(self) -> None:
        """Go on without ranks that were lost, from the last commit that all have; all that are left call it.

        Raises RankLost again where a rank that is lost ends the run.
        """
        if not self.survives:
            raise RankLost("a rank was lost")
        started_ns = self.world.ledger.clock()
        there = list(self._members)
        while not self._regroup():
            there += [member for member in self._members if member not in there]
        lost = [member for member in there if member not in self._members]
        new = [member for member in self._members if member not in there]
        self._fruitless = 0 if lost else self._fruitless + 1
        if self._fruitless > MOST_FRUITLESS:
            raise RankLost("exchanges fail again and again, though no rank was lost")
        self._begun_again += 1
        self._round_begins(None)
        if not self.progress.closed:
            self._found_ns = self._found_ns or started_ns
        self.on_recovery(lost, new, (self.world.ledger.clock() - started_ns) / 1e9)

    def _regroup(self) -> bool:
        """Meet those that are left; returns whether those who came in have all that they need."""
        world = self.world
        mine: Standing = [*self._snapshots.reached(), (self.progress, self.state.pending + self._over)]
        with self.faults.during("recovery"):
            standings: list[Standing | None] = world.repair(mine, fill=self._fill)
        if world.size < self._min_ranks:
            raise RankLost(f"{world.size} ranks are left, fewer than the {self._min_ranks} of --min-ranks")
        with world.ledger.phase("recovery"):
            ahead = self._meet(standings)
            before = [
                self._members.index(member) if standing else None
                for member, standing in zip(world.members, standings, strict=True)
            ]
            self._members = list(world.members)
            keeps = self._strategy.recovery.keeps_local_work
            done = [keeps * self._pending(standing) for standing in standings]
            self.sampler.redistribute(self.progress.epoch, self.progress.rounds, before, done, ahead)
            self._over += sum(map(len, self._trained[len(self._trained) - ahead[world.rank] :]))
            self.state = self._strategy.recover(self.state, self.replica, world)
            if not keeps:
                self._under_way.clear()
            if self._strategy.recovery.syncs_every_step:
                self._snapshots.commit_at(self.progress).restore()
            if all(standings):
                return True
            try:
                admit(world, standings, self._join_state)
            except RankLost:
                return False
            return True

    def _join_state(self) -> JoinState:
        """What a newcomer gets from this rank."""
        return JoinState(
            self.progress,
            self.sampler.plan(self.progress.epoch),
            self.state.rounds,
            self._replicated(self.state.memory),
            self._snapshots.commit_at(self.progress).content(),
            self.world.exchange_log.ideal_time,
            self.history(),
        )

    def _take_over(self, join_state: JoinState) -> None:
        """Be where the others are."""
        self.progress = join_state.progress
        self.sampler.follow(join_state.plan, self.world.rank)
        snapshot = self.replica.snapshot()
        snapshot.fill(join_state.replica)
        snapshot.restore()
        self.state = replace(self.state, rounds=join_state.rounds, memory=join_state.memory)
        self.faults.begin(self.progress.epoch, self.sampler.steps(self.progress.epoch))
        if not self.progress.closed:
            self.state = self._strategy.open_epoch(self.state, self.replica, self.world)
        self._does_again = True
        self._round_begins(self.progress)

    def _replicated(self, memory: Memory) -> Memory:
        return {name: array for name, array in memory.items() if name in self._strategy.replicated}

    def _drop(self, why: str) -> None:
        """Begin the round again, with everything as it was when it began."""
        self._drops += 1
        if self._drops == MOST_DROPS or not self.survives:
            raise DivergedError(why)
        with self.world.ledger.phase("recovery"):
            self._snapshots.begin_again()
            batches, samples = self._at_start
            del self._under_way[batches:]
            dropped = {**self.state.measured, "dropped": self.state.measured.get("dropped", 0) + 1}
            state = replace(self.state, pending=samples, measured=dropped)
            self.state = self._strategy.recover(state, self.replica, self.world)
        self._begun_again += 1

    def _meet(self, standings: Sequence[Standing | None]) -> list[int]:
        """Bring this rank to the point from which all go on; returns how many rounds ahead of it each rank
        stays."""
        first = min(standing[-1][0] for standing in standings if standing)
        last = first if self._strategy.recovery.synchronous else replace(first, rounds=self.progress.rounds)
        while self.progress > last:
            self.undo()
        self._snapshots.forget_steps()
        ahead = [standing[-1][0].rounds - first.rounds if standing else 0 for standing in standings]
        if self._strategy.recovery.synchronous:
            return [0] * len(ahead)
        mine = self.progress.rounds - first.rounds
        self.state = replace(self.state, rounds=self.state.rounds - mine)
        self.progress = first
        return ahead

    def _pending(self, standing: Standing | None) -> int:
        """Samples that a rank has trained of its round under way."""
        if not standing:
            return 0
        if self._strategy.recovery.synchronous:
            return dict(standing).get(self.progress, 0)
        return standing[-1][1]

    def _rounds_of(self, epoch: int) -> Iterator[Batch]:
        """The batches from here on, until a rank is lost."""
        begun_again = self._begun_again
        for batch in self.sampler.batches(epoch, self.progress.rounds):
            if self.world.stopping and not self._strategy.recovery.syncs_every_step:
                # Go straight to the round's end, where the others learn that the run is to stop.
                if not batch.ends_round:
                    continue
                batch = replace(batch, indices=batch.indices[:0], share=0.0)
            self._set_rates(batch.position)
            self._strategy.expect(self.state, self.replica, batch, self.world)
            self.faults.step(batch.step)
            if len(batch):
                self._batch = batch
                yield batch
                self._require_step()
            else:
                self.faults.at("compute")
                self._step(batch)
            if self._begun_again > begun_again:
                return

    def _require_step(self) -> None:
        if self._batch is not None:
            raise RuntimeError("a batch was not followed by step(), and ranks would lose step")

    def _close(self, epoch: int) -> None:
        self._snapshots.exchange_begins(self.state, self.progress)
        weights = self.sampler.weights(epoch)
        self.state = self._strategy.close_epoch(self.state, self.replica, weights, self.world)
        self.progress = replace(self.progress, closed=True)

    def _step(self, batch: Batch) -> None:
        strategy, replica, world = self._strategy, self.replica, self.world
        rounds = self.state.rounds
        where = f"in epoch {batch.epoch}, step {batch.step}"
        not_finite = f"weights or gradients are not finite {where}: try a smaller learning rate"
        try:
            self.state = strategy.train(self.state, replica, batch, world)
        except NotFiniteError:
            self._drop(not_finite)
            return
        self._under_way.append(batch.indices)
        if batch.ends_round:
            self._snapshots.exchange_begins(self.state, self.progress)
            try:
                with self.faults.during("exchange"):
                    prepared = strategy.prepare(self.state, replica, batch, world)
                    self.state = strategy.commit(self.state, replica, prepared, world)
            except NotFiniteError:
                self._snapshots.exchange_is_off()
                self._drop(not_finite)
                return
            self._drops = self._over = 0
            self.progress = replace(self.progress, rounds=self.progress.rounds + 1)
            self._snapshots.all_came()
            self._follow(batch)
            self._trained.append(np.concatenate(self._under_way))
            self._under_way = []
            self._round_begins(self.progress)
            self._tell_of_recovery()
        elif self.state.rounds > rounds:  # a strategy without exchanges commits each step
            self._follow(batch)
        world.timeline.step(batch.epoch, len(batch))
        # By a number that all have alike, also those who came in later or made a round again.
        if batch.ends_round and self.progress.rounds % SETTLE_ROUNDS == 0:
            world.reconcile()

    def _follow(self, batch: Batch) -> None:
        """Take what was committed into the average of the weights, if there is one."""
        if self.replica.average is not None:
            with self.world.ledger.phase("optimizer"):
                self.replica.average.follow(self.state.rounds, batch.end)

    def _tell_of_recovery(self) -> None:
        if self._found_ns is not None:
            self.on_next_commit((self.world.ledger.clock() - self._found_ns) / 1e9)
            self._found_ns = None

    def _round_begins(self, committed: Progress | None) -> None:
        """A round begins, after a commit at this progress, or again after a recovery."""
        self._at_start = len(self._under_way), self.state.pending
        self._snapshots.round_begins(committed)

    def _set_rates(self, epochs_over: float) -> None:
        if self._rate_factor is not None:
            factor = self._rate_factor(epochs_over, self.sampler.workers)
            for group, rate in zip(self.replica.optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate * factor
