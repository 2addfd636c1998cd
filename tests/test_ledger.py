"""The ledger closes, to the nanosecond."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankwise.ledger.phases as ledgers
from rankwise.ledger.phases import EXCHANGING, PHASES, Ledger, measure_cost


class FakeClock:
    """A clock that moves only when told."""

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns


@given(
    st.integers(0, 10**18),
    st.lists(st.tuples(st.sampled_from(PHASES), st.integers(0, 10**12)), max_size=50),
)
def test_phases_add_up_to_the_wall_time(start_ns: int, story: list[tuple[str, int]]) -> None:
    """Whatever a rank does and however long, its phases add up to its wall time exactly."""
    clock = FakeClock(start_ns)
    ledger = Ledger(clock)
    for phase, duration_ns in story:
        ledger.enter(phase)
        clock.now_ns += duration_ns
    totals = ledger.close()
    wall_ns, phases_ns = totals.wall_ns, totals.phases_ns
    assert wall_ns == sum(duration for _, duration in story)
    assert sum(phases_ns.values()) == wall_ns
    for phase in PHASES:
        assert phases_ns[phase] == sum(duration for name, duration in story if name == phase)


def test_time_before_the_ledger_is_startup() -> None:
    """What came before the ledger was made, since the process started, is charged to startup."""
    clock = FakeClock(1_000)
    ledger = Ledger(clock, start_ns=400)
    clock.now_ns = 1_100
    totals = ledger.close()
    assert (totals.wall_ns, totals.phases_ns) == (700, {**dict.fromkeys(PHASES, 0), "startup": 700})


def test_a_phase_gives_the_cursor_back() -> None:
    """A block spent in a phase returns to the phase around it, also when it raises."""
    clock = FakeClock()
    ledger = Ledger(clock)
    ledger.enter("forward")
    try:
        with ledger.phase("transfer"):
            clock.now_ns += 5
            raise ValueError
    except ValueError:
        pass
    clock.now_ns += 7
    phases_ns = ledger.close().phases_ns
    assert (phases_ns["transfer"], phases_ns["forward"]) == (5, 7)


LENGTHS = st.integers(0, 10**9)


@given(st.lists(st.tuples(st.sampled_from(PHASES), LENGTHS, LENGTHS), min_size=1, max_size=50), LENGTHS)
def test_time_off_the_cpu_is_wall_time_without_cpu_time(
    story: list[tuple[str, int, int]], cpu_ns: int
) -> None:
    """In each phase outside exchanges the ledger tells how long its thread was not on a CPU, whatever that
    had computed before there was a ledger."""
    clock, cpu = FakeClock(), FakeClock(cpu_ns)
    ledger = Ledger(clock, cpu_clock=cpu)
    for phase, on_ns, off_ns in story:
        ledger.enter(phase)
        clock.now_ns += on_ns + off_ns
        cpu.now_ns += on_ns
    off_cpu_ns = ledger.close().off_cpu_ns
    for phase in set(PHASES) - set(EXCHANGING):
        assert off_cpu_ns[phase] == sum(off for name, _, off in story if name == phase)
    assert not off_cpu_ns.keys() & set(EXCHANGING)


@given(LENGTHS, LENGTHS, LENGTHS)
def test_startup_off_the_cpu_counts_from_the_start_of_the_process(
    start_ns: int, on_ns: int, off_ns: int
) -> None:
    """Where the start of the process is given, what its thread has computed since then was on a CPU."""
    ledger = Ledger(FakeClock(start_ns + on_ns + off_ns), start_ns=start_ns, cpu_clock=FakeClock(on_ns))
    totals = ledger.close()
    assert totals.phases_ns["startup"] == on_ns + off_ns
    assert totals.off_cpu_ns["startup"] == off_ns


@given(st.lists(st.tuples(st.sampled_from(PHASES[1:]), LENGTHS), max_size=50), st.integers(0, 10**8))
def test_its_own_cost_is_shown_and_the_sum_stays(story: list[tuple[str, int]], cost_ns: int) -> None:
    """What changes of phase cost is moved from where they happened to `instrument`, and none gets
    negative."""
    clock = FakeClock()
    ledger = Ledger(clock, cost_ns=cost_ns)
    for phase, duration_ns in story:
        ledger.enter(phase)
        clock.now_ns += duration_ns
    totals = ledger.close()
    assert sum(totals.phases_ns.values()) == totals.wall_ns
    assert min(totals.phases_ns.values()) >= 0
    spent_ns = sum(duration for name, duration in story if name == "instrument")
    shown_ns = totals.phases_ns["instrument"] - spent_ns
    assert 0 <= shown_ns <= (len(story) + 1) * cost_ns
    if all(duration_ns >= len(story) * cost_ns for _, duration_ns in story):
        others = [name for name, _ in story if name != "instrument"]
        assert shown_ns == len(others) * cost_ns


def test_busy_is_what_is_neither_startup_nor_exchange() -> None:
    """Busy time counts computing since start-up, whatever was found out about exchanges meanwhile."""
    clock = FakeClock()
    ledger = Ledger(clock)
    clock.now_ns += 100
    for phase, duration_ns in (("forward", 20), ("transfer", 30), ("other", 4)):
        ledger.enter(phase)
        clock.now_ns += duration_ns
    ledger.enter("data")
    assert ledger.busy_ns == 24
    ledger.move("transfer", "wait", 10)
    ledger.move("transfer", "other", 5)
    assert ledger.busy_ns == 24


@given(
    st.lists(st.lists(st.tuples(st.sampled_from(PHASES), LENGTHS, st.floats(0, 1)), max_size=5), max_size=8),
    st.sampled_from([0, 1_000, 10**6]),
)
def test_each_period_adds_up_however_late_time_is_moved(
    story: list[list[tuple[str, int, float]]], cost_ns: int
) -> None:
    """A period's phases add up to its length and none is negative, also when time in it is moved only after
    it; without a cost of its own the ledger's totals are the sums of its periods'."""
    clock = FakeClock()
    ledger = Ledger(clock, cost_ns=cost_ns)
    for period in story:
        for phase, duration_ns, _ in period:
            ledger.enter(phase)
            clock.now_ns += duration_ns
        ledger.begin_period()
    for number, period in enumerate(story):
        for phase, duration_ns, part in period:
            ledger.move(phase, "wait", int(duration_ns * part), number)
    for number, period in enumerate(story):
        phases_ns = ledger.phases_of(number)
        assert min(phases_ns.values()) >= 0
        assert sum(phases_ns.values()) == sum(duration_ns for _, duration_ns, _ in period)
        assert phases_ns["wait"] <= sum(
            duration_ns if phase == "wait" else int(duration_ns * part) for phase, duration_ns, part in period
        )
    if not cost_ns:
        totals_ns = ledger.close().phases_ns
        for phase in PHASES:
            assert totals_ns[phase] == sum(ledger.phases_of(number)[phase] for number in range(len(story)))


def test_measuring_the_cost_gives_a_small_number() -> None:
    """A change of phase costs something, and less than a tenth of a millisecond."""
    assert 0 < measure_cost() < 100_000


def test_the_cost_is_that_of_one_change_in_the_quickest_of_several_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What disturbs some of the trials does not count."""
    clock = FakeClock(10**15)
    costs_ns = itertools.chain([7_000, 3_000], itertools.repeat(5_000))

    class Ledger:
        def __init__(self) -> None:
            self.cost_ns = next(costs_ns)

        def enter(self, phase: str) -> None:
            clock.now_ns += self.cost_ns

    monkeypatch.setattr(ledgers, "Ledger", Ledger)
    monkeypatch.setattr(ledgers, "time", SimpleNamespace(monotonic_ns=clock))
    assert measure_cost() == 3_000
