"""What one rank trains with, as far as it is written down, whosever loop trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint, Place
from rankwise.runs.record import Role
from rankwise.training.inside import How
from rankwise.training.synchroniser import Synchroniser

HOW = ("strategy", "topology", "sync_every", "local_after", "optimizer_state", "compress", "on_shrink")
"""The options by which ranks keep in step: with others an epoch is not cut in the same way."""

Taken = tuple[Place, dict[str, Any]]
"""A rank's place inside an epoch, and what all ranks note alike."""

Take = Callable[[], Taken | None]
"""Takes it, if a run could go on from there."""


@dataclass
class Job(ABC):
    """What a book asks of it: by which plan it trains, what keeps it in step, and what is its own."""

    config: RunPlan
    synchroniser: Synchroniser

    @property
    def worker(self) -> int | None:
        """This rank's number among the workers, None for a master. It changes when ranks are lost."""
        worker = self.synchroniser.world.rank - self.first_worker
        return worker if worker >= 0 else None

    @property
    def first_worker(self) -> int:
        """The lowest rank that trains; a master that is alone does."""
        return int(self.config.has_master and self.synchroniser.world.size > 1)

    @property
    def role(self) -> Role:
        """What this rank is in the record."""
        return "master" if self.worker is None else "worker"

    @property
    def how(self) -> How:
        """The options by which ranks keep in step."""
        return {name: getattr(self.config, name) for name in HOW}

    @property
    def steps_before(self) -> int:
        """Of the epoch, in passes over samples that are over."""
        return 0

    @property
    @abstractmethod
    def notes(self) -> dict[str, Any]:
        """What a checkpoint is to know besides."""

    @abstractmethod
    def take(self, elapsed_s: float) -> Taken | None:
        """This rank's place in the epoch, that began so many seconds ago, if a run could go on from there;
        all ranks together."""

    @abstractmethod
    def resume(self, start: Checkpoint) -> None:
        """The run is to go on from there. Raises ResumeError if the checkpoint does not fit."""

    @abstractmethod
    def resume_inside(
        self, start: Checkpoint, found: Sequence[Mapping[str, Any]], draw_on: Callable[[], None]
    ) -> None:
        """It goes on inside an epoch, with what was `found` of the ranks' own. `draw_on` brings the
        generators of random numbers there."""

    def close(self) -> None:
        """End what was started for it."""
        return
