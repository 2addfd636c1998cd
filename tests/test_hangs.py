"""Which ranks hang and which are slow: the rule, by table."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.ledger.phases import PHASES
from rankwise.survival.hangs import Limits, Rest, hang, rest
from rankwise.system.activity import Activity, Doing

S = 1_000_000_000
WAIT_FOR_OTHERS = {"transfer", "wait", "recovery"}
STEPS = {"data", "forward", "backward", "optimizer", "pack", "evaluation", "other"}
LOCKED_WHILE_OTHERS_WAIT = ("locked", (0, 2))


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("doing", get_args(Doing))
@pytest.mark.parametrize("waiting", [(), (0, 2)])
def test_who_hangs(phase: str, doing: Doing, waiting: tuple[int, ...]) -> None:
    """A stopped rank hangs in any phase, one asleep in a lock where others wait for it and it does not wait
    itself, and no other, however long it takes."""
    hangs = doing == "stopped" or (
        (doing, waiting) == LOCKED_WHILE_OTHERS_WAIT and phase not in WAIT_FOR_OTHERS
    )
    found = hang(phase, 1e6, doing, 30.5, waiting=waiting, limits=Limits(hang_s=30))
    assert (found is not None) is hangs
    assert hang(phase, 1e6, doing, 29.5, waiting=waiting, limits=Limits(hang_s=30)) is None
    assert hang(phase, 1e6, doing, 1e6, waiting=waiting, limits=Limits()) is None


def test_words() -> None:
    """Last words say what the rank was at, for how long, and who waited for it."""
    limits = Limits(hang_s=30, step_s=60)
    words = {
        "stopped": "no sign of life for 31 s, stopped in forward; waiting for it: rank 0, 2",
        "locked": "no sign of life for 31 s, asleep in a lock in forward; waiting for it: rank 0, 2",
    }
    doing: Doing
    for doing in ("stopped", "locked"):
        found = hang("forward", 40, doing, 31, waiting=(0, 2), limits=limits)
        assert found is not None
        assert (found.why, found.seconds) == (words[doing], 31)
    found = hang("forward", 61, "running", 0, waiting=(), limits=limits)
    assert found is not None
    assert (found.why, found.seconds) == ("no end of forward after 61 s, with --step-timeout 60", 61)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("doing", ["running", "waiting", "locked"])
def test_a_step_without_an_end(phase: str, doing: Doing) -> None:
    """With a limit for them the phases of a step must end, whatever the rank does; no other phase must."""
    found = hang(phase, 61, doing, 0, waiting=(), limits=Limits(step_s=60))
    assert (found is not None) is (phase in STEPS)
    assert hang(phase, 59, doing, 0, waiting=(), limits=Limits(step_s=60)) is None


def rests(*seen: tuple[Doing, float], phases_s: dict[int, float] | None = None) -> list[float | None]:
    """Since when a process rests in second 0, 1, 2 and so on, as it is seen then with its CPU time in s; its
    phase has begun before, but for those given by second."""
    before: Rest | None = None
    found = []
    for second, (doing, cpu_s) in enumerate(seen):
        phase_ns = round((phases_s or {}).get(second, -1) * S)
        activity = Activity(doing, round(cpu_s * S))
        before = rest(before, activity, phase_ns=phase_ns, now_ns=second * S)
        found.append(None if before is None else before.since_ns / S)
    return found


@pytest.mark.parametrize("doing", ["stopped", "locked"])
def test_a_rest(doing: Doing) -> None:
    """It counts from when it was first seen, also if a thread that looks for news takes a hundredth of a
    core."""
    assert rests(*[(doing, 5.0)] * 4) == [0, 0, 0, 0]
    assert rests(*((doing, 5 + second / 100) for second in range(60))) == [0] * 60


def test_a_glimpse() -> None:
    """A lock that is tried again and again without using time is one; what runs is not stopped."""
    assert rests(("locked", 5), ("running", 5), ("running", 5), ("locked", 5)) == [0, 0, 0, 0]
    assert rests(("stopped", 5), ("running", 5), ("stopped", 5)) == [0, None, 2]


@pytest.mark.parametrize("doing", ["stopped", "locked"])
def test_what_is_no_rest(doing: Doing) -> None:
    """CPU time that moves, a wait for something that comes by itself, and another phase each end a rest."""
    assert rests(*((doing, second / 10) for second in range(4))) == [0, 1, 2, 3]
    assert rests((doing, 5), ("running", 6), (doing, 7), (doing, 7))[2:] == [2, 2]
    assert rests((doing, 5), ("waiting", 5), (doing, 5)) == [0, None, 2]
    assert rests(*[(doing, 5.0)] * 4, phases_s={2: 1.5, 3: 1.5}) == [0, 0, 2, 2]
    assert rests((doing, 5), (doing, 3), (doing, 3)) == [0, 1, 1]  # a child has ended meanwhile
    assert rests(("running", 5), ("waiting", 5)) == [None, None]


def test_one_rest_after_another() -> None:
    """A rank that was locked and is stopped has been stopped only since then."""
    assert rests(("locked", 5), ("stopped", 5), ("stopped", 5)) == [0, 1, 1]


@given(
    st.lists(st.tuples(st.sampled_from(get_args(Doing)), st.floats(0.1, 1)), min_size=1, max_size=60),
    st.integers(2, 30),
)
def test_what_computes_never_hangs(seen: list[tuple[Doing, float]], limit_s: int) -> None:
    """A rank that is not stopped and has a tenth of a core or more is ended by no limit for hangs, whatever
    it is seen doing."""
    before, cpu_s = None, 0.0
    for second, (doing, used_s) in enumerate(seen):
        if doing == "stopped":
            continue
        cpu_s += used_s
        before = rest(before, Activity(doing, round(cpu_s * S)), phase_ns=-1, now_ns=second * S)
        rest_s = 0.0 if before is None else second - before.since_ns / S
        assert hang("forward", second, doing, rest_s, waiting=(0,), limits=Limits(hang_s=limit_s)) is None
