"""Ranks that compare their logs in one thread: each goes on when all have asked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankwise.ledger.shares import Asks, Collect, Highest, Swap
from rankwise.ledger.waits import Log


def together(ranks: Sequence[Asks]) -> list[Log]:
    """What each rank has in the end."""
    answers: list[Log | None] = [None] * len(ranks)
    while True:
        asked, over = [], []
        for asks, answer in zip(ranks, answers, strict=True):
            try:
                asked.append(asks.send(answer))  # type: ignore[arg-type]
            except StopIteration as ending:
                over.append(ending.value)
        if over:
            assert not asked, "ranks ask each other for different things"
            return over
        answers = list(_answers(asked))


def _answers(asked: list[Swap | Highest | Collect]) -> Sequence[Log]:
    (kind,) = {type(one) for one in asked}
    if kind is Highest:
        return [np.max([one.values for one in asked], axis=0)] * len(asked)
    if kind is Collect:
        return [np.stack([one.values for one in asked])] * len(asked)
    parts = [np.split(one.rows, np.cumsum(one.counts)[:-1]) for one in asked]
    for rank, one in enumerate(asked):
        assert one.counts_in.tolist() == [len(part[rank]) for part in parts]
    return [np.concatenate([part[rank] for part in parts]) for rank in range(len(asked))]
