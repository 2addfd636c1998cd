"""What a rank keeps of itself to go back to: how far it was, its state, and copies of its replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.ledger.phases import Ledger
from rankwise.strategies.base import State

if TYPE_CHECKING:
    from rankwise.models.replica import Replica, Snapshot


@dataclass(frozen=True, order=True)
class Progress:
    """How far a run is: rounds of an epoch that are committed, and whether the epoch is closed."""

    epoch: int = 0
    rounds: int = 0
    closed: bool = True


@dataclass(frozen=True)
class _Step:
    """What a rank was when an exchange began."""

    state: State
    replica: Snapshot
    progress: Progress


class Snapshots:
    """Copies of one rank's replica, all in memory that is used again.

    With `undoes` that from before each exchange is kept, until all ranks must have come through it. With
    `begins_again` that from the beginning of the round, and with `keeps_commits` too those of the last two
    commits, from which a rank that comes in would begin, or all of them.
    """

    def __init__(
        self, replica: Replica, ledger: Ledger, *, undoes: bool, begins_again: bool, keeps_commits: bool
    ) -> None:
        self._replica = replica
        self._ledger = ledger
        self._undoes = undoes
        self._begins_again = begins_again
        self._keeps_commits = keeps_commits
        self._steps: list[_Step] = []
        self._free: Snapshot | None = None
        self._start: Snapshot | None = None
        self._own: Snapshot | None = None  # memory for a start that is no commit
        self._commits: list[tuple[Progress, Snapshot]] = []

    def exchange_begins(self, state: State, progress: Progress) -> None:
        """An exchange begins, which one day may have to be taken back."""
        if self._undoes:
            with self._ledger.phase("recovery"):
                copy, self._free = self._replica.snapshot(self._free), None
                self._steps.append(_Step(state, copy, progress))

    def exchange_is_off(self) -> None:
        """The exchange that began last is not made."""
        self._steps = self._steps[:-1]

    def all_came(self) -> None:
        """All ranks have come through the exchange before the last one: nobody goes back behind it."""
        if len(self._steps) > 1:
            self._free = self._steps[0].replica
            self._steps = self._steps[-1:]

    def undo(self) -> tuple[State, Progress]:
        """Make the replica what it was before the last exchange that is kept; returns state and progress.

        Raises RuntimeError if there is none.
        """
        if not self._steps:
            raise RuntimeError("there is no step to undo")
        step = self._steps.pop()
        step.replica.restore()
        return step.state, step.progress

    def reached(self) -> list[tuple[Progress, int]]:
        """The positions to which `undo` goes back, the last at the end, with the samples pending there."""
        return [(step.progress, step.state.pending) for step in self._steps]

    def forget_steps(self) -> None:
        """All ranks have agreed from where they go on."""
        self._steps.clear()

    def round_begins(self, committed: Progress | None) -> None:
        """What is now is what `begin_again` makes again, and if all have committed it, at this progress, what
        a rank that comes in would begin with."""
        if not self._begins_again:
            return
        with self._ledger.phase("recovery"):
            if self._keeps_commits and committed is not None:
                reuse = self._commits.pop(0)[1] if len(self._commits) > 1 else None
                self._start = self._replica.snapshot(reuse)
                self._commits.append((committed, self._start))
            else:
                self._start = self._own = self._replica.snapshot(self._own)

    def begin_again(self) -> None:
        """Make the replica what it was when the round began; where that is not kept, it still is."""
        if self._start is not None:
            self._start.restore()

    def commit_at(self, progress: Progress) -> Snapshot:
        """The replica as it was committed at this progress; as it is now if it still is that."""
        return dict(self._commits).get(progress) or self._replica.snapshot()
