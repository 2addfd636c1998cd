"""Where a loop of a user's own is written down, if anywhere."""

from __future__ import annotations

from collections.abc import Sequence

from rankwise.errors import Interrupted
from rankwise.models.loop_replica import LoopReplica
from rankwise.survival.fault_injection import NoFaults
from rankwise.training.admission import JoinState
from rankwise.training.observer import NoObserver, Observer
from rankwise.training.place import Place
from rankwise.training.turns import Turns


class Book:
    """Where a run is written down: nowhere.

    Of a run that goes on `epochs_over` were trained before, and `passes_over` of the next one, and `draws` of
    epochs' samples made by each of its loaders, whose streams go on at `places`; `epochs_asked` are to be
    trained in all, None if the loop says how many. A rank that comes in for a lost one has a `join_state`.
    """

    epochs_over = passes_over = 0
    epochs_asked: int | None = None
    draws: Sequence[int] = ()
    places: Sequence[Sequence[int] | None] = ()
    observer: Observer = NoObserver()

    def __init__(self, join_state: JoinState | None = None) -> None:
        self.join_state = join_state
        if join_state is not None:
            self.go_on_at(join_state.history)

    def go_on_at(self, place: Place) -> None:
        """The loop goes on there."""
        self.epochs_over, self.passes_over = place.epochs_over, place.passes_over
        self.draws = place.draws

    def faults(self, replica: LoopReplica) -> NoFaults:
        """What is to strike this rank."""
        return NoFaults()

    def begin(self, turns: Turns) -> None:
        """The first turn is next."""

    def epochs_come(self, epochs: int) -> None:
        """There will be this number of epochs in all."""

    def begin_epoch(self, epoch: int) -> None:
        """An epoch begins."""

    def epoch_over(self, epoch: int, metrics: dict[str, float], *, last: bool) -> bool:
        """An epoch is over; all ranks together. Returns whether it is the last."""
        return last

    def interrupted(self) -> Interrupted:
        """All ranks stop here, together. Returns what tells the user."""
        return Interrupted("the run was asked to stop")
