"""A user's loop as far as it is written down: the `Job` of a `Run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.runs.checkpoint import Checkpoint
from rankwise.training.job import Job, Taken
from rankwise.training.kept_place import arrays_of, notes_of, place_in
from rankwise.training.turns import Turns


@dataclass
class LoopJob(Job):
    """What a user's loop trains with; all ranks train."""

    turns: Turns

    @property
    def notes(self) -> dict[str, Any]:
        """How many passes are over, how many epochs' samples each loader has drawn for them, and where its
        stream goes on."""
        loaders = self.turns.loaders
        draws, places = [its.draws_so_far for its in loaders], [its.place_so_far for its in loaders]
        return {"passes": self.turns.passes, "draws": draws, "places": places}

    @property
    def steps_before(self) -> int:
        return self.turns.around.turns_over

    def take(self, elapsed_s: float) -> Taken | None:
        world = self.turns.world
        if not all(world.allgather_object(self.turns.is_a_place)):  # one may have left its loop
            return None
        place = self.turns.place
        notes = notes_of(place, {"elapsed": elapsed_s})
        inside = self.synchroniser.inside
        taken, of_all = inside.take(self.how, notes, arrays_of(place, world.rank))
        before = sum(its.trained for its in place.counts.values())
        return taken, {**of_all, "trained": of_all["trained"] + before}

    def resume(self, start: Checkpoint) -> None:
        self.turns.passes = int(start.notes.get("passes", 0))

    def resume_inside(
        self, start: Checkpoint, found: Sequence[Mapping[str, Any]], draw_on: Callable[[], None]
    ) -> None:
        self.turns.come_in(place_in(start, self.turns.world.rank, found), draw_on)

    def close(self) -> None:
        """End what its loaders have started."""
        for loader in self.turns.loaders:
            loader.close()
