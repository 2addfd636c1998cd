"""Loops over batches that do not take every batch: left by `break`, `return` or an exception, or with a turn
that made no step.

A rank whose loop does so goes to the end of the round with empty batches, and raises the flag that stops
exchanges (`World.irregular`). Then all tell each other how far they are. Where all did the same, that is what
one process does, and they go on from there; otherwise all raise OutOfStepError.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import World
from rankwise.data.partition import NOTHING
from rankwise.data.sampler import Batch, RoundSampler
from rankwise.errors import Interrupted, OutOfStepError
from rankwise.strategies.base import Strategy
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.training.snapshots import Work

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Word:
    """How far a rank is, as it tells the others when the flag is up.

    Its loop stands at `place`, was `left` there, and has come to batch `step` of the epoch, from 1. `turns`
    counts its batches of the round that are over, or of the epoch if ranks may be rounds apart, and `more`
    says whether there are others. Of the round it has `batches` that hold samples, and made no step with
    those `skipped`, {index: step}; `kept` samples of it are trained and stay so, and `total` of the epoch,
    which has `rounds_left` after this one.
    """

    asked_to_stop: bool
    epoch: int
    place: str
    left: str | None
    step: int
    turns: int
    more: bool
    batches: int
    skipped: dict[int, int]
    rounds_left: int
    kept: int
    total: int


class Loop:
    """One rank's loop over the batches of `epoch`, which stands at `place` in a user's code.

    `step` is the number of its batch, from 1, and `index` that in the round of the next one, from 0. `left`
    is the place where it was left; `ended` says that all ranks left it there, and the epoch with it, and
    `is_whole`, once ranks have heard from each other, that all made a step with each batch so far.
    """

    def __init__(
        self, epoch: int, place: str, work: Work, strategy: Strategy[Any], sampler: RoundSampler, world: World
    ) -> None:
        self.epoch = epoch
        self.place = place
        self.step = self.index = 0
        self.left: str | None = None
        self.ended = False
        self.is_whole = True
        self._work = work
        self._strategy = strategy
        self._sampler = sampler
        self._world = world
        self._turns: Counter[int] = Counter()  # that are over, by round
        self._skipped: dict[int, int] = {}  # of the round: the steps of those without one, by index
        self._more = False
        self._totals: NDArray[np.float64] | None = None

    @property
    def shares(self) -> NDArray[np.float64]:
        """Of the ranks [ranks] in the samples that are trained in the epoch."""
        if self._totals is None or not self._totals.any():
            return self._sampler.weights(self.epoch)
        return np.asarray(self._totals / self._totals.sum())

    def whereabouts(self) -> str:
        """How far this rank has come, as the end of a sentence."""
        return f", after the loop over batches at {self.left or self.place} in epoch {self.epoch}"

    def require_open(self, opened: Loop | None) -> None:
        """Raises OutOfStepError if this loop asks for a batch although it is not the one that is open."""
        if opened is not self:
            why = f"another one was begun at {self.left}" if self.left else "a step in it has failed"
            raise OutOfStepError(
                f"the loop over batches({self.epoch}) at {self.place} goes on, though {why}: take batches "
                "from one loop at a time, to its end"
            )

    def given(self, batch: Batch) -> Batch:
        """A batch as this rank trains it: without its samples once the loop was left, and where the run is to
        stop, so that it goes straight to where the others learn of it."""
        if self.left is None:
            goes_straight = self._strategy.stop is Stop.IN_ROUND
            if self._world.asked_to_stop and goes_straight and not self._strategy.recovery.syncs_every_step:
                return _emptied(batch)
            return batch
        if batch.is_made:
            self._more = True
            self._tell_at_exchange()
        return _emptied(batch)

    def left_out(self, batch: Batch) -> Batch:
        """A batch with which no step was made."""
        self._skipped[self.index] = self.step
        self._turns[self._work.progress.rounds] += 1
        if self._strategy.recovery.synchronous:
            self._tell_at_exchange()
        return _emptied(batch)

    def turn_over(self, batch: Batch) -> None:
        """A batch is trained, or left out."""
        self.index += 1
        if batch.is_made:
            self._turns[self._work.progress.rounds] += 1

    def round_over(self) -> None:
        """The next round begins, or this one again."""
        self.index = 0
        self._skipped.clear()

    def go_back(self, rounds: int) -> None:
        """The loop goes on after this many rounds."""
        self.ended = False
        self.round_over()
        for number in [number for number in self._turns if number >= rounds]:
            del self._turns[number]

    def hear(self, stop: Interrupted) -> NDArray[np.float64] | None:
        """Hear from all ranks why the flag is up; all together. Returns the ranks' shares [ranks] in what is
        trained of the round and kept; None if that is nothing.

        Raises `stop` if a rank is to stop, and OutOfStepError if they left or left out what others did not.
        """
        words: list[Word] = self._world.allgather_object(self._word())
        self.is_whole = not any(word.left or word.skipped for word in words)
        if any(word.asked_to_stop for word in words):
            raise stop
        self._world.irregular = False
        self.ended = require_alike(words, self._strategy.recovery)
        self._totals = np.array([word.total for word in words], np.float64)
        if not (self.ended or self._totals.any() or any(word.rounds_left for word in words)):
            raise OutOfStepError(
                f"no batch of epoch {self.epoch} was followed by step() in the loop at {self.place}: call "
                "the synchroniser's step() in place of the optimiser's"
            )
        kept = np.array([word.kept for word in words], np.float64)
        return kept / kept.sum() if kept.any() else None

    def _tell_at_exchange(self) -> None:
        if not self._strategy.ends_early and self._world.size > 1:
            raise OutOfStepError(
                f"rank {self._world.rank} made no step() with a batch in the loop over batches at "
                f"{self.left or self.place}, in epoch {self.epoch}, step {self.step}, of which this strategy "
                "cannot tell the other ranks: make a step with each batch, or take another strategy"
            )
        self._world.irregular = True

    def _word(self) -> Word:
        rounds = self._work.progress.rounds
        left = list(self._sampler.known(self.epoch, rounds))
        ends = next((index for index, batch in enumerate(left, start=1) if batch.ends_round), 0)
        drops = self._strategy.recovery is Recovery.DROP_ROUND
        kept = 0 if drops else sum(map(len, self._work.under_way))
        return Word(
            asked_to_stop=self._world.asked_to_stop,
            epoch=self.epoch,
            place=self.place,
            left=self.left,
            step=self.step,
            turns=self._turns[rounds] if self._strategy.recovery.synchronous else self._turns.total(),
            more=self._more or any(batch.is_made for batch in left[self.index :]),
            batches=sum(1 for batch in left[:ends] if batch.is_made),
            skipped=dict(self._skipped),
            rounds_left=left[0].rounds_left if left else 0,
            kept=kept,
            total=kept + sum(map(len, self._work.trained)),
        )


def _emptied(batch: Batch) -> Batch:
    return replace(batch, indices=NOTHING, share=0.0, lent=NOTHING)


def before_use(model: nn.Module, action: Callable[[], None]) -> None:
    """Do this before a model is called or saved the next time."""
    import torch

    def act(*_: object) -> None:
        for handle in handles:
            handle.remove()
        with torch.inference_mode(False):
            action()

    saved = model.register_state_dict_pre_hook(act)  # type: ignore[no-untyped-call]
    handles = [model.register_forward_pre_hook(act), saved]


def require_alike(words: Sequence[Word], recovery: Recovery) -> bool:
    """Whether all ranks left the epoch at the same step; those whose batches were over by then did, too.

    Raises OutOfStepError, on all ranks, if they left it at different steps or not all did, or if only some
    made no step where they make each together.
    """
    leavers = [rank for rank, word in enumerate(words) if word.left and word.more]
    if leavers:
        first = words[leavers[0]]
        for rank, word in enumerate(words):
            if (word.more and not word.left) or word.turns > first.turns:
                _refuse_leaving(words, leavers[0], rank)
            if word.more and word.turns < first.turns:
                _refuse_leaving(words, rank, leavers[0])
        return True
    if recovery in (Recovery.DROP_ROUND, Recovery.ROLL_BACK):
        whole = recovery is Recovery.DROP_ROUND
        skipped = {index for word in words for index in word.skipped}
        for word in words:
            made = set(range(word.batches)) if whole and skipped else skipped & set(range(word.batches))
            if made - word.skipped.keys():
                _refuse_skipping(words)
    return False


def _refuse_leaving(words: Sequence[Word], leaver: int, other: int) -> None:
    its, word = words[leaver], words[other]
    did = f"left it in step {word.step}" if word.left and word.more else "went on"
    raise OutOfStepError(
        f"rank {leaver} left the loop over batches at {its.left} in epoch {its.epoch}, step {its.step}, "
        f"while rank {other} {did}: leave it on all ranks in the same step"
    )


def _refuse_skipping(words: Sequence[Word]) -> None:
    rank = next(rank for rank, word in enumerate(words) if word.skipped)
    its = words[rank]
    index, step = next(iter(its.skipped.items()))
    made = [other for other, word in enumerate(words) if index < word.batches and index not in word.skipped]
    if made:
        why = f"while rank {made[0]} made one: leave it out on all ranks"
    else:
        why = "though it made one with others, whose gradients are summed with its: leave out all of them"
    raise OutOfStepError(
        f"rank {rank} made no step() with a batch of epoch {its.epoch}, step {step}, in the loop at "
        f"{its.place}, {why}"
    )
