"""One rank's part in keeping step: the batches it trains, and `step()`.

This is the way of a step without failures. What happens when a rank is lost stands in `recovery`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from rankwise.comm import World
from rankwise.comm.exchanges import nothing_owed, raising
from rankwise.data.partition import NOTHING, Indices
from rankwise.data.sampler import Batch, RoundSampler
from rankwise.errors import ConfigError, Interrupted, OutOfStepError, RankLost
from rankwise.models.precision import forget_cast_weights
from rankwise.runs.checkpoint import Checkpoint
from rankwise.strategies.base import NotFiniteError, State, Strategy, start_alike
from rankwise.survival.fault_injection import NoFaults
from rankwise.system.call_sites import here, left_by, place_of
from rankwise.training.admission import JoinState, replicated
from rankwise.training.commits import Commits
from rankwise.training.inside import How, Inside
from rankwise.training.leaving import Loop, before_use
from rankwise.training.observer import NoObserver, Observer
from rankwise.training.recovery import NoRankRecovery, RankRecovery
from rankwise.training.snapshots import Progress, Work

if TYPE_CHECKING:
    from torch import nn

    from rankwise.models.replica import Replica


T = TypeVar("T")


def nothing_at_commit(batch: Batch) -> None:
    """Nothing is done when a round is committed."""


RECONCILE_ROUNDS = 1024
"""Rounds of an epoch, of which all ranks make the same number, after which logs are compared: an epoch of
nothing but messages has no exchange at which the world could do it by itself."""


class Synchroniser:
    """Joins a replica, a strategy and a sampler. The only point of synchronisation is `step()`::

        for batch in synchroniser.batches(epoch):
            optimizer.zero_grad()
            loss_of(batch.indices).backward()
            synchroniser.step()          # in place of optimizer.step()

    Ranks without work (a master, a worker whose shard has run out) take their part in the rounds
    while they iterate, and their loop body is not run.
    `rate_factor(epochs_over, workers)` returns the factor of the learning rates that the optimiser came with.
    With `survives` the other ranks go on when one is lost, as long as `min_ranks` are left, and deal anew
    what it had not brought in; `spares` ranks stand by to take the places of lost ones. A spare that does so
    begins from its `join_state`. With `keeps_copies` another rank keeps what only this one has. The
    `observer` gets reports of recoveries. After each commit, before the next batch, `at_commit` is called
    with the batch that ended the round; all ranks together.
    """

    def __init__(
        self,
        replica: Replica,
        strategy: Strategy[Any],
        sampler: RoundSampler,
        world: World,
        *,
        rate_factor: Callable[[float, int], float] | None = None,
        survives: bool = False,
        min_ranks: int = 1,
        spares: int = 0,
        keeps_copies: bool = False,
        faults: NoFaults | None = None,
        observer: Observer | None = None,
        join_state: JoinState | None = None,
    ) -> None:
        self.replica = replica
        self.world = world
        self.sampler = sampler
        self.faults = faults or NoFaults()
        self._strategy = strategy
        self._rate_factor = rate_factor
        self._rates = [group["lr"] for group in replica.optimizer.param_groups]
        self._batch: Batch | None = None
        self._loop: Loop | None = None
        self._counts_from_0 = self._ended_early = False
        self._goes_on = join_state is not None
        self._fill = True
        self._stop: Interrupted | None = None
        self.at_commit: Callable[[Batch], None] = nothing_at_commit
        if join_state is None:
            start_alike(replica, world)
        self._work = Work(strategy.init(replica, world))
        self._recovery: NoRankRecovery = NoRankRecovery()
        if survives:
            self._recovery = RankRecovery(
                self._work,
                replica,
                strategy,
                sampler,
                world,
                min_ranks=min_ranks,
                spares=spares,
                keeps_copies=keeps_copies,
                faults=self.faults,
                observer=observer or NoObserver(),
                join_state=join_state,
            )
        parts = (self._work, replica, strategy, world, self._recovery, self.faults)
        self._commits = Commits(*parts, compares_rates=rate_factor is None)

    @property
    def state(self) -> State:
        """The strategy's state on this rank."""
        return self._work.state

    @property
    def progress(self) -> Progress:
        """How far the epoch is committed."""
        return self._work.progress

    @property
    def survives(self) -> bool:
        """Whether the other ranks go on when one is lost."""
        return self._recovery.survives

    @property
    def model(self) -> nn.Module:
        """What a loop calls: the replica's model, unless the strategy wraps it, as ddp does."""
        return self.replica.module

    @property
    def shares_optimizer(self) -> bool:
        """Whether rank 0's optimiser state is that of all ranks."""
        return self._strategy.shares_optimizer

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches that this rank trains in `epoch`, each to be followed by one `step()`; if
        `retry_until_all` does the epoch again, what is left of them.

        A loop may count its epochs from 0 or from 1: those of batches count from 1. It may be left, and turns
        may make no step, if all ranks do the same; the epoch ends, or goes on, as in one process. Raises
        ConfigError for a negative epoch, OutOfStepError if ranks do not do the same, RankLost where a lost
        rank ends the run, DivergedError, and Interrupted when the run is to stop.
        """
        if epoch < 0:
            raise ConfigError(f"batches({epoch}) was called: epochs count from 0 or from 1")
        self._leave_open_loop()
        self._require_no_other_loop(epoch)
        self.world.settle()
        self._counts_from_0 = self._counts_from_0 or epoch == 0
        epoch += self._counts_from_0
        work = self._work
        loop = Loop(epoch, here(), work, self._strategy, self.sampler, self.world)
        self.world.irregular = False
        self.world.at_end, self.world.whereabouts = self._leave_open_loop, loop.whereabouts
        self.world.open_loop = self._place_of_open_loop
        self.replica.require_unchanged()
        if work.progress.epoch != epoch or not self._goes_on:
            work.open_epoch(epoch)
            self.faults.begin(epoch, self.sampler.steps(epoch))
            work.state = self._strategy.open_epoch(work.state, self.replica, self.world)
            self._recovery.round_begins()
        self._loop = loop
        try:
            yield from self._turns(loop)
        except GeneratorExit:
            if self._loop is loop:
                frame, raises = left_by(sys._getframe().f_back)
                self.leave(place_of(frame), at_once=not raises)
            raise
        finally:
            if self._loop is loop:
                self._loop = None

    def _leave_open_loop(self) -> None:
        """The loop that is open is not taken to its end."""
        self.leave(here(), at_once=True)

    def _place_of_open_loop(self) -> str:
        return self._loop.place if self._loop is not None else ""

    def _require_no_other_loop(self, epoch: int) -> None:
        """Raises OutOfStepError if a loop of another synchroniser is open. In turns of both a rank whose
        batches of one are over would make the rest of its exchanges while others make those of the other."""
        if place := self.world.open_loop():
            raise OutOfStepError(
                f"batches({epoch}) was asked of a second synchroniser at {here()}, while a loop over batches "
                f"of another one is open at {place}: take one loop to its end before the next begins, or "
                "make one model and one optimiser of both"
            )

    def leave(self, place: str, *, at_once: bool) -> None:
        """The loop that is open, if one is, was left at this place. Take part in what others do until they
        learn of it: `at_once`, or before the model is used again or an exchange, as an exception has left it
        that may end this rank. Nobody hears what is raised while a generator is closed: it is raised before
        the next exchange too.
        """
        loop, self._loop, self._batch = self._loop, None, None
        if loop is None:
            return
        loop.left = place
        finish = partial(self._finish, loop)
        if not at_once:
            self.world.owed = finish
            before_use(self.replica.model, self.world.settle)
            return
        try:
            finish()
        except BaseException as error:
            self.world.owed = raising(error)

    def _finish(self, loop: Loop) -> None:
        for batch in self._turns(loop):
            raise AssertionError(f"a loop that was left got {batch}")

    def step(self) -> None:
        """Use the gradients of the current batch, and synchronise if the strategy has it due now.

        Raises what `batches` does, and OutOfStepError without a batch and inside torch.autocast.
        """
        if self._batch is None:
            raise OutOfStepError("step() stands alone: call it once in each turn of a loop over batches()")
        forget_cast_weights()
        batch, self._batch = self._batch, None
        loop = self._suspended()
        self.faults.at("compute")
        try:
            self._step(batch, loop)
        except RankLost:
            self._recover(loop)
        self._loop = loop

    def drop(self, why: str) -> None:
        """In place of `step()`, for a batch whose loss is not a number: it is not averaged in.

        The round is trained again from its beginning. Raises DivergedError after three times in a row, and at
        once where a lost rank ends the run, as then nothing is kept to go back to.
        """
        if self.survives and not self._strategy.recovery.keeps_local_work:
            self.step()  # part of it may be under way to the others: all find it out together
            return
        self._batch = None
        loop = self._suspended()
        self._recovery.drop(why)
        loop.go_back(self.progress.rounds)
        self._loop = loop

    @property
    def ended_early(self) -> bool:
        """Whether all ranks left the last loop before its end."""
        return self._ended_early

    def undo(self) -> None:
        """Take the last commit back: replica and state are as they were when its exchange began.

        An epoch's end is a commit of its own, after its last round. Raises RuntimeError if none is kept.
        """
        self._recovery.undo()

    def retry_until_all(self, action: Callable[[], T], *, fill: bool = True) -> T:
        """Do what all ranks do together, and do it again if a rank was lost before all had done it.

        The action may train an epoch, which then goes on from where it was. Without `fill` no spare takes the
        place of a lost rank. Raises RankLost where a lost rank ends the run.
        """
        self._fill = fill
        while True:
            try:
                result = action()
                self.world.settle()
                if self.survives:
                    self.world.confirm()
                self._goes_on = False
                return result
            except RankLost:
                self.recover()

    def recover(self) -> None:
        """Between two loops over batches: go on without ranks that were lost. Raises RankLost where a lost
        rank ends the run."""
        self.world.owed = nothing_owed
        self._recovery.recover(fill=self._fill)
        self._goes_on = True

    def resume(self, checkpoint: Checkpoint, worker: int | None) -> None:
        """Go on from a checkpoint; `worker` is this rank's number among workers, None for a master. Raises
        ResumeError if the checkpoint does not fit."""
        checkpoint.restore(self.replica, 0 if self.shares_optimizer else worker)
        shared = replicated(checkpoint.memory_of(0), self._strategy)
        memory = {**shared, **checkpoint.memory_of(self.world.rank)}
        self._work.state = replace(self.state, memory=memory, rounds=checkpoint.notes.get("rounds", 0))

    @property
    def inside(self) -> Inside:
        """Of the epoch under way."""
        return Inside(self._work, self.replica, self._strategy, self.sampler, self.world)

    def resume_inside(self, checkpoint: Checkpoint, how: How) -> list[Mapping[str, Any]]:
        """After `resume`, go on in the epoch in which the run was; `how` is as it was taken. Returns what the
        loop had of its own. Raises ResumeError if the checkpoint does not fit."""
        found = self.inside.go_on(checkpoint, how)
        self.faults.begin(self.progress.epoch, self.sampler.steps(self.progress.epoch))
        self._recovery.round_begins()
        self._goes_on = True
        return found

    def trained(self) -> Indices:
        """The samples of this epoch that this rank has brought in, each as often as it was; on rank 0 with
        those that ranks brought in before they were lost."""
        credited = self.sampler.credited(self.progress.epoch) if self.world.rank == 0 else NOTHING
        return np.concatenate([NOTHING, *self._work.trained, credited])

    def _suspended(self) -> Loop:
        """The loop, which is not open meanwhile: an error of the library's own is no leaving of it."""
        loop, self._loop = self._loop, None
        assert loop is not None  # it has just given a batch
        return loop

    def _turns(self, loop: Loop) -> Iterator[Batch]:
        """The batches from here to the end of the epoch, which is closed then."""
        work = self._work
        while not work.progress.closed:
            try:
                yield from self._batches_left(loop)
                if loop.ended or self.sampler.is_over(loop.epoch, work.progress.rounds):
                    self.replica.require_unchanged()
                    self._commits.close(loop)
                    self._ended_early = loop.ended
            except RankLost:
                self._recover(loop)

    def _recover(self, loop: Loop) -> None:
        self.world.owed = nothing_owed  # or the exchanges of the recovery would raise what led to it
        self._recovery.recover(fill=self._fill)
        loop.go_back(self.progress.rounds + self._strategy.recovery.keeps_local_work)

    def _batches_left(self, loop: Loop) -> Iterator[Batch]:
        """The batches from here to the end of the epoch, or until the round begins again."""
        begun_again = self._recovery.begun_again
        batches = self.sampler.batches(loop.epoch, self.progress.rounds)
        for batch in islice(batches, loop.index, None):
            batch = loop.given(batch)
            if not (len(batch) or batch.ends_round or self._strategy.recovery.syncs_every_step):
                loop.turn_over(batch)
                continue
            self._set_rates(batch.position)
            rounds = self.progress.rounds
            self._strategy.expect(self.state, self.replica, batch, self.world)
            self.faults.step(batch.step)
            if batch.is_made:
                self._batch, loop.step = batch, loop.step + 1
                yield batch
                loop.require_open(self._loop)
            if self._batch is not None or not batch.is_made:
                self._batch, batch = None, loop.left_out(batch) if batch.is_made else batch
                self.faults.at("compute")
                self._step(batch, loop)
            if self._stop is not None:  # the loop's own turn is over by now
                stop, self._stop = self._stop, None
                raise stop
            if loop.ended or self._recovery.begun_again > begun_again:
                return
            if self.progress.rounds > rounds:
                self.at_commit(batch)

    def _set_rates(self, epochs_over: float) -> None:
        if self._rate_factor is not None:
            factor = self._rate_factor(epochs_over, self.sampler.workers)
            for group, rate in zip(self.replica.optimizer.param_groups, self._rates, strict=False):
                group["lr"] = rate * factor

    def _step(self, batch: Batch, loop: Loop) -> None:
        """Train a batch, and at the end of a round exchange and commit it."""
        work, rounds = self._work, self.state.rounds
        try:
            work.state = self._strategy.train(work.state, self.replica, batch, self.world)
            work.under_way.append(batch.indices)
            work.made += batch.is_made
            loop.turn_over(batch)
            if batch.ends_round:
                self._stop = self._commits.commit(batch, loop)
        except Interrupted as stop:
            self._stop = stop
            return
        except NotFiniteError:
            where = f"in epoch {batch.epoch}, step {batch.step}"
            self._recovery.drop(f"weights or gradients are not finite {where}: try a smaller learning rate")
            loop.go_back(work.progress.rounds)
            return
        if self.replica.average is not None and work.state.rounds > rounds:
            with self.world.ledger.phase("optimizer"):
                self.replica.average.follow(work.state.rounds, batch.end)
        if batch.ends_round:
            loop.round_over()
            self._recovery.committed()
        self.world.timeline.step(batch.epoch, len(batch))
        # By a number that all have alike, also those who came in later or made a round again.
        if batch.ends_round and work.progress.rounds % RECONCILE_ROUNDS == 0:
            self.world.reconcile()
