"""Who trains on which sample: pure functions of the seed, the epoch and the number of workers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import ConfigError, unknown_name

Indices = NDArray[np.int64]


def deal(
    mode: str, *, labels: NDArray[np.int64], shares: Sequence[int], epoch: int, seed: int
) -> list[Indices]:
    """The samples of each worker in one epoch, in the order of training.

    Every index of `labels` [n] stands in exactly one shard, once. `shares` [workers] say how large the
    shards are to each other. `mode` is ``redealt`` (new shards each epoch), ``fixed`` (the same shards all
    along, new order each epoch) or ``dirichlet:ALPHA`` (fixed shards with uneven classes, whose sizes are by
    chance; Hsu et al. 2019, arXiv:1909.06335). Raises ConfigError for another mode.
    """
    alpha = parse_shards(mode)
    if alpha is not None:
        shards = _deal_unevenly(labels, len(shares), alpha, np.random.default_rng([seed, 1]))
    elif mode == "fixed":
        shards = _deal_by(shares, len(labels), np.random.default_rng([seed, 2]))
    else:
        return _deal_by(shares, len(labels), np.random.default_rng([seed, 3, epoch]))
    return [
        np.random.default_rng([seed, 4, epoch, worker]).permutation(shard)
        for worker, shard in enumerate(shards)
    ]


def replicate(*, samples: int, workers: int, epoch: int, seed: int) -> list[Indices]:
    """All samples for every worker, each in an order of its own."""
    return [np.random.default_rng([seed, 5, epoch, worker]).permutation(samples) for worker in range(workers)]


def parse_shards(mode: str) -> float | None:
    """ALPHA of ``dirichlet:ALPHA``, or None for ``redealt`` and ``fixed``; ConfigError for anything else."""
    name, colon, argument = mode.partition(":")
    if mode in ("redealt", "fixed"):
        return None
    if name != "dirichlet":
        raise ConfigError(unknown_name("--shards", mode, ["redealt", "fixed", "dirichlet:ALPHA"]))
    try:
        alpha = float(argument)
    except ValueError:
        alpha = float("nan")
    if not (colon and 0 < alpha < float("inf")):
        raise ConfigError(f"--shards {mode}: ALPHA must be a number above 0, e.g. dirichlet:0.5")
    return alpha


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


def _deal_by(shares: Sequence[int], samples: int, rng: np.random.Generator) -> list[Indices]:
    sizes = apportion(samples, shares, least=int(samples >= len(shares)))
    return np.split(rng.permutation(samples), np.cumsum(sizes)[:-1])


def _deal_unevenly(
    labels: NDArray[np.int64], workers: int, alpha: float, rng: np.random.Generator
) -> list[Indices]:
    pieces: list[list[Indices]] = [[] for _ in range(workers)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(workers, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
        for piece, part in zip(pieces, np.split(members, cuts), strict=True):
            piece.append(part)
    shards = [np.concatenate(piece) for piece in pieces]
    # A small ALPHA can leave a worker with nothing: the richest gives it one sample, so that all train.
    for worker, shard in enumerate(shards):
        if len(shard) == 0:
            richest = max(range(workers), key=lambda w: len(shards[w]))
            if len(shards[richest]) > 1:
                shards[worker], shards[richest] = shards[richest][:1], shards[richest][1:]
    return shards
