"""Ranks that compare their logs in one thread: each goes on when all have asked."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from rankwise.ledger.shares import Asked, Asks, Collect, Give, Highest, Take
from rankwise.ledger.waits import Log


def together(ranks: Sequence[Asks]) -> list[Any]:
    """What each rank has in the end."""
    given: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    over: dict[int, Any] = {}
    asked: dict[int, Asked] = {}
    answers: dict[int, Any] = dict.fromkeys(range(len(ranks)))
    while len(over) < len(ranks):
        moved = False
        for rank, answer in list(answers.items()):
            del answers[rank]
            try:
                asked[rank] = ranks[rank].send(answer)
            except StopIteration as ending:
                over[rank] = ending.value
            moved = True
        for rank, one in list(asked.items()):
            if isinstance(one, Give):
                given[rank, one.to].append(one.value)
                answers[rank] = None
            elif isinstance(one, Take) and given[one.source, rank]:
                answers[rank] = given[one.source, rank].popleft()
            if rank in answers:
                del asked[rank]
        if not moved:
            assert len(asked) == len(ranks), "ranks wait for each other for ever, or one is at its end"
            answers = dict(enumerate(_answers([asked[rank] for rank in range(len(ranks))])))
            asked.clear()
    assert not any(given.values()), "a number was given that nobody took"
    return [over[rank] for rank in range(len(ranks))]


def _answers(asked: list[Asked]) -> Sequence[Log]:
    (kind,) = {type(one) for one in asked}
    if kind is Highest:
        return [np.max([one.values for one in asked], axis=0)] * len(asked)
    if kind is Collect:
        return [np.stack([one.values for one in asked])] * len(asked)
    parts = [np.split(one.rows, np.cumsum(one.counts)[:-1]) for one in asked]
    for rank, one in enumerate(asked):
        assert one.counts_in.tolist() == [len(part[rank]) for part in parts]
    return [np.concatenate([part[rank] for part in parts]) for rank in range(len(asked))]
