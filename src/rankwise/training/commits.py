"""The exchanges that end a round or an epoch, and what they commit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.partition import NOTHING
from rankwise.data.sampler import Batch
from rankwise.errors import Interrupted
from rankwise.strategies.base import Flagged, Strategy, require_same_weights
from rankwise.strategies.recovery import Recovery
from rankwise.survival.fault_injection import NoFaults
from rankwise.training.leaving import Loop
from rankwise.training.recovery import NoRankRecovery
from rankwise.training.snapshots import Work

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


class Commits:
    """Moves a rank's work on at the end of a round and of an epoch; all ranks together.

    Where the flag of an exchange is up, it comes to nothing. If no rank is to stop, ranks have left their
    loops, or left batches out: they then do anew what there is to commit.
    """

    def __init__(
        self,
        work: Work,
        replica: Replica,
        strategy: Strategy[Any],
        world: World,
        recovery: NoRankRecovery,
        faults: NoFaults,
        *,
        compares_rates: bool,
    ) -> None:
        self._work = work
        self._replica = replica
        self._strategy = strategy
        self._world = world
        self._recovery = recovery
        self._faults = faults
        self._compares_rates = compares_rates

    def commit(self, batch: Batch, loop: Loop) -> Interrupted | None:
        """Exchange and commit the round that ends with this batch. Returns why the run is to stop after it;
        raises Interrupted if it is to stop in it."""
        try:
            self._exchange(batch)
        except Interrupted as flagged:
            try:
                shares = loop.hear(flagged)
            except Interrupted as stop:
                if not (isinstance(flagged, Flagged) and loop.is_whole):
                    raise
                self._complete(batch, flagged)
                return stop
            if shares is None:
                self._commit_nothing()
            else:
                self._exchange(replace(batch, weights=shares))
        return None

    def close(self, loop: Loop) -> None:
        """Close the epoch."""
        try:
            self._close(loop.shares)
        except Interrupted as stop:
            loop.hear(stop)
            self._close(loop.shares)
        self._work.progress = replace(self._work.progress, closed=True)

    def _exchange(self, batch: Batch) -> None:
        work, strategy = self._work, self._strategy
        with self._recovery.exchange(), self._faults.during("exchange"):
            prepared = strategy.prepare(work.state, self._replica, batch, self._world)
            work.state = strategy.commit(work.state, self._replica, prepared, self._world)
        work.commit()

    def _complete(self, batch: Batch, flagged: Flagged) -> None:
        """Commit the round although the flag was up, which is down meanwhile."""
        work, strategy, world = self._work, self._strategy, self._world
        asked, world.asked_to_stop = world.asked_to_stop, False
        try:
            with self._recovery.exchange(), self._faults.during("exchange"):
                prepared = strategy.complete(work.state, self._replica, batch, world, flagged)
                work.state = strategy.commit(work.state, self._replica, prepared, world)
        finally:
            world.asked_to_stop = world.asked_to_stop or asked
        work.commit()

    def _commit_nothing(self) -> None:
        """Of the round nothing is trained, or it is dropped: all ranks have the weights that they had."""
        work = self._work
        with self._recovery.exchange():
            if self._strategy.recovery is Recovery.DROP_ROUND:
                work.state = self._strategy.recover(work.state, self._replica, self._world)
            work.under_way = [NOTHING]
        work.left_out.add(work.progress.rounds)
        work.commit()

    def _close(self, weights: NDArray[np.float64]) -> None:
        """`weights` [ranks] are the shares of the ranks in what was trained."""
        work = self._work
        with self._recovery.exchange():
            work.state = self._strategy.close_epoch(work.state, self._replica, weights, self._world)
            if self._strategy.recovery.synchronous:
                epoch, rates = work.progress.epoch, self._compares_rates
                require_same_weights(self._replica, epoch, self._world, rates=rates)
                if self._recovery.survives:
                    self._world.confirm()  # what comes next is no part of the epoch: none goes back into it
