"""Where a run is written down, if anywhere, whosever loop trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankwise.errors import Interrupted
from rankwise.runs.progress import NoProgress
from rankwise.survival.fault_injection import NoFaults
from rankwise.training.admission import JoinState
from rankwise.training.history import SampleCounts
from rankwise.training.job import Job
from rankwise.training.observer import NoObserver, Observer
from rankwise.training.place import Place

if TYPE_CHECKING:
    from rankwise.models.replica import Replica


class Book:
    """Where a run is written down: nowhere.

    Of a run that goes on `epochs_over` were trained before, and `is_at_target` says that it need not train.
    Of a user's loop, `passes_over` of the next epoch were made, and `draws` of epochs' samples by each of its
    loaders, whose streams go on at `places`; `epochs_asked` are to be trained in all, None if the loop says
    how many. A rank that comes in for a lost one has a `join_state`.
    """

    epochs_over = passes_over = 0
    epochs_asked: int | None = None
    draws: Sequence[int] = ()
    places: Sequence[Sequence[int] | None] = ()
    observer: Observer = NoObserver()
    progress = NoProgress()

    def __init__(self, join_state: JoinState | None = None) -> None:
        self.join_state = join_state
        if join_state is not None and isinstance(join_state.history, Place):
            self.go_on_at(join_state.history)

    @property
    def is_at_target(self) -> bool:
        """Whether the epochs that are over have reached the accuracy with which the run ends."""
        return False

    def go_on_at(self, place: Place) -> None:
        """A user's loop goes on there."""
        self.epochs_over, self.passes_over = place.epochs_over, place.passes_over
        self.draws = place.draws

    def faults(self, replica: Replica) -> NoFaults:
        """What is to strike this rank."""
        return NoFaults()

    def begin(self, job: Job) -> None:
        """The first step is next."""

    def settle(self, **options: Any) -> None:
        """The program has said more of the plan."""

    def begin_epoch(self, epoch: int) -> None:
        """An epoch begins, or goes on where the run was."""

    def epoch_over(
        self,
        epoch: int,
        found: Mapping[str, Any],
        counts: SampleCounts,
        seconds: float,
        *,
        last: bool,
        evaluation_s: float | None = None,
    ) -> bool:
        """An epoch is over that was trained for so many seconds, of which this was found, by the names of the
        record; all ranks together. Unless `evaluation_s` is given, the rest of the epoch was evaluation.
        Returns whether it is the last."""
        return last

    def interrupted(self) -> Interrupted:
        """All ranks stop here, together. Returns what tells the user."""
        return Interrupted("the run was asked to stop")
