"""Turns of a loop: which samples each rank trains in them, and which turns are committed together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import NDArray

from rankwise.data.partition import NOTHING, Indices, apportion, join
from rankwise.data.sampler import Batch


@dataclass(frozen=True)
class TurnRound:
    """Turns between two synchronisations: `turns` [turns][ranks] are to be trained, `kept` [ranks] are in the
    ranks' weights already, as they were trained, in `over` turns, before another rank was lost. Where a run
    goes on in it, so are the first turns of each rank, as many as it has `made` [ranks]."""

    kept: tuple[Indices, ...]
    turns: Sequence[tuple[Indices, ...]]
    over: int = 0
    made: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        """Turns in all."""
        return self.over + len(self.turns)

    @cached_property
    def sizes(self) -> NDArray[np.float64]:
        """Samples of each rank [ranks], those that are kept included."""
        parts = zip(self.kept, *self.turns, strict=True)
        return np.array([sum(map(len, its)) for its in parts], np.float64)

    def part(self, rank: int | None) -> Indices:
        """What a rank has of it; nothing for one that was not there."""
        if rank is None:
            return NOTHING
        return join([self.kept[rank], *(turn[rank] for turn in self.turns)])

    def only(self, ranks: Sequence[int | None]) -> TurnRound:
        """What these ranks have of it, all of which is trained."""
        return TurnRound(tuple(map(self.part, ranks)), (), self.steps)


@dataclass(frozen=True)
class TurnPlan:
    """What a sampler knows that another, which was not there, cannot know by itself."""

    batch_sizes: tuple[int, ...]
    usual_batch: int
    least: int
    drawn: int
    ends: Indices | None
    epoch: int
    rounds: list[TurnRound]
    credited: Indices

    def arrays(self, number: int, done: Indices, made: Indices) -> dict[str, Indices]:
        """All of it but the epoch, by name; of the round `number` ranks have `made` so many turns [ranks]."""
        of_rounds = np.zeros((len(self.rounds), len(self.batch_sizes)), np.int64)
        of_rounds[number : number + 1] = made
        rows = [row for its in self.rounds for row in (its.kept, *its.turns)]
        return {
            "samples": join(part for row in rows for part in row),
            "sizes": np.array([[*map(len, row)] for row in rows], np.int64),
            "turns": np.array([len(its.turns) for its in self.rounds], np.int64),
            "over": np.array([its.over for its in self.rounds], np.int64),
            "made": of_rounds,
            "credited": self.credited,
            "batch_sizes": np.array(self.batch_sizes, np.int64),
            "numbers": np.array([self.usual_batch, self.least, self.drawn], np.int64),
            **({} if self.ends is None else {"ends": self.ends}),
        }

    @classmethod
    def of_arrays(cls, its: Mapping[str, Indices], epoch: int) -> TurnPlan:
        """The plan of an epoch that gave these arrays."""
        parts = iter(np.split(its["samples"], np.cumsum(its["sizes"].ravel())[:-1]))
        rows = iter([tuple(next(parts) for _ in sizes) for sizes in its["sizes"]])
        counts = zip(its["turns"].tolist(), its["over"].tolist(), its["made"].tolist(), strict=True)
        rounds = [
            TurnRound(next(rows), [next(rows) for _ in range(turns)], over, tuple(made))
            for turns, over, made in counts
        ]
        usual_batch, least, drawn = its["numbers"].tolist()
        sizes, ends = tuple(its["batch_sizes"].tolist()), its.get("ends")
        return cls(sizes, usual_batch, least, drawn, ends, epoch, rounds, its["credited"])


class TurnSampler:
    """Cuts an epoch into turns, alike on all ranks, of which each rank has a part.

    Samples are known by their place in the order in which a loader draws them. A turn holds as many as one
    process with the batches of all ranks would take, in that order, and each rank gets a batch of it, of a
    shorter one an even part. Where a loader makes batches of its own, none is split, and each rank gets one.

    A round ends after `sync_every(epoch)` turns, None for the whole epoch. When ranks are lost,
    `redistribute` cuts what is left anew for the others, whose batches stay as they are, or with
    `keeps_global_batch` grow so that those of all together do. In a turn with fewer samples, or batches, than
    ranks, a rank without one is lent another's, which does not count.
    """

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        sync_every: Callable[[int], int | None],
        keeps_global_batch: bool = False,
    ) -> None:
        self._rank = rank
        self._ranks = self._ranks_at_start = ranks
        self._batch_sizes: tuple[int, ...] = ()
        self._sync_every = sync_every
        self._usual_batch = self._least = 1
        self._drawn = 0
        self._ends: Indices | None = None
        self._keeps_global_batch = keeps_global_batch
        self._planned: tuple[int, list[TurnRound]] = (-1, [])
        self._credited: tuple[int, Indices] = (-1, NOTHING)

    @property
    def workers(self) -> int:
        """Ranks that train."""
        return self._ranks

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
        """An epoch begins, in which a loader draws this number of samples.

        A last turn that would leave a rank with fewer than `least` samples joins the one before it, or falls
        away with `drops_last`, as any shorter one does. With `batches`, the sizes of those that the loader
        makes, `batch_size` and `least` count batches.
        """
        self._usual_batch = batch_size
        self._batch_sizes, self._least = self._sizes(batch_size), least
        self._ends = None if batches is None else np.cumsum(batches)
        if drops_last:
            samples -= samples % sum(self._batch_sizes)
        self._drawn = samples
        self._planned = (epoch, self._cut(np.arange(samples), epoch))
        self._credited = (epoch, NOTHING)

    def is_planned(self, epoch: int) -> bool:
        """Whether an epoch was begun."""
        return self._planned[0] == epoch

    def turn_size(self, batch_size: int) -> int:
        """Samples of a turn of all ranks, of which each had `batch_size` when all were there."""
        return sum(self._sizes(batch_size))

    def turns(self, samples: int, *, batch_size: int, least: int = 1, drops_last: bool = False) -> int:
        """How many turns such an epoch would have."""
        turn = self.turn_size(batch_size)
        return count_turns(samples, turn, fewest=self._fewest(least), drops_last=drops_last)

    def rounds(self, epoch: int) -> list[TurnRound]:
        """All rounds of an epoch."""
        assert self.is_planned(epoch)
        return self._planned[1]

    def steps(self, epoch: int) -> int:
        """Turns in an epoch."""
        return sum(its.steps for its in self.rounds(epoch))

    def samples(self, epoch: int) -> int:
        """Samples that all ranks train in an epoch, those that were lost included."""
        return int(self._totals(epoch).sum()) + len(self.credited(epoch))

    def shard(self, epoch: int) -> Indices:
        """The samples of this rank in the order of training."""
        return join(its.part(self._rank) for its in self.rounds(epoch))

    def least_batch(self, epoch: int) -> int:
        """Samples in the smallest batch of an epoch, of all ranks."""
        sizes = (len(part) for its in self.rounds(epoch) for turn in its.turns for part in turn)
        return min(filter(None, sizes), default=0)

    def weights(self, epoch: int) -> NDArray[np.float64]:
        """The share of each rank [ranks] in the samples of an epoch."""
        totals = self._totals(epoch)
        if not totals.any():
            totals = np.ones(self.workers)
        return np.asarray(totals / totals.sum())

    def batches(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        """This rank's part of each turn, from a round on; the last of each round says so, and may be
        empty."""
        rounds = self.rounds(epoch)
        # As Python's own numbers, with which a turn reckons several times as fast as with numpy's.
        sizes = [float(its.sizes.sum()) for its in rounds]
        over = [0.0, *accumulate(sizes)]
        total = max(over[-1], 1.0)
        nothing = (NOTHING,) * self.workers
        step = sum(its.steps for its in rounds[:first_round])
        for number, its in enumerate(rounds[first_round:], start=first_round):
            weights = its.sizes / sizes[number] if sizes[number] else np.full(self.workers, 1 / self.workers)
            before = over[number] + sum(map(len, its.kept))
            step += its.over
            made = its.made[self._rank] if its.made else 0
            for turn, parts in enumerate(its.turns or [nothing]):
                ends_round, size = turn >= len(its.turns) - 1, sum(map(len, parts))
                step += 1
                if turn < made:
                    parts = nothing
                    if not ends_round:
                        before += size
                        continue
                indices = parts[self._rank]
                yield Batch(
                    epoch=epoch,
                    indices=indices,
                    ends_round=ends_round,
                    weights=weights,
                    share=len(indices) / max(sizes[number], 1),
                    position=epoch - 1 + (before + size / 2) / total,
                    end=epoch - 1 + (before + size) / total,
                    rounds_left=len(rounds) - 1 - number,
                    step=step,
                    lent=NOTHING if len(indices) else next(filter(len, parts), NOTHING),
                )
                before += size

    def is_over(self, epoch: int, rounds: int) -> bool:
        """Whether an epoch has no more rounds than these."""
        return rounds == len(self.rounds(epoch))

    def known(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        """Those of `batches` that are known by now."""
        return self.batches(epoch, first_round)

    def expected(self, epoch: int) -> Indices:
        """How often each sample of an epoch [samples] is to be trained."""
        assert self.is_planned(epoch)
        return np.ones(self._drawn, np.int64)

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
        """Go on without ranks that were lost, and with newcomers, when `number` rounds of an epoch were
        committed by all.

        The arguments are those of `Sampler.redistribute`. What no rank has in its weights is cut into turns
        anew; if ranks keep samples of the round under way, what is left of it comes first, and ends it. If
        the epoch was not begun, the next one is for those that are left.
        """
        rounds = self.rounds(epoch) if self.is_planned(epoch) else []
        credited = self._credited_with(epoch, rounds[:number], before, left_out)
        kept = []
        for old, samples, more in zip(before, done, ahead or [0] * len(before), strict=True):
            at = number + more
            over = [its.part(old) for its in rounds[number:at]]
            under_way = [its.part(old)[:samples] for its in rounds[at : at + 1]]
            kept.append(join([*over, *under_way]))
        all_ranks = range(self.workers)
        steps = rounds[number].steps if number < len(rounds) else 0
        left = join(its.part(rank) for its in rounds[number:] for rank in all_ranks)
        left = np.setdiff1d(left, join(kept))
        first = join(its.part(rank) for its in rounds[number : number + 1] for rank in all_ranks)
        self._go_on_as(before)
        plan = [its.only(before) for its in rounds[:number]]
        if number < len(rounds) and any(map(len, kept)):
            begun, left = self._rest_of_round(np.intersect1d(left, first), left, tuple(kept), steps)
            plan.append(begun)
        if self.is_planned(epoch):
            self._planned = (epoch, plan + self._cut(left, epoch))
            self._credited = (epoch, credited)

    def plan(self, epoch: int) -> TurnPlan:
        """What a newcomer needs."""
        rounds = self.rounds(epoch) if self.is_planned(epoch) else []
        return TurnPlan(
            self._batch_sizes,
            self._usual_batch,
            self._least,
            self._drawn,
            self._ends,
            epoch,
            rounds,
            self.credited(epoch),
        )

    def follow(self, plan: TurnPlan, rank: int) -> None:
        """Go on, as this rank, where the sampler was that made the plan."""
        self._rank, self._batch_sizes, self._ranks = rank, plan.batch_sizes, len(plan.batch_sizes)
        self._usual_batch, self._least = plan.usual_batch, plan.least
        self._drawn, self._ends = plan.drawn, plan.ends
        self._planned = (plan.epoch, plan.rounds)
        self._credited = (plan.epoch, plan.credited)

    def plan_of(self, arrays: Mapping[str, Indices], epoch: int) -> TurnPlan:
        """The plan of an epoch that gave these `arrays`."""
        return TurnPlan.of_arrays(arrays, epoch)

    def follow_alike(self, plan: TurnPlan) -> bool:
        """Go on where the sampler of this rank's number was that made the plan, if this one is alike; returns
        whether it is."""
        alike = plan.batch_sizes == self._sizes(plan.usual_batch)
        if alike:
            self.follow(plan, self._rank)
        return alike

    def deal_rest(self, plan: TurnPlan, trained: Sequence[Indices], kept: Sequence[Indices]) -> int:
        """Cut into turns anew what is left of an epoch that ranks of another number have begun by `plan`, of
        which they have `trained` [ranks], and have `kept` some of their round in their weights, which then
        comes to its end first. Returns how many rounds are over, which is one."""
        all_ranks, done = range(len(plan.batch_sizes)), join(trained)
        parts = [join(its.part(rank) for rank in all_ranks) for its in plan.rounds]
        is_over = [bool(np.isin(part, done).all()) for part in parts]
        turns = sum(its.steps for its, over in zip(plan.rounds, is_over, strict=True) if over)
        self._usual_batch, self._least = plan.usual_batch, plan.least
        self._drawn, self._ends = plan.drawn, plan.ends
        self._batch_sizes = self._sizes(plan.usual_batch)
        over = [trained[rank] if rank < len(trained) else NOTHING for rank in range(self._ranks)]
        kept = [kept[rank] if rank < len(kept) else NOTHING for rank in range(self._ranks)]
        left = np.setdiff1d(join(parts), join([done, *kept]))
        rounds = [TurnRound(tuple(over), (), turns)]
        if any(map(len, kept)):
            begun = is_over.index(False)
            steps, first = plan.rounds[begun].steps, np.intersect1d(left, parts[begun])
            rest, left = self._rest_of_round(first, left, tuple(kept), steps)
            rounds.append(rest)
        self._planned = (plan.epoch, [*rounds, *self._cut(left, plan.epoch)])
        self._credited = (plan.epoch, join([plan.credited, *trained[self._ranks :]]))
        return 1

    def credited(self, epoch: int) -> Indices:
        """What ranks that were lost had committed in an epoch."""
        return self._credited[1] if self._credited[0] == epoch else NOTHING

    def _lost(self, before: Sequence[int | None]) -> list[int]:
        """The ranks that are not among those that go on, which were `before`."""
        return [rank for rank in range(self.workers) if rank not in before]

    def _credited_with(
        self,
        epoch: int,
        committed: Sequence[TurnRound],
        before: Sequence[int | None],
        left_out: Collection[int],
    ) -> Indices:
        """What was credited in an epoch, and what lost ranks had of the rounds that are committed now."""
        held = [its for at, its in enumerate(committed) if at not in left_out]
        return join([self.credited(epoch), *(its.part(rank) for its in held for rank in self._lost(before))])

    def _go_on_as(self, before: Sequence[int | None]) -> None:
        """The ranks are those that were `before`, in this order."""
        self._ranks = len(before)
        self._batch_sizes = self._sizes(self._usual_batch)
        if self._rank in before:
            self._rank = before.index(self._rank)

    def _sizes(self, batch_size: int) -> tuple[int, ...]:
        """The batches of all ranks, of which each had `batch_size` samples when all were there."""
        if not self._keeps_global_batch:
            return (batch_size,) * self._ranks
        return tuple(apportion(batch_size * self._ranks_at_start, np.ones(self._ranks), least=1).tolist())

    def _fewest(self, least: int) -> int:
        """Samples of a last turn that does not join: also of fewer ranks where turns are to stay as they
        are."""
        return least * (self._ranks_at_start if self._keeps_global_batch else self._ranks)

    def _turns(self, samples: Indices) -> tuple[tuple[Indices, ...], ...]:
        edges = self._edges(samples)
        units, turn = len(edges) - 1, sum(self._batch_sizes)
        starts = [*range(0, units, turn)]
        if len(starts) > 1 and units - starts[-1] < self._fewest(self._least):
            starts.pop()
        turns = pairwise([*starts, units])
        cuts = (edges[start + np.cumsum([0, *self._deal(end - start)])] for start, end in turns)
        return tuple(tuple(samples[a:b] for a, b in pairwise(its)) for its in cuts)

    def _rest_of_round(
        self, first: Indices, left: Indices, kept: tuple[Indices, ...], steps: int
    ) -> tuple[TurnRound, Indices]:
        """A round of which ranks have `kept` some, with the samples `first` among those that are `left`, and
        what comes behind it. It has as many more as no rank can be without, and all if they are too few for a
        turn of their own."""
        later, fewest = np.setdiff1d(left, first), self._fewest(self._least)
        if len(first):
            more = max(fewest - len(first), 0)
            more = len(later) if len(later) - more < fewest else more
            first, later = np.union1d(first, later[:more]), later[more:]
        return TurnRound(kept, self._turns(first), steps), later

    def _edges(self, samples: Indices) -> Indices:
        """Where samples can be cut: between any two, or between two batches of the loader's own."""
        if self._ends is None:
            return np.arange(len(samples) + 1)
        batches = np.searchsorted(self._ends, samples, side="right")
        inner = np.flatnonzero(np.diff(batches)) + 1
        return np.array([0, *inner, len(samples)] if len(samples) else [0])

    def _deal(self, units: int) -> Sequence[int] | Indices:
        """How many samples, or batches, of a turn each rank gets."""
        return shares(units, self._batch_sizes, max(self._least, 1))

    def _cut(self, samples: Indices, epoch: int) -> list[TurnRound]:
        turns = self._turns(samples)
        every = self._sync_every(epoch) or max(len(turns), 1)
        none_kept = (NOTHING,) * self.workers
        return [TurnRound(none_kept, turns[at : at + every]) for at in range(0, len(turns), every)]

    def _totals(self, epoch: int) -> NDArray[np.float64]:
        rounds = self.rounds(epoch)
        return np.asarray(np.sum([its.sizes for its in rounds], axis=0)) if rounds else np.zeros(self.workers)


def shares(units: int, sizes: Sequence[int], least: int) -> Sequence[int] | Indices:
    """How many samples, or batches, of a turn each rank gets, whose usual batches have `sizes` [ranks]. In a
    shorter turn no rank gets fewer than `least`, as long as there are as many: the last ones get none."""
    if units == sum(sizes):
        return sizes
    some = min(max(units // least, 1), len(sizes))
    found = np.zeros(len(sizes), np.int64)
    found[:some] = apportion(units, sizes[:some], least=min(least, units))
    return found


def count_turns(samples: int, turn: int, *, fewest: int, drops_last: bool) -> int:
    """How many turns of `turn` samples there are, the last of which falls away with `drops_last` if it is
    shorter, or joins the one before it if it has less than `fewest`."""
    whole, rest = divmod(samples, turn)
    joins = drops_last or (whole and rest < fewest)
    return whole + (rest > 0 and not joins)
