"""How far a rank is, and what it keeps of itself to go back to: its state, and copies of its replica."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from rankwise.data.partition import Indices
from rankwise.ledger.phases import Ledger
from rankwise.strategies.base import State

if TYPE_CHECKING:
    from rankwise.models.replica import Replica
    from rankwise.models.snapshot import Snapshot


@dataclass(frozen=True, order=True)
class Progress:
    """How far a run is: rounds of an epoch that are committed, and whether the epoch is closed."""

    epoch: int = 0
    rounds: int = 0
    closed: bool = True


@dataclass
class Work:
    """How far this rank is, and what it has trained of the epoch. A step moves it on, a recovery back.

    `trained` holds the samples of each committed round, `under_way` those of the batches since; the rounds
    `left_out` were committed without any, as all loops had been left. `ahead` counts samples of committed
    rounds that others have not come to: they belong to the round under way, of which `made` batches were made
    since it was cut.
    """

    state: State
    progress: Progress = Progress()
    trained: list[Indices] = field(default_factory=list)
    under_way: list[Indices] = field(default_factory=list)
    left_out: set[int] = field(default_factory=set)
    ahead: int = 0
    made: int = 0

    def open_epoch(self, epoch: int) -> None:
        """An epoch begins, of which nothing is trained yet."""
        self.progress = Progress(epoch, closed=False)
        self.trained.clear()
        self.left_out.clear()

    def commit(self) -> None:
        """The round under way is committed, with what this rank had committed ahead of the others."""
        rounds = self.progress.rounds
        self.progress = replace(self.progress, rounds=rounds + 1)
        self.trained[rounds:] = [np.concatenate([*self.trained[rounds:], *self.under_way])]
        self.under_way = []
        self.ahead = self.made = 0

    def go_back(self, state: State, progress: Progress) -> None:
        """The last commit is taken back: what it brought in is under way again."""
        if progress.rounds < self.progress.rounds:
            self.under_way = [self.trained.pop()]
            self.left_out.discard(progress.rounds)
        self.state, self.progress = state, progress


@dataclass(frozen=True)
class _Step:
    """What a rank was when an exchange began."""

    state: State
    replica: Snapshot | None  # None where only commits are gone back to
    progress: Progress


class Snapshots:
    """Copies of one rank's replica, all in memory that is used again.

    The copy from before each exchange is kept until all ranks must have come through it. With `begins_again`
    the one from the beginning of the round is kept too, and with `keeps_commits` those of the last two
    commits, from which a rank that comes in begins, or all of them. Without `undoes_exchanges` there is no
    copy from before an exchange.
    """

    def __init__(
        self,
        replica: Replica,
        ledger: Ledger,
        *,
        begins_again: bool,
        keeps_commits: bool,
        undoes_exchanges: bool = True,
    ) -> None:
        self._replica = replica
        self._ledger = ledger
        self._begins_again = begins_again
        self._keeps_commits = keeps_commits
        self._undoes_exchanges = undoes_exchanges
        self._steps: list[_Step] = []
        self._free: Snapshot | None = None
        self._start: Snapshot | None = None
        self._own: Snapshot | None = None  # memory for a start that is no commit
        self._commits: list[tuple[Progress, Snapshot]] = []

    def exchange_begins(self, state: State, progress: Progress) -> None:
        """An exchange begins, which may have to be taken back."""
        if not self._undoes_exchanges:
            self._steps.append(_Step(state, None, progress))
            return
        with self._ledger.phase("recovery"):
            copy, self._free = self._replica.snapshot(self._free), None
            self._steps.append(_Step(state, copy, progress))

    def exchange_is_off(self) -> None:
        """The exchange that began last is not made."""
        self._steps = self._steps[:-1]

    def all_came(self) -> None:
        """All ranks have come through the exchange before the last one: no rank goes back behind it."""
        if len(self._steps) > 1:
            self._free = self._steps[0].replica
            self._steps = self._steps[-1:]

    def undo(self) -> tuple[State, Progress]:
        """Make the replica what it was before the last exchange that is kept, or at the commit before it;
        returns state and progress.

        Raises RuntimeError if there is none.
        """
        if not self._steps:
            raise RuntimeError("there is no step to undo")
        step = self._steps.pop()
        (step.replica or self.commit_at(step.progress)).restore()
        return step.state, step.progress

    def reached(self) -> list[tuple[Progress, int]]:
        """Where `undo` can go back to, the last commit at the end, with the samples pending there."""
        return [(step.progress, step.state.pending) for step in self._steps]

    def forget_steps(self) -> None:
        """All ranks have agreed from where they go on."""
        self._steps.clear()

    def round_begins(self, committed: Progress | None) -> None:
        """Keep the replica as `begin_again` makes it again; if all ranks have committed it, at this progress,
        a rank that comes in begins with it."""
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
