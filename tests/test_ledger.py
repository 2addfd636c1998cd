"""The ledger closes, to the nanosecond."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rankwise.ledger import PHASES, Ledger


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
