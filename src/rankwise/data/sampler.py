"""Batches and rounds: what each rank trains between two synchronisations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rankwise.data.partition import NOTHING, Indices, deal_more, join, without

N = TypeVar("N", int, NDArray[np.int64])


@dataclass(frozen=True)
class Batch:
    """What a rank trains in one step. A rank with nothing left joins the round with an empty batch.

    Of the samples that all ranks train in the round, `weights` [ranks] are the shares of the ranks, a
    master's being 0, and `share` is this batch's own. `position` is how many epochs are over in the
    middle of this step, `end` how many after it (at the end of a round both are alike on all ranks),
    `rounds_left` the number of rounds of the epoch after this one, and `step` that of the worker that has the
    most, from 1. A rank without samples that must make the turn all the same is `lent` another's, which does
    not count. Where each rank reads for itself, `content` is a hash of all that it has read.
    """

    epoch: int
    indices: Indices
    ends_round: bool
    weights: NDArray[np.float64]
    share: float
    position: float
    end: float
    rounds_left: int
    step: int
    lent: Indices = field(default_factory=lambda: NOTHING)
    content: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def is_made(self) -> bool:
        """Whether the rank makes the turn."""
        return bool(len(self.indices) or len(self.lent))


@dataclass(frozen=True)
class Round:
    """What the ranks train between two synchronisations: `parts` [ranks] in the order of training.

    The first `done` [ranks] samples of each part are in its rank's weights already: they were trained
    before another rank was lost, and are not trained again.
    """

    parts: tuple[Indices, ...]
    done: tuple[int, ...]

    @property
    def sizes(self) -> NDArray[np.float64]:
        """Samples of each rank, those that are done included."""
        return np.array([len(part) for part in self.parts], np.float64)

    def part(self, rank: int | None) -> Indices:
        """What a rank has of it; nothing for one that was not there."""
        return NOTHING if rank is None else self.parts[rank]

    def only(self, ranks: Sequence[int | None]) -> Round:
        """What these ranks have of it, all of which is done."""
        parts = tuple(self.part(rank) for rank in ranks)
        return Round(parts, tuple(map(len, parts)))

    def left(self, rank: int) -> Indices:
        """What a rank has still to train."""
        return self.parts[rank][self.done[rank] :]


@dataclass(frozen=True)
class Plan:
    """What a sampler knows that another, which was not there, cannot know by itself."""

    first_worker: int
    batch_sizes: tuple[int, ...]
    epoch: int
    rounds: list[Round]
    credited: Indices

    def arrays(self, number: int, done: Indices, made: Indices) -> dict[str, Indices]:
        """All of it but the epoch, by name; of the round `number` ranks have `done` so many samples
        [ranks]."""
        sizes = np.array([[len(part) for part in its.parts] for its in self.rounds], np.int64)
        over = np.array([its.done for its in self.rounds], np.int64)
        if number < len(over):
            over[number] = done
        return {
            "samples": join(part for its in self.rounds for part in its.parts),
            "sizes": sizes,
            "done": over,
            "credited": self.credited,
            "batch_sizes": np.array(self.batch_sizes, np.int64),
            "first_worker": np.array([self.first_worker]),
        }

    @classmethod
    def of_arrays(cls, its: Mapping[str, Indices], epoch: int) -> Plan:
        """The plan of an epoch that gave these arrays."""
        parts = iter(np.split(its["samples"], np.cumsum(its["sizes"].ravel())[:-1]))
        rounds = [
            Round(tuple(next(parts) for _ in sizes), tuple(done.tolist()))
            for sizes, done in zip(its["sizes"], its["done"], strict=True)
        ]
        first_worker, batch_sizes = int(its["first_worker"][0]), tuple(its["batch_sizes"].tolist())
        return cls(first_worker, batch_sizes, epoch, rounds, its["credited"])


class RoundSampler(Protocol):
    """Cuts epochs into rounds and batches, alike on all ranks, and anew when ranks are lost."""

    @property
    def workers(self) -> int:
        """Ranks that train."""

    def is_over(self, epoch: int, rounds: int) -> bool:
        """Whether an epoch has no more rounds than these."""

    def steps(self, epoch: int) -> int:
        """Steps in an epoch of the worker that has the most."""

    def samples(self, epoch: int) -> int:
        """Samples that all ranks train in an epoch, those that were lost included."""

    def weights(self, epoch: int) -> NDArray[np.float64]:
        """The share of each rank [ranks] in the samples of an epoch."""

    def batches(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from a round on."""

    def known(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        """Those of `batches` that are known by now, which are not all of a stream."""

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
        """Go on without ranks that were lost, and with newcomers."""

    def plan(self, epoch: int) -> Any:
        """What a newcomer needs."""

    def plan_of(self, arrays: Mapping[str, Indices], epoch: int) -> Any:
        """The plan of an epoch that gave these `arrays`, as a checkpoint keeps it."""

    def follow(self, plan: Any, rank: int) -> None:
        """Go on, as this rank, where the sampler was that made the plan."""

    def follow_alike(self, plan: Any) -> bool:
        """The same, as this rank, if the sampler was like this one; returns whether it was."""

    def deal_rest(self, plan: Any, trained: Sequence[Indices], kept: Sequence[Indices]) -> int:
        """Deal what is left of an epoch that ranks of another number have begun by `plan`; returns how many
        rounds are over."""

    def credited(self, epoch: int) -> Indices:
        """What ranks that were lost had committed in an epoch."""

    def shard(self, epoch: int) -> Indices:
        """The samples of this rank in the order of training."""

    def least_batch(self, epoch: int) -> int:
        """Samples in the smallest batch of an epoch, of all ranks."""


class Sampler:
    """Cuts each epoch's shards into rounds and batches, alike on all ranks.

    `batch_sizes` [workers] are those of the workers, and `deal(epoch, batch_sizes)` gives one shard a worker,
    as large to each other as these. `first_worker` is the rank of worker 0: 1 with a master, else 0. A round
    of an epoch ends after `sync_every(epoch)` steps of every worker, None for the whole epoch. Every rank
    sees the same number of rounds, so no rank waits for a round that another never joins. When ranks are
    lost, `redistribute` deals what they had not brought in to the others, whose batches stay as they are, or
    with `keeps_global_batch` grow so that those of all together do. With `syncs_every_step` all ranks make
    the same number of steps in a round, the last ones perhaps with empty batches. With `needs_pairs` a last
    batch of one sample joins the one before it, and no rank is dealt a single sample that another can take.
    """

    def __init__(
        self,
        deal: Callable[[int, Sequence[int]], list[Indices]],
        *,
        rank: int,
        first_worker: int,
        batch_sizes: Sequence[int],
        sync_every: Callable[[int], int | None],
        keeps_global_batch: bool = False,
        syncs_every_step: bool = False,
        needs_pairs: bool = False,
    ) -> None:
        self._deal = deal
        self._rank = rank
        self._first_worker = first_worker
        self._batch_sizes = tuple(batch_sizes)
        self._sync_every = sync_every
        self._syncs_every_step = syncs_every_step
        self._needs_pairs = needs_pairs
        self._usual_batch = round(sum(batch_sizes) / len(batch_sizes))
        self._global_batch = sum(batch_sizes) if keeps_global_batch else None
        self._planned: tuple[int, list[Round]] = (-1, [])
        self._credited: tuple[int, Indices] = (-1, NOTHING)

    @property
    def workers(self) -> int:
        """Ranks that train."""
        return len(self._batch_sizes)

    @property
    def _size(self) -> int:
        return self._first_worker + self.workers

    def _batch_size(self, rank: int) -> int:
        """Samples in a step of a rank; a master's, which has none, does not matter."""
        return self._batch_sizes[max(rank - self._first_worker, 0)]

    def rounds(self, epoch: int) -> list[Round]:
        """All rounds of an epoch."""
        if self._planned[0] != epoch:
            shards = self._deal(epoch, self._batch_sizes)
            self._planned = (epoch, self._cut([NOTHING] * self._first_worker + shards, epoch))
        return self._planned[1]

    def steps(self, epoch: int) -> int:
        """Steps in an epoch of the worker that has the most."""
        return int(self._turns(self._totals(epoch).astype(np.int64), self._all_batch_sizes).max())

    def least_batch(self, epoch: int) -> int:
        """Samples in the smallest batch of an epoch, of all ranks."""
        sizes = self._all_batch_sizes
        parts = np.array([round.sizes for round in self.rounds(epoch)], np.int64)
        last = parts - (self._turns(parts, sizes) - 1) * sizes
        return int(np.minimum(last, sizes)[parts > 0].min())

    def samples(self, epoch: int) -> int:
        """Samples that all ranks train in an epoch, those that were lost included."""
        return int(self._totals(epoch).sum()) + len(self.credited(epoch))

    def shard(self, epoch: int) -> Indices:
        """The samples of this rank in the order of training; none for a master."""
        return np.concatenate([round.parts[self._rank] for round in self.rounds(epoch)])

    def weights(self, epoch: int) -> NDArray[np.float64]:
        """The share of each rank [ranks] in the samples of an epoch."""
        totals = self._totals(epoch)
        if not totals.any():  # all that was trained, ranks had that were lost since
            totals = np.ones(self._size)
        return np.asarray(totals / totals.sum())

    def batches(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        """This rank's batches of one epoch, from a round on; the last of each round says so, and may be
        empty."""
        rounds = self.rounds(epoch)
        batch_size = self._batch_size(self._rank)
        parts = np.array([round.sizes for round in rounds], np.int64)
        over = np.concatenate([[0], np.cumsum((parts / self._all_batch_sizes).max(axis=1))])
        steps = np.concatenate([[0], np.cumsum(self._turns(parts, self._all_batch_sizes).max(axis=1))])
        for number, round in enumerate(rounds[first_round:], start=first_round):
            sizes = round.sizes
            weights = sizes / sizes.sum()
            mine, done = round.left(self._rank), round.done[self._rank]
            own = self._turns(len(mine), batch_size)
            together = range(self._size) if self._syncs_every_step else ()
            left = (self._turns(len(round.left(rank)), self._batch_size(rank)) for rank in together)
            turns = max(1, own, *left)
            cuts = [*(turn * batch_size for turn in range(own)), *[len(mine)] * (turns + 1 - own)]
            for turn in range(turns):
                ends = turn == turns - 1
                indices = mine[cuts[turn] : cuts[turn + 1]]
                # All ranks end a round at one position, that of the worker who has the most, since what they
                # do there with the learning rate must be the same.
                before = max(0, steps[number + 1] - steps[number] - 1) if ends else done / batch_size + turn
                start = over[number] + before
                until = over[number + 1] if ends else start + 1
                yield Batch(
                    epoch=epoch,
                    indices=indices,
                    ends_round=ends,
                    weights=weights,
                    share=len(indices) / sizes.sum(),
                    position=epoch - 1 + (start + until) / (2 * over[-1]),
                    end=epoch - 1 + float(until / over[-1]),
                    rounds_left=len(rounds) - 1 - number,
                    step=int(steps[number + 1] if ends else steps[number] + turn + 1),
                )

    def is_over(self, epoch: int, rounds: int) -> bool:
        """Whether an epoch has no more rounds than these."""
        return rounds == len(self.rounds(epoch))

    def known(self, epoch: int, first_round: int = 0) -> Iterator[Batch]:
        """The same."""
        return self.batches(epoch, first_round)

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

        `before` [ranks] are the ranks so far of those that are there now, in the order of their new
        numbers, None for a newcomer; `ahead` [ranks] says how many rounds more each has committed (none
        unless given), and `done` [ranks] how many samples of its round under way each keeps in its weights:
        all these become one round, in which they are done. What lost ranks had in this round, and what a
        worker had left that becomes the master, is dealt to the workers and trained in it, so that they have
        as even shares as can be; what lost ranks had in later rounds is dealt too, and later rounds are cut
        anew. What they had in the rounds before is `credited` [samples], as it was committed, but for rounds
        that were `left_out` by all.
        """
        rounds = self.rounds(epoch)

        def had(rank: int | None, first: int, until: int | None = None) -> Indices:
            return join(its.part(rank) for its in rounds[first:until])

        lost = [rank for rank in range(self._size) if rank not in before]
        held = [at for at in range(number) if at not in left_out]
        credited = join([self.credited(epoch), *(rounds[at].part(rank) for rank in lost for at in held)])
        workers = range(min(self._first_worker, len(before) - 1), len(before))
        sizes = self._batches_of([before[rank] for rank in workers])
        reached = [number + rounds_more for rounds_more in ahead or [0] * len(before)]
        plan = [its.only(before) for its in rounds[:number]]
        if number < len(rounds):
            spare = [rounds[number].parts[rank] for rank in lost]  # what was done is lost with them
            kept, all_done = [], []
            for rank, (old, at) in enumerate(zip(before, reached, strict=True)):
                over, under_way = had(old, number, at), had(old, at, at + 1)
                cut = len(under_way) if rank in workers else done[rank]
                kept.append(join([over, under_way[:cut]]))
                spare.append(under_way[cut:])
                all_done.append(len(over) + done[rank])
            parts = deal_more(spare, kept, workers, sizes, done=all_done if self._needs_pairs else None)
            plan.append(Round(parts, tuple(all_done)))
        none_done = [0] * len(before) if self._needs_pairs else None
        tails = [had(old, at + 1) for old, at in zip(before, reached, strict=True)]
        spare = [had(rank, number + 1) for rank in lost]
        spare += [tail for rank, tail in enumerate(tails) if rank not in workers]
        tails = [tail if rank in workers else NOTHING for rank, tail in enumerate(tails)]
        tails = list(deal_more(spare, tails, workers, sizes, done=none_done))
        if self._rank in before:
            self._rank = before.index(self._rank)
        self._first_worker, self._batch_sizes = workers.start, sizes
        self._planned = (epoch, [*plan, *(self._cut(tails, epoch) if any(map(len, tails)) else [])])
        self._credited = (epoch, credited)

    def plan(self, epoch: int) -> Plan:
        """What a newcomer needs."""
        return Plan(self._first_worker, self._batch_sizes, epoch, self.rounds(epoch), self.credited(epoch))

    def plan_of(self, arrays: Mapping[str, Indices], epoch: int) -> Plan:
        """The plan of an epoch that gave these `arrays`."""
        return Plan.of_arrays(arrays, epoch)

    def follow(self, plan: Plan, rank: int) -> None:
        """Go on, as this rank, where the sampler was that made the plan."""
        self._rank, self._first_worker = rank, plan.first_worker
        self._batch_sizes = plan.batch_sizes
        self._planned = (plan.epoch, plan.rounds)
        self._credited = (plan.epoch, plan.credited)

    def follow_alike(self, plan: Plan) -> bool:
        """Go on where the sampler of this rank's number was that made the plan, if this one is alike; returns
        whether it is."""
        alike = (plan.first_worker, plan.batch_sizes) == (self._first_worker, self._batch_sizes)
        if alike:
            self.follow(plan, self._rank)
        return alike

    def deal_rest(self, plan: Plan, trained: Sequence[Indices], kept: Sequence[Indices]) -> int:
        """Deal what is left of an epoch that ranks of another number, or with other rounds, have begun by
        `plan`. Returns how many rounds are over, which is one.

        Of the ranks so far [ranks] all have committed what they have `trained`, and what they have `kept` of
        their round is in their weights. What those had that are not there any more is `credited`, or dealt to
        the others where it was not committed.
        """
        ranks, before = self._size, len(trained)
        parts = [join(its.parts[rank] for its in plan.rounds) for rank in range(before)]
        kept = [its if rank < ranks else NOTHING for rank, its in enumerate(kept)]
        used = [join([*its]) for its in zip(trained, kept, strict=True)]
        left = [without(part, its) for part, its in zip(parts, used, strict=True)]
        there = [[*its[:ranks], *[NOTHING] * (ranks - before)] for its in (trained, kept)]
        over, shards = there
        done = [len(its) for its in shards]
        workers = range(self._first_worker, ranks)
        tails = deal_more(left, shards, workers, self._batch_sizes, done=done if self._needs_pairs else None)
        rounds = [Round(tuple(over), tuple(map(len, over)))]
        if any(map(len, tails)):
            begun = np.zeros(ranks, np.int64)
            for its in self._cut(tails, plan.epoch):
                sizes = np.array([len(part) for part in its.parts])
                so_far = (np.array(done) - begun).clip(0, sizes)
                rounds.append(Round(its.parts, tuple(so_far.tolist())))
                begun += sizes
        self._planned = (plan.epoch, rounds)
        self._credited = (plan.epoch, join([plan.credited, *trained[ranks:]]))
        return 1

    def credited(self, epoch: int) -> Indices:
        """What ranks that were lost had committed in an epoch."""
        return self._credited[1] if self._credited[0] == epoch else NOTHING

    def _batches_of(self, ranks: Sequence[int | None]) -> tuple[int, ...]:
        """The batch sizes of these ranks, by their numbers so far, as workers that go on without others."""
        sizes = [self._usual_batch if rank is None else self._batch_size(rank) for rank in ranks]
        if self._global_batch is not None:
            # Rounded for each alike, so that equal ones stay equal; no pair becomes a single sample.
            total = sum(sizes)
            sizes = [
                max(2 if self._needs_pairs and size > 1 else 1, round(self._global_batch * size / total))
                for size in sizes
            ]
        return tuple(sizes)

    @property
    def _all_batch_sizes(self) -> NDArray[np.int64]:
        return np.array([self._batch_size(rank) for rank in range(self._size)])

    def _turns(self, samples: N, batch_size: N) -> N:
        """Steps in which a rank trains this number of samples."""
        joins = self._needs_pairs & (samples > 1) & (batch_size > 1) & (samples % batch_size == 1)
        turns: N = -(-samples // batch_size) - joins
        return turns

    def _cut(self, shards: Sequence[Indices], epoch: int) -> list[Round]:
        every = self._sync_every(epoch)
        turns = [self._turns(len(shard), self._batch_size(rank)) for rank, shard in enumerate(shards)]
        a_round = max(1, *turns) if every is None else every
        rounds = max(1, -(-max(turns) // a_round))
        cuts = []  # of each shard: where rounds begin, and its end
        for rank, shard in enumerate(shards):
            span = a_round * self._batch_size(rank)
            begun = -(-turns[rank] // a_round)
            cuts.append([*(number * span for number in range(begun)), *[len(shard)] * (rounds + 1 - begun)])
        nothing_done = (0,) * len(shards)
        return [
            Round(
                tuple(shard[cut[number] : cut[number + 1]] for shard, cut in zip(shards, cuts, strict=True)),
                nothing_done,
            )
            for number in range(rounds)
        ]

    def _totals(self, epoch: int) -> NDArray[np.float64]:
        return np.asarray(np.sum([round.sizes for round in self.rounds(epoch)], axis=0))
