"""Batches and rounds: what one rank trains between two synchronisations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankwise.data.partition import Indices


@dataclass(frozen=True)
class Batch:
    """What a rank trains in one step. A rank with nothing left joins the round with an empty batch.

    Of the samples that all ranks train in the round, `weights` [ranks] are the shares of the ranks, a
    master's being 0, and `share` is this batch's own. `position` is how many epochs are over in the
    middle of this step, `rounds_left` the number of rounds of the epoch after this one.
    """

    epoch: int
    indices: Indices
    ends_round: bool
    weights: NDArray[np.float64]
    share: float
    position: float
    rounds_left: int

    def __len__(self) -> int:
        return len(self.indices)


class Sampler:
    """Cuts each epoch's shards into batches and rounds, alike on all ranks.

    `shards_of(epoch)` gives one shard a worker. `first_worker` is the rank of worker 0: 1 with a
    master, else 0. A round of an epoch ends after `sync_every(epoch)` steps of every worker, None for the
    whole epoch.
    Every rank sees the same number of rounds, so nobody waits for a round that another never joins.
    """

    def __init__(
        self,
        shards_of: Callable[[int], list[Indices]],
        *,
        rank: int,
        first_worker: int,
        batch_size: int,
        sync_every: Callable[[int], int | None],
    ) -> None:
        self._shards_of = shards_of
        self._worker = rank - first_worker
        self._first_worker = first_worker
        self._batch_size = batch_size
        self._sync_every = sync_every
        self._dealt: tuple[int, list[Indices]] = (-1, [])

    def _shards(self, epoch: int) -> list[Indices]:
        if self._dealt[0] != epoch:
            self._dealt = (epoch, self._shards_of(epoch))
        return self._dealt[1]

    def steps(self, epoch: int) -> int:
        """Steps in an epoch of the worker that has the most."""
        return -(-max(len(shard) for shard in self._shards(epoch)) // self._batch_size)

    def shard(self, epoch: int) -> Indices:
        """The samples of this rank in the order of training; none for a master."""
        return self._shards(epoch)[self._worker] if self._worker >= 0 else np.empty(0, np.int64)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """This rank's batches of one epoch; the last of each round says so, and may be empty."""
        shards = self._shards(epoch)
        longest = max(len(shard) for shard in shards)
        every = self._sync_every(epoch)
        span = longest if every is None else every * self._batch_size
        starts = range(0, longest, span)
        for number, start in enumerate(starts):
            parts = [shard[start : start + span] for shard in shards]
            samples = sum(len(part) for part in parts)
            weights = self._weights(parts)
            mine = parts[self._worker] if self._worker >= 0 else np.empty(0, np.int64)
            cuts = range(0, max(len(mine), 1), self._batch_size)
            for cut in cuts:
                ends = cut == cuts[-1]
                indices = mine[cut : cut + self._batch_size]
                until = min(longest, start + (span if ends else cut + self._batch_size))
                yield Batch(
                    epoch=epoch,
                    indices=indices,
                    ends_round=ends,
                    weights=weights,
                    share=len(indices) / samples,
                    position=epoch - 1 + (start + cut + until) / (2 * longest),
                    rounds_left=len(starts) - 1 - number,
                )

    def weights(self, epoch: int) -> NDArray[np.float64]:
        """The share of each rank [ranks] in the samples of an epoch."""
        return self._weights(self._shards(epoch))

    def _weights(self, parts: list[Indices]) -> NDArray[np.float64]:
        sizes = np.array([0] * self._first_worker + [len(part) for part in parts], np.float64)
        return np.asarray(sizes / sizes.sum())
