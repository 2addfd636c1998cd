"""What a user's loop does around its passes, and goes through again where a rank was lost in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from rankwise.errors import RankLost
from rankwise.models.loop_replica import LoopReplica
from rankwise.models.snapshot import Snapshot
from rankwise.training.agreement import require_same_place
from rankwise.training.metrics import Metrics
from rankwise.training.place import Arrival, Place, Stage
from rankwise.training.synchroniser import Synchroniser

T = TypeVar("T")


class Around:
    """Where a loop is outside of its passes: in which `stage` of which `epoch` (of `epochs`, both 0 before
    the first), behind how many turns of it (`turns_over`), and since then how many `means` of its own.

    In the body of an epoch an exchange of the loop's own may fail on one rank and succeed on another. All
    then go to the end of the body, where they meet, and through it `again`, from where the last pass ended:
    what stands in front of that is not done twice (see `Arrival`). In other stages an exchange is made again
    at once.
    """

    def __init__(self, synchroniser: Synchroniser, replica: LoopReplica, metrics: Metrics) -> None:
        self._synchroniser = synchroniser
        self._world = synchroniser.world
        self._replica = replica
        self._metrics = metrics
        self.epoch = self.epochs = 0
        self.stage: Stage = "between"
        self.turns_over = self.means = 0
        self.is_lost = self.again = False
        self.arrival = Arrival()
        self.gradients: list[Tensor | None] = []
        self._end: Snapshot | None = None

    def begin_epoch(self, epoch: int, epochs: int) -> None:
        """An epoch begins, from 1, of this number."""
        self.epoch, self.epochs = epoch, epochs
        self.stage = "body"
        self._metrics.begin_epoch()
        self.passes_end(0)

    def end_epoch(self) -> None:
        """The epoch is written down, or its loop was left."""
        self.stage = "between"
        self.means = 0

    def pass_begins(self, meet: Callable[[], T]) -> T | None:
        """What all ranks do together before a pass. Returns None if it is not to begin, as a rank was lost
        since means that came behind the last one, of which some may have failed."""
        if self.stage != "body" or not (self.means and self._synchroniser.survives):
            return self._synchroniser.retry_until_all(meet)
        try:
            found = meet()
            self._world.confirm()
        except RankLost:
            self.is_lost = True
            return None
        return found

    def passes_end(self, turns: int) -> None:
        """A pass is over, the epoch has made so many turns: what comes next may be gone through again."""
        self.turns_over, self.means = turns, 0
        self._metrics.begin(turns + 0.5)
        if self._synchroniser.survives:
            self._end = self._replica.snapshot(self._end)
            self.gradients = self._replica.gradients()

    def mean(self, action: Callable[[], float], *, otherwise: float) -> float:
        """A mean of the loop's own; all ranks together. Returns what the action does; `otherwise` where it is
        gone through again. Raises OutOfStepError if other ranks are elsewhere."""

        def together() -> float:
            require_same_place(self._world, "take a mean")
            return action()

        if self.is_lost:
            return otherwise
        if self.stage != "body":
            result = self._synchroniser.retry_until_all(together)
        else:
            try:
                result = together()
            except RankLost:
                self.is_lost = True
                return otherwise
        self.means += 1
        return result

    def all_came(self, place: Callable[[], Place]) -> bool:
        """Whether all ranks have come to the end of the body of an epoch; if not, all that are left go
        through it again from `place`."""
        if self.arrival.ends_epoch():
            return True
        try:
            if self.is_lost:
                raise RankLost("a rank was lost")
            require_same_place(self._world, "end an epoch")
            if self._synchroniser.survives:
                self._world.confirm()
        except RankLost:
            self.is_lost, self.again = False, True
            self.means = 0
            if self._end is not None:
                self._end.restore()  # which a newcomer gets
            self._synchroniser.recover()
            self.arrival = Arrival(place(), self._go_behind)
            self.again = False
            return False
        self.stage = "closing"
        return True

    def come_in(self, place: Place, draw_on: Callable[[], None]) -> None:
        """Be on the way to where the others are, or where the run was stopped. `draw_on` brings the
        generators of random numbers there."""
        self.epoch, self.stage = place.epoch, place.stage
        self.turns_over, self.means = place.turns, place.means
        self._metrics.go_on(place.turns, place.sums)
        as_sent = self._replica.snapshot()

        def restore() -> None:
            as_sent.restore()
            self._replica.set_gradients(place.gradients)
            draw_on()

        self.arrival = Arrival(place, restore)

    def _go_behind(self) -> None:
        """All is as it was when the last pass ended."""
        assert self._end is not None
        self._end.restore()
        self._replica.set_gradients(self.gradients)
        self._metrics.begin(self.turns_over + 0.5)
