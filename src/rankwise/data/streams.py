"""Turns of a stream, of which is known what was read."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Protocol

import numpy as np

from rankwise.data.partition import NOTHING, Indices, join
from rankwise.data.sampler import Batch
from rankwise.data.turns import TurnRound, TurnSampler, shares

WHOLE_STREAM = (
    "run.loader deals its samples, so give all ranks the whole of it in the same order: no split by rank, "
    "and a seed for what is random"
)
"""What to do if ranks have read different streams."""


@dataclass(frozen=True)
class Dealing:
    """How the samples of a turn are dealt to this `rank` and others, whose batches have `sizes` [ranks]. In a
    shorter turn no rank has fewer than `least`, as long as there are as many."""

    rank: int
    sizes: tuple[int, ...]
    least: int = 1

    @property
    def turn(self) -> int:
        """Samples in a turn."""
        return sum(self.sizes)

    def parts(self, samples: int) -> list[slice]:
        """Where the part of each rank stands in a turn of this length."""
        sizes = shares(samples, self.sizes, self.least)
        return [slice(start, stop) for start, stop in pairwise([0, *np.cumsum(sizes).tolist()])]

    def mine(self, samples: int) -> slice:
        """Where the part of this rank stands, or that of the first, which it is lent if it has none."""
        parts = self.parts(samples)
        mine = parts[self.rank]
        return mine if mine.stop > mine.start else parts[0]


class TurnSource(Protocol):
    """What reads a stream for a sampler, the same on each rank. A sample has the same number whenever and by
    whomever it is read."""

    @property
    def mark(self) -> int:
        """A hash of what was read of the pass."""

    @property
    def is_left(self) -> bool:
        """Whether this rank reads no more: its loop was left, or is to stop."""

    def begin(self, dealing: Dealing, without: Indices) -> None:
        """Read from the beginning, without some samples, and deal what comes."""

    def read(self, *, begins_round: bool) -> Indices | None:
        """The samples of the next turn, none of them if this rank reads no more; None if the stream is over.
        Where a round begins ranks may compare what they have read: if none reads on it is over, and if one is
        to stop none has samples."""


class OpenRound(TurnRound):
    """A round to which turns are added as they are read."""

    def __init__(self, kept: tuple[Indices, ...], over: int = 0) -> None:
        super().__init__(kept, [], over)
        self.__dict__["sizes"] = np.array([len(its) for its in kept], np.float64)

    def add(self, turn: tuple[Indices, ...]) -> None:
        """One more was read."""
        assert isinstance(self.turns, list)
        self.turns.append(turn)
        self.__dict__["sizes"] = self.sizes + [len(its) for its in turn]


class StreamSampler(TurnSampler):
    """A TurnSampler that also deals streams, turn by turn as all ranks read them.

    A turn of a stream is what one process with the batches of all ranks would read. When ranks are lost, the
    others read the stream again, past what was trained, and deal the rest of it by themselves.
    """

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        sync_every: Callable[[int], int | None],
        keeps_global_batch: bool = False,
    ) -> None:
        super().__init__(rank=rank, ranks=ranks, sync_every=sync_every, keeps_global_batch=keeps_global_batch)
        self._source: TurnSource | None = None
        self._every: int | None = 1
        self._most: int | None = None
        self._gone = NOTHING  # what lost ranks had of rounds that are over
        self._is_fresh = True
        self._is_over = False

    def begin(
        self,
        epoch: int,
        samples: int,
        *,
        batch_size: int,
        least: int = 1,
        drops_last: bool = False,
        batches: Indices | None = None,
    ) -> None:
        self._source = None
        super().begin(
            epoch, samples, batch_size=batch_size, least=least, drops_last=drops_last, batches=batches
        )

    def begin_stream(
        self, epoch: int, source: TurnSource, *, batch_size: int, least: int = 1, most: int | None = None
    ) -> None:
        """An epoch begins, in which a stream is read to its end, or until there were `most` turns."""
        self._source = source
        self._usual_batch, self._least, self._ends = batch_size, least, None
        self._batch_sizes = self._sizes(batch_size)
        self._every, self._most = self._sync_every(epoch), most
        self._planned = (epoch, [])
        self._credited = (epoch, NOTHING)
        self._gone = NOTHING
        self._is_fresh, self._is_over = True, False
        source.begin(self._dealing, NOTHING)

    @property
    def _dealing(self) -> Dealing:
        return Dealing(self._rank, self._batch_sizes, self._least)

    def is_over(self, epoch: int, rounds: int) -> bool:
        return super().is_over(epoch, rounds) and (self._source is None or self._is_over)

    def expected(self, epoch: int) -> Indices:
        if self._source is None:
            return super().expected(epoch)
        parts = (its.part(rank) for its in self.rounds(epoch) for rank in range(self.workers))
        return np.bincount(join([self.credited(epoch), *parts]))

    def batches(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        if self._source is None:
            return super().batches(epoch, first_round)
        return self._read_on(self._source, epoch, first_round)

    def known(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        if self._source is None:
            return super().known(epoch, first_round)
        return self._known(epoch, first_round)

    def _known(self, epoch: int, first: int) -> Iterator[Batch]:
        rounds = self.rounds(epoch)
        step = sum(its.steps for its in rounds[:first])
        for number, its in enumerate(rounds[first:], start=first):
            turns = max(len(its.turns), 1)
            for turn in range(turns):
                yield self._batch(epoch, number, turn, step + its.over + turn + 1, ends=turn == turns - 1)
            step += its.over + turns

    def _read_on(self, source: TurnSource, epoch: int, first: int) -> Iterator[Batch]:
        """The batches from a round on, read as they are asked for; past what is over, if not for the first
        time."""
        if not (self._is_fresh or source.is_left):
            self._begin_again(source, epoch, first)
        self._is_fresh = self._is_over = False
        rounds = self._planned[1]
        step = sum(its.steps for its in rounds[:first])
        for number in count(first):
            step += rounds[number].over if number < len(rounds) else 0
            for turn in count():
                if number == len(rounds) or turn == len(rounds[number].turns):  # it begins the round
                    samples = None if step == self._most else source.read(begins_round=True)
                    self._is_over = samples is None
                    if samples is None and number < len(rounds):  # what is kept is all of the round
                        yield self._batch(epoch, number, turn, step + 1, ends=True)
                    if samples is None:
                        return
                    self._add(number, samples)
                    if not len(samples):
                        yield self._left(epoch, step + 1, is_made=source.is_left)
                        break
                step += 1
                ends = self._ends_with(source, number, turn, step)
                yield self._batch(epoch, number, turn, step, ends=ends)
                if ends:
                    break

    def _ends_with(self, source: TurnSource, number: int, turn: int, step: int) -> bool:
        """Whether a round ends with a turn; reads the next one if that is not known otherwise."""
        its = self._planned[1][number]
        if turn + 1 < len(its.turns):
            return False
        if step == self._most or (self._every and its.over + turn + 1 >= self._every):
            return True
        samples = source.read(begins_round=False)
        if samples is None or not len(samples):
            return True
        self._add(number, samples)
        return False

    def _add(self, number: int, samples: Indices) -> None:
        rounds = self._planned[1]
        if number == len(rounds):
            rounds.append(OpenRound((NOTHING,) * self.workers))
        its = rounds[number]
        assert isinstance(its, OpenRound)
        if len(samples):
            its.add(tuple(samples[its] for its in self._dealing.parts(len(samples))))

    def _batch(self, epoch: int, number: int, turn: int, step: int, *, ends: bool) -> Batch:
        its = self._planned[1][number]
        parts = its.turns[turn] if turn < len(its.turns) else (NOTHING,) * self.workers
        sizes = its.sizes
        indices, total = parts[self._rank], sizes.sum()
        return Batch(
            epoch=epoch,
            indices=indices,
            ends_round=ends,
            weights=sizes / total if total else np.full(self.workers, 1 / self.workers),
            share=len(indices) / max(total, 1),
            position=epoch - 1.0,  # nobody knows how much there is
            end=epoch - 1.0,
            rounds_left=1,
            step=step,
            lent=NOTHING if len(indices) else next(filter(len, parts), NOTHING),
            content=self._source.mark if self._source else 0,
        )

    def _left(self, epoch: int, step: int, *, is_made: bool) -> Batch:
        """In place of a turn that is not read: a round of its own, which nobody trains."""
        weights = np.full(self.workers, 1 / self.workers)
        return Batch(
            epoch, np.array([-1] * is_made, np.int64), True, weights, 0.0, epoch - 1.0, epoch - 1.0, 1, step
        )

    def _begin_again(self, source: TurnSource, epoch: int, first: int) -> None:
        rounds = self.rounds(epoch)
        if first < len(rounds):
            rounds[first:] = [OpenRound(rounds[first].kept, rounds[first].over)]
            if not rounds[first].sizes.any():
                del rounds[first]
        over = [its.part(rank) for its in rounds for rank in range(self.workers)]
        source.begin(self._dealing, join([self._gone, *over]))

    def redistribute(
        self,
        epoch: int,
        number: int,
        before: Sequence[int | None],
        done: Sequence[int],
        ahead: Sequence[int] | None = None,
        *,
        left_out: Collection[int] = (),
    ) -> None:
        if self._source is None or not self.is_planned(epoch):
            super().redistribute(epoch, number, before, done, ahead, left_out=left_out)
            return
        rounds = self.rounds(epoch)
        kept, turns = [], 0
        for old, samples, more in zip(before, done, ahead or [0] * len(before), strict=True):
            its, needed = self._first(self._source, number, old, samples, more)
            kept.append(its)
            turns = max(turns, needed)
        credited = self._credited_with(epoch, rounds[:number], before, left_out)
        lost = self._lost(before)
        self._gone = join([self._gone, *(its.part(rank) for its in rounds[:number] for rank in lost)])
        self._go_on_as(before)
        plan = [its.only(before) for its in rounds[:number]]
        if any(map(len, kept)):
            plan.append(OpenRound(tuple(kept), turns))
        self._planned = (epoch, plan)
        self._credited = (epoch, credited)
        self._is_fresh = self._is_over = False

    def _first(
        self, source: TurnSource, number: int, rank: int | None, samples: int, more: int
    ) -> tuple[Indices, int]:
        """What a rank has in its weights of the rounds from `number` on, which is that of `more` rounds and
        `samples` after them, and in how many turns. It may have come farther than this one has read."""
        rounds = self._planned[1]
        if rank is None or not (samples or more):
            return NOTHING, 0
        while len(rounds) <= number + more or len(rounds[number + more].part(rank)) < samples:
            read = source.read(begins_round=False)
            if read is None or not len(read):
                break
            full = bool(rounds) and self._every is not None and rounds[-1].steps >= self._every
            self._add(len(rounds) - (bool(rounds) and not full), read)
        over = rounds[number : number + more]
        under_way = rounds[number + more : number + more + 1]
        parts = [its.part(rank) for its in over] + [its.part(rank)[:samples] for its in under_way]
        turns = sum(its.steps for its in over)
        for its in under_way:
            sizes = np.cumsum([len(its.kept[rank]), *(len(turn[rank]) for turn in its.turns)])
            turns += its.over + int(np.searchsorted(sizes, samples))
        return join(parts), turns
