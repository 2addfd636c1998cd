"""Where a user's loop is, for a rank that comes in for a lost one, and for a run that goes on there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rankwise.errors import ConfigError
from rankwise.training.history import SampleCounts
from rankwise.training.loader import Draw
from rankwise.training.metrics import Sums

Stage = Literal["body", "closing", "between"]
"""Of an epoch: its loop body, what all ranks do when that is over, and what comes before the next one."""


@dataclass(frozen=True)
class Place:
    """What a rank cannot know of a loop that it has not gone through: it comes in later, or the run goes on.

    `epoch` counts from 1, 0 before the first. Of the `passes_over` in it, or in a later stage since, which
    made `turns`, `counts` has the samples; all ranks left the last one if it `ended_early`. All go on in the
    pass under way if it `is_open`, else from where they are, which is behind as many `means` of the loop's
    own; or `again` from behind those passes. `draws` of each loader are those before the pass under way,
    which has the samples `drawn`, and where all go on there are `gradients`. `kind` says in words which pass
    that is, and nothing of one that no run could go on with. The rank has logged `sums`, and the epoch's
    passes took it `seconds`. `history` is for the observer.
    """

    epoch: int
    stage: Stage
    passes_over: int
    turns: int
    is_open: bool
    again: bool
    means: int
    counts: Mapping[int, SampleCounts]
    ended_early: bool
    draws: Sequence[int]
    drawn: Draw
    gradients: Sequence[Tensor | None]
    kind: str
    sums: Sums
    seconds: float = 0.0
    history: Any = None

    @property
    def epochs_over(self) -> int:
        """Epochs that are written down."""
        return self.epoch - (self.stage != "between")


class Arrival:
    """The way of a rank through a loop to a place where all go on: of a newcomer through its program from the
    beginning, and of the others through an epoch once more. What was done together by then is not done, and
    what the program does to models and optimisers on the way, or logs, counts for nothing: `restore` is
    called at the end."""

    def __init__(self, place: Place | None = None, restore: Callable[[], None] | None = None) -> None:
        self._place = place
        self._restore = restore or _nothing
        self._means_left = place.means if place else 0

    @property
    def under_way(self) -> bool:
        """Whether this rank is not there yet."""
        return self._place is not None

    def comes_behind(self, epoch: int, passes: int) -> None:
        """In this epoch so many passes are gone through."""
        place = self._place
        if place is not None and place.again and (epoch, passes) == (place.epoch, place.passes_over):
            self._arrive()

    def skips_mean(self, epoch: int, passes: int) -> bool:
        """Whether the others have taken the mean that is next, in this epoch behind these passes."""
        place = self._place
        if place is None:
            return False
        is_behind = not place.is_open and place.stage != "closing"
        if is_behind and (epoch, passes) == (place.epoch, place.passes_over):
            if not self._means_left:
                self._arrive()
                return False
            self._means_left -= 1
        return True

    def enters_pass(self, kind: str) -> bool:
        """A pass begins that is not over; returns whether the others are in it, or the run goes on in it.
        Raises ConfigError if that is another one."""
        there = self._place is not None and self._place.is_open
        if there:
            self._require_same(f"is to {kind}", kind)
        self._arrive()
        return there

    def ends_epoch(self) -> bool:
        """The loop body of an epoch is over; returns whether the others have found that together. Raises
        ConfigError if they are in a pass that this rank has not begun."""
        if self._place is not None and self._place.is_open:
            self._require_same("ends the epoch", "")
        there = self._place is not None and self._place.stage == "closing"
        self._arrive()
        return there

    def _require_same(self, does: str, kind: str) -> None:
        assert self._place is not None
        if self._place.kind != kind:
            raise ConfigError(
                f"the run goes on in epoch {self._place.epoch} where it was to {self._place.kind}, and the "
                f"program {does}: leave its loops, data and batches as they were"
            )

    def _arrive(self) -> None:
        if self._place is not None:
            self._restore()
        self._place, self._restore = None, _nothing


def _nothing() -> None:
    """There is nothing to restore."""
