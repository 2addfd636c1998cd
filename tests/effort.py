"""How much the tests do: what each change must pass in minutes, or all there is (`make test-full`)."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from itertools import product
from typing import Any

import pytest
from hypothesis import settings

FULL = os.environ.get("RANKWISE_TESTS") == "full"
"""`make test-full` sets it."""

only_in_full = pytest.mark.full
"""Of a test, or of a case of one, that `make test` leaves out. CONTRIBUTING.md lists them."""


def examples(daily: int, full: int, **more: Any) -> settings:
    """How many examples hypothesis draws for a test every day, and in the full run."""
    return settings(max_examples=full if FULL else daily, **more)


def daily(cases: Iterable[Any], every_day: Collection[Any], *, unpacked: bool = True) -> list[Any]:
    """All `cases` as parameters, of which `make test` tries those in `every_day`. A tuple stands for several
    parameters if it is `unpacked`."""
    cases = list(cases)
    unknown = [case for case in every_day if case not in cases]
    assert not unknown, f"no cases of this test: {unknown}"

    def values(case: Any) -> tuple[Any, ...]:
        return case if unpacked and isinstance(case, tuple) else (case,)

    return [pytest.param(*values(case), marks=() if case in every_day else only_in_full) for case in cases]


def rotating(cases: Iterable[Any], *others: Iterable[Any], daily_each: int = 1, one_in: int = 1) -> list[Any]:
    """All combinations of `cases` with the `others`, as parameters. Every day each of the `cases`, or the
    first `one_in` so many, is tried with `daily_each` of the combinations of the others; the next one takes
    those that follow, so that each of them has its turn too."""
    rest = list(product(*others))
    combined, every_day, turn = [], [], 0
    for place, case in enumerate(cases):
        first = case if isinstance(case, tuple) else (case,)
        combined += [(*first, *more) for more in rest]
        if place % one_in == 0:
            every_day += [(*first, *rest[(turn + more) % len(rest)]) for more in range(daily_each)]
            turn += daily_each
    return daily(combined, every_day)
