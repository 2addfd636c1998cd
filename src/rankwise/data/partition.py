"""Who trains on which sample: pure functions of the seed, the epoch and the number of workers."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import ConfigError, unknown_name

Indices = NDArray[np.int64]

NOTHING: Indices = np.empty(0, np.int64)


@dataclass(frozen=True)
class Shards:
    """How the training set is dealt.

    ``redealt``: new shards each epoch; ``fixed``: the same shards all along, in a new order each epoch;
    ``dirichlet``: fixed shards with uneven classes by `alpha`, whose sizes are by chance (Hsu et al. 2019,
    arXiv:1909.06335).
    """

    kind: Literal["redealt", "fixed", "dirichlet"]
    alpha: float = 0.0


def deal(
    how: Shards,
    *,
    labels: NDArray[np.int64],
    shares: Sequence[int],
    epoch: int,
    seed: int,
    least: int = 1,
) -> list[Indices]:
    """The samples of each worker in one epoch, in the order of training.

    Every index of `labels` [n] stands in exactly one shard, once. `shares` [workers] say how large the
    shards are to each other, where `how` leaves that open. None has fewer than `least` samples, as long as
    there are enough; otherwise none is empty, if that is possible.
    """
    least = least if len(labels) >= least * len(shares) else 1
    if how.kind == "dirichlet":
        shards = _deal_unevenly(labels, len(shares), how.alpha, np.random.default_rng([seed, 1]), least)
    elif how.kind == "fixed":
        shards = _deal_by(shares, len(labels), np.random.default_rng([seed, 2]), least)
    else:
        return _deal_by(shares, len(labels), np.random.default_rng([seed, 3, epoch]), least)
    return [
        np.random.default_rng([seed, 4, epoch, worker]).permutation(shard)
        for worker, shard in enumerate(shards)
    ]


def replicate(*, samples: int, workers: int, epoch: int, seed: int) -> list[Indices]:
    """All samples for every worker, each in an order of its own."""
    return [np.random.default_rng([seed, 5, epoch, worker]).permutation(samples) for worker in range(workers)]


@functools.cache
def parse_shards(text: str) -> Shards:
    """``redealt``, ``fixed`` or ``dirichlet:ALPHA``. Raises ConfigError, one line, for anything else."""
    plain = {"redealt": Shards("redealt"), "fixed": Shards("fixed")}
    if text in plain:
        return plain[text]
    name, colon, argument = text.partition(":")
    if name != "dirichlet":
        raise ConfigError(unknown_name("--shards", text, ["redealt", "fixed", "dirichlet:ALPHA"]))
    try:
        alpha = float(argument)
    except ValueError:
        alpha = float("nan")
    if not (colon and 0 < alpha < float("inf")):
        raise ConfigError(f"--shards {text}: ALPHA must be a number above 0, e.g. dirichlet:0.5")
    return Shards("dirichlet", alpha)


def apportion(
    total: int, shares: Sequence[float] | NDArray[np.float64], *, least: int = 0
) -> NDArray[np.int64]:
    """Split a number by shares [k], by the method of the largest remainder, of equal ones the first;
    everybody gets `least` at least. Returns [k] that sum to `total`."""
    exact = np.asarray(shares, np.float64) / np.sum(shares) * total
    parts = np.maximum(np.floor(exact + 1e-9).astype(np.int64), least)
    while (rest := total - int(parts.sum())) < 0:
        parts[np.argmax(np.where(parts > least, parts - exact, -np.inf))] -= 1
    parts[np.argsort(parts - exact, kind="stable")[:rest]] += 1
    return parts


def deal_more(
    spare: Sequence[Indices],
    parts: Sequence[Indices],
    workers: range,
    batch_sizes: Sequence[int],
    *,
    done: Sequence[int] | None,
) -> tuple[Indices, ...]:
    """The parts [ranks], with what is to spare behind those of the workers, so that all have as equal numbers
    of batches as can be. With `done` [ranks], the samples of each part that are over, no worker is left with
    a single one that another can take."""
    extra = join(spare)
    sizes = np.array([len(parts[rank]) for rank in workers])
    shares = even_shares(sizes, len(extra), np.array(batch_sizes, np.float64))
    if done is not None:
        shares = _without_singles(shares, sizes - np.array([done[rank] for rank in workers]))
    dealt = dict(zip(workers, np.split(extra, np.cumsum(shares)[:-1]), strict=True))
    return tuple(join([part, dealt.get(rank, NOTHING)]) for rank, part in enumerate(parts))


def _without_singles(shares: NDArray[np.int64], left: NDArray[np.int64]) -> NDArray[np.int64]:
    """These shares, but that a worker which has nothing `left` and is dealt one sample gives it to the one
    that has the least besides."""
    shares = shares.copy()
    for worker in np.flatnonzero((shares == 1) & (left == 0)):
        all_left = left + shares
        all_left[worker] = 0
        if shares[worker] == 1 and all_left.any():
            shares[worker] = 0
            shares[np.where(all_left > 0, all_left, all_left.max() + 1).argmin()] += 1
    return shares


def even_shares(sizes: NDArray[np.int64], extra: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """How much of `extra` everybody gets who has `sizes` already, so that the largest sum, in units of its
    weight, is as small as can be."""
    levels = sizes / weights
    order = np.argsort(levels, kind="stable")
    for count in range(len(sizes), 0, -1):  # this many come to one level
        low = np.sort(order[:count])
        level = (sizes[low].sum() + extra) / weights[low].sum()
        if levels[order[count - 1]] <= level:
            break
    shares = np.zeros_like(sizes)
    if extra:
        shares[low] = apportion(extra, np.clip(level * weights[low] - sizes[low], 0, None))
    return shares


def join(parts: Iterable[Indices]) -> Indices:
    """All of these one behind the other."""
    return np.concatenate([NOTHING, *parts])


def without(samples: Indices, taken: Indices) -> Indices:
    """These samples, in their order, without the first of each that is `taken`, as often as it is."""
    if not len(taken):
        return samples
    order = np.argsort(samples, kind="stable")
    ordered = samples[order]
    nth = np.empty_like(samples)  # of its kind, from 0
    nth[order] = np.arange(len(samples)) - np.searchsorted(ordered, ordered)
    often = np.bincount(taken, minlength=int(samples.max(initial=0)) + 1)
    return samples[nth >= often[samples]]


def _deal_by(shares: Sequence[int], samples: int, rng: np.random.Generator, least: int) -> list[Indices]:
    sizes = apportion(samples, shares, least=least if samples >= len(shares) else 0)
    return np.split(rng.permutation(samples), np.cumsum(sizes)[:-1])


def _deal_unevenly(
    labels: NDArray[np.int64], workers: int, alpha: float, rng: np.random.Generator, least: int
) -> list[Indices]:
    pieces: list[list[Indices]] = [[] for _ in range(workers)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(workers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for piece, part in zip(pieces, np.split(members, cuts), strict=True):
            piece.append(part)
    shards = [np.concatenate(piece) for piece in pieces]
    # A small ALPHA can leave a worker with nothing: the richest gives it a sample, so that all train.
    for worker in range(workers):
        while len(shards[worker]) < least:
            richest = max(range(workers), key=lambda w: len(shards[w]))
            if len(shards[richest]) <= least:
                break
            given, shards[richest] = shards[richest][:1], shards[richest][1:]
            shards[worker] = np.concatenate([shards[worker], given])
    return shards
