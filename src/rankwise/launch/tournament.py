"""Which options make a run fastest, by measurements in turn; knows nothing of what is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Options = dict[str, Any]

TURNS = 3
"""Measurements of each contender, in turn with the others, so that a drifting machine favours none."""

HOPELESS = 1.15
"""A challenger that takes longer than the champion by this factor in the first turn gets no other."""

MARGIN = 0.97
"""A challenger must take less than this part of the champion's time, by medians, and less in every turn."""


class TrialFailed(Exception):
    """Options that cannot be measured, and why."""


@dataclass
class Tried:
    """Options on top of what was given, and the seconds of each turn; or why there are none."""

    options: Options
    seconds: list[float] = field(default_factory=list)
    failed: str = ""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


Measure = Callable[[Options], float]
Stage = Callable[[Tried], Sequence[Options]]
"""From the champion so far to its challengers."""


def choose(stages: Sequence[Stage], measure: Measure, tell: Callable[[list[Tried], Tried], None]) -> Options:
    """The options with which `measure` gives the least, {} if nothing is better than what was given.

    Each stage sets challengers against the champion so far; `tell` gets who took part, the champion first,
    and the winner. A champion of several stages, which never met the options as they were given, must win
    against those in the end. Raises TrialFailed if those cannot be measured.
    """
    champion = Tried({})
    wins = 0
    for stage in stages:
        challengers = stage(champion)
        if challengers:
            before = champion
            champion = _meet(champion.options, challengers, measure, tell)
            wins += champion.options != before.options
    if wins > 1:
        champion = _meet({}, [champion.options], measure, tell)
    return champion.options


def _meet(
    champion: Options,
    challengers: Sequence[Options],
    measure: Measure,
    tell: Callable[[list[Tried], Tried], None],
) -> Tried:
    ruler = Tried(champion)
    others = [Tried(options) for options in challengers]
    for turn in range(TURNS):
        left = [one for one in others if not one.failed and len(one.seconds) == turn]
        order = [ruler, *left] if turn % 2 == 0 else [*reversed(left), ruler]
        for one in order:
            try:
                one.seconds.append(measure(one.options))
            except TrialFailed as error:
                if one is ruler:
                    raise
                one.failed = str(error)
        for one in left:
            if turn == 0 and one.seconds and one.seconds[0] > HOPELESS * ruler.seconds[0]:
                one.failed = "slower by far"
    winners = [one for one in others if not one.failed and _beats(one, ruler)]
    winner = min(winners, key=lambda one: one.median_s, default=ruler)
    tell([ruler, *others], winner)
    return winner


def _beats(challenger: Tried, champion: Tried) -> bool:
    each = zip(challenger.seconds, champion.seconds, strict=True)
    return challenger.median_s < MARGIN * champion.median_s and all(mine < its for mine, its in each)
