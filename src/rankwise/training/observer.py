"""What a run reports while it goes on, to one object that its constructor takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from rankwise.training.snapshots import Progress


@dataclass(frozen=True)
class Recovered:
    """The ranks that are left go on without those in `lost`, and with those in `new` in their places.

    Ranks are named by the numbers with which they began. `progress` is the point from which all go on, and
    `seconds` is the time from finding the loss until then. Before that this rank had waited for `waited_s`,
    and worked for `undone_s` since the last commit, which it `drops` and does again.
    """

    lost: list[int]
    new: list[int]
    seconds: float
    progress: Progress
    waited_s: float = 0.0
    undone_s: float = 0.0
    drops: bool = False


class Observer(Protocol):
    """Gets reports of what happens to a run, on each of its ranks."""

    @property
    def history(self) -> Any:
        """What the observer of a rank that comes in begins with; picklable."""

    def recovered(self, event: Recovered) -> None:
        """Ranks were lost, and the others go on."""

    def committed(self, seconds: float) -> None:
        """After a recovery the next round is committed, `seconds` after the loss was found."""


class NoObserver:
    """Ignores all reports."""

    history = None

    def recovered(self, event: Recovered) -> None:
        """Nothing."""

    def committed(self, seconds: float) -> None:
        """Nothing."""
