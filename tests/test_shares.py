"""Each rank compares its share of the exchanges for all ranks, and finds what one rank finds in all logs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankwise.comm import World, exchanges
from rankwise.ledger.ideal_time import BLOCK, IdealTime
from rankwise.ledger.shares import compare_shares
from rankwise.ledger.waits import ENTRY, compare, summed, violations

from .comparison_oracle import split_alone
from .effort import examples
from .lockstep import together
from .simulation import Clock, simulate, token


@st.composite
def logs(draw: st.DrawFn, most: int = 10**15, exchanges: int = 12) -> np.ndarray:
    """Logs of collective exchanges of any kind and any times, some in the background, some with stalls, some
    at the same time."""
    shape = draw(st.integers(1, 7)), draw(st.integers(0, exchanges))
    longest = draw(st.sampled_from([3, 50, 10**6]))

    def some(upto: int) -> np.ndarray:
        return draw(arrays(np.int64, shape, elements=st.integers(0, upto)))

    log = np.zeros(shape, ENTRY)
    log["pattern"] = draw(arrays(np.int64, shape[1], elements=st.integers(0, 2)))
    log["peer"] = draw(arrays(np.int64, shape[1], elements=st.integers(0, shape[0] - 1)))
    log["number"] = np.arange(shape[1])
    start = draw(st.integers(0, most)) + np.arange(shape[1]) * longest
    log["posted_ns"] = start + some(longest)
    log["entered_ns"] = log["posted_ns"] + some(longest)
    log["left_ns"] = log["entered_ns"] + some(2 * longest)
    log["inside_ns"] = np.maximum(log["left_ns"] - log["entered_ns"] + some(longest // 3) - longest // 6, 0)
    log["stall_start_ns"] = log["entered_ns"] + some(longest)
    log["stall_end_ns"] = np.minimum(log["stall_start_ns"] + some(longest), log["left_ns"])
    log["posted_busy_ns"] = np.cumsum(some(longest), axis=1)
    log["entered_busy_ns"] = log["posted_busy_ns"] + some(longest) * draw(st.booleans())
    return log


@examples(60, 300)
@given(logs())
def test_shares_find_what_one_rank_finds_in_all_logs(log: np.ndarray) -> None:
    """Waits, whom they are charged to, one step back too, stalls and contradictions are, to the nanosecond,
    those of the comparison of all logs by each rank, however many ranks there are for an exchange."""
    found = together([compare_shares(rank, len(log), log[rank]) for rank in range(len(log))])
    for rank, mine in enumerate(found):
        expected, split = split_alone(log, rank), summed(mine)
        assert split.wait_ns.tolist() == expected.wait_ns.tolist()
        assert split.late.tolist() == expected.late.tolist()
        assert split.stopped_ns.tolist() == expected.stopped_ns.tolist()
        assert split.charged_ns == expected.charged_ns
        assert split.hidden_ns == expected.hidden_ns
        assert mine["contradicts"].sum() == violations(log)
        assert mine.tobytes() == compare(log)[rank].tobytes()


@examples(40, 200)
@given(logs(exchanges=BLOCK // 4), st.integers(1, 9), st.lists(st.integers(0, 10**7), min_size=7, max_size=7))
def test_ideal_times_are_those_of_the_replay_on_one_rank(
    log: np.ndarray, repeats: int, waited: list[int]
) -> None:
    """Where each rank replays its own rows, with what is largest over all, each has waited as long as in the
    replay of all logs in turn; also in logs of many blocks, and behind an earlier comparison."""
    ranks = len(log)
    log = np.concatenate([log] * repeats, axis=1)
    alone, shared = IdealTime(ranks), [IdealTime(ranks) for _ in range(ranks)]
    for its in (alone, *shared):
        its._waited_ns = np.array(waited[:ranks], np.int64)
    alone.add(log, [log[0, :0]] * ranks)
    together([its.add_own(log[rank], rank) for rank, its in enumerate(shared)])
    for its in shared:
        assert its._waited_ns.tolist() == alone._waited_ns.tolist()


@pytest.mark.parametrize("ranks", [3, 40])
def test_a_share_is_of_as_many_rows_as_a_log_has(ranks: int) -> None:
    """No rank sends or gets many more rows than it has logged, whatever the number of ranks: its own twice,
    if shares are of one exchange, and those of two exchanges of all ranks at most."""
    rows = np.zeros(20, ENTRY)
    rows["number"] = np.arange(20)
    for rank in range(ranks):
        asked = next(compare_shares(rank, ranks, rows))
        assert len(asked.rows) <= 2 * len(rows)
        assert asked.counts_in.sum() <= len(rows) + 2 * ranks


def test_a_world_finds_the_same_by_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that share the comparison find who waited for whom, how long, and the same ideal times, as ranks
    that gather their logs, over several comparisons."""

    def program(world: World, clock: Clock) -> None:
        for turn in range(90):
            clock.work(1_000 * ((world.rank * 7 + turn * 5) % 11))
            if turn % 3 == 0:
                world.gather(token(), turn % world.size)
            elif turn % 3 == 1:
                world.broadcast(token(), turn % world.size)
            else:
                world.allreduce(token())
            if turn % 40 == 39:
                world.reconcile()
        world.barrier()

    def found(many: int) -> list[object]:
        monkeypatch.setattr(exchanges, "MANY_RANKS", many)
        logs = [world.exchange_log for world in simulate(4, program)]
        return [(dict(one.wait_on_ns), one.ideal_ns(), one.violations) for one in logs]

    assert found(2) == found(100)
