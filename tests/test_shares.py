"""Each rank compares its share of the exchanges for all ranks, and finds what one rank finds in all logs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankwise.comm import World, exchanges
from rankwise.ledger.ideal_time import BLOCK, IdealTime, Replay, in_segments
from rankwise.ledger.messages import MessageMatcher, names_of
from rankwise.ledger.shares import Asks, Swap, compare_shares
from rankwise.ledger.waits import ENTRY, Pattern, compare, summed, violations

from .comparison_oracle import MatcherOfAll, OneChain, split_alone
from .effort import examples
from .lockstep import together
from .simulation import Clock, simulate, token

PARTS = ("wait_ns", "late", "stopped_ns")


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
    together([its.add_own(log[rank], rank, log.shape[1]) for rank, its in enumerate(shared)])
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


@pytest.mark.parametrize("ranks", [3, 40])
def test_a_rank_hands_out_no_more_messages_than_it_had(ranks: int) -> None:
    """What a rank hands others of its messages, and asks of them, is one row and at most one number for each,
    whatever the number of ranks; rounds of all are as many, with 40 ranks as with 3."""
    counts: list[Counter[str]] = [Counter() for _ in range(ranks)]

    def counted(rank: int, asks: Asks) -> Asks:
        answer = None
        while True:
            try:
                asked = asks.send(answer)
            except StopIteration as ending:
                return ending.value
            counts[rank][type(asked).__name__] += 1
            if isinstance(asked, Swap) and asked.rows.dtype != np.int64:
                counts[rank]["rows"] += len(asked.rows)
            answer = yield asked

    messages = []
    for rank in range(ranks):
        to, back = (rank + 1) % ranks, (rank - 1) % ranks
        send = [{"pattern": Pattern.SEND, "peer": to, "number": turn, "left_ns": 1} for turn in range(9)]
        receive = [
            {"pattern": Pattern.RECEIVE, "peer": back, "number": turn, "left_ns": 9} for turn in range(9)
        ]
        messages.append(table(send + receive))
    collective = np.zeros((ranks, 0), ENTRY)
    together(
        [
            counted(rank, go_on(IdealTime(ranks), MessageMatcher(rank), rank, collective, messages))
            for rank in range(ranks)
        ]
    )
    for its in counts:
        assert its == {"Swap": 4, "Highest": 1, "Collect": 1, "Give": 9, "Take": 9, "rows": 18}


def test_a_world_finds_the_same_by_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that share the comparison find who waited for whom, how long, and the same ideal times, as ranks
    that gather their logs, over several comparisons, with messages at once and in the background."""

    def program(world: World, clock: Clock) -> None:
        right, left = (world.rank + 1) % world.size, (world.rank - 1) % world.size
        for turn in range(90):
            clock.work(1_000 * ((world.rank * 7 + turn * 5) % 11))
            if turn % 5 == 0:
                world.gather(token(), turn % world.size)
            elif turn % 5 == 1:
                world.broadcast(token(), turn % world.size)
            elif turn % 5 == 2:
                world.allreduce(token())
            elif turn % 5 == 3:
                receive, send = world.start_receive(token(), left), world.start_send(token(), right)
                clock.work(3_000 * world.rank)
                send.wait()
                receive.wait()
            elif world.rank:
                world.send(token(), 0)
            else:
                for source in range(1, world.size):
                    world.receive(token(), source)
            if turn % 40 == 39:
                world.reconcile()
        world.barrier()

    def found(many: int) -> list[object]:
        monkeypatch.setattr(exchanges, "MANY_RANKS", many)
        # Exchanges take no time, as of comparing itself there are not as many.
        logs = [world.exchange_log for world in simulate(4, program, transfer_ns=0)]
        return [(dict(one.wait_on_ns), one.ideal_ns(), one.violations) for one in logs]

    assert found(2) == found(100)


@st.composite
def programs(draw: st.DrawFn, patterns: list[Pattern]) -> list[tuple[np.ndarray, list[np.ndarray]]]:
    """What ranks log of a program of theirs, in some comparisons: collective exchanges and messages, at
    once and in the background, in an order in which they can have happened, with any times between."""
    ranks = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    clock, busy = rng.integers(0, 50, ranks), np.zeros(ranks, np.int64)
    numbers: dict[tuple[int, int], int] = {}
    open_ends: list[tuple[int, dict[str, int]]] = []  # sends and receives in the background
    logs = []
    for _ in range(draw(st.integers(1, 3))):
        collective: list[list[dict[str, int]]] = [[] for _ in range(ranks)]
        messages: list[list[dict[str, int]]] = [[] for _ in range(ranks)]

        def work(rank: int) -> None:
            spent = int(rng.integers(0, 60))
            clock[rank] += spent
            busy[rank] += spent * int(rng.integers(0, 2))

        def at(rank: int) -> dict[str, int]:
            work(rank)
            return {"posted_ns": int(clock[rank]), "posted_busy_ns": int(busy[rank])}

        def over(rank: int, row: dict[str, int], upto: int) -> None:
            work(rank)
            row |= {"entered_ns": int(clock[rank]), "entered_busy_ns": int(busy[rank])}
            clock[rank] = row["left_ns"] = max(clock[rank], upto) + int(rng.integers(1, 9))
            row["inside_ns"] = row["left_ns"] - row["entered_ns"]
            if rng.random() < 0.2:
                row["stall_start_ns"], row["stall_end_ns"] = row["entered_ns"], row["left_ns"] - 1

        for _ in range(draw(st.integers(0, 25))):
            if rng.random() < 0.4:
                pattern, root = patterns[rng.integers(len(patterns))], int(rng.integers(ranks))
                rows = [{"pattern": pattern, "peer": root, **at(rank)} for rank in range(ranks)]
                last = max(row["posted_ns"] for row in rows)
                for rank, row in enumerate(rows):
                    needs_all = pattern == Pattern.ALL_TO_ALL or (
                        pattern == Pattern.ALL_TO_ONE and rank == root
                    )
                    needs_root = pattern == Pattern.ONE_TO_ALL
                    upto = last if needs_all else rows[root]["posted_ns"] if needs_root else 0
                    over(rank, row, upto)
                    collective[rank].append(row)
                continue
            source, dest = (int(rank) for rank in rng.permutation(ranks)[:2])
            number = numbers[source, dest] = numbers.get((source, dest), -1) + 1
            send = {"pattern": Pattern.SEND, "peer": dest, "number": number, **at(source)}
            receive = {"pattern": Pattern.RECEIVE, "peer": source, "number": number, **at(dest)}
            for rank, row in ((source, send), (dest, receive)):
                if rng.random() < 0.3:
                    open_ends.append((rank, row))
                else:
                    over(rank, row, send["posted_ns"] + 1)
                    messages[rank].append(row)
        kept = []
        for rank, row in open_ends:
            if rng.random() < 0.5:
                over(rank, row, row["posted_ns"] + 10_000)
                messages[rank].append(row)
            else:
                kept.append((rank, row))
        open_ends = kept
        logs.append((np.stack([table(rows) for rows in collective]), [table(rows) for rows in messages]))
    return logs


def table(rows: list[dict[str, int]]) -> np.ndarray:
    return np.array([tuple(row.get(name, 0) for name in ENTRY.names or ()) for row in rows], ENTRY)


def go_on(
    its: IdealTime, matcher: MessageMatcher, rank: int, collective: np.ndarray, messages: list[np.ndarray]
) -> Asks:
    """What a rank does in one comparison, with its own logs."""
    mine = in_segments(messages[rank], collective[rank])
    found, *others = yield from matcher.compare(mine, len(messages))
    yield from its.add_own(collective[rank], rank, collective.shape[1], Replay(mine, *others))
    return found


@examples(60, 300)
@given(programs(list(Pattern)[:3]))
def test_ranks_with_their_own_messages_find_what_one_with_all_finds(
    logs: list[tuple[np.ndarray, list[np.ndarray]]],
) -> None:
    """Waiting in messages, whom it is charged to, one step back too, and the ideal times are, to the
    nanosecond, those that are found in the logs of all ranks, also where the ends of a message are told in
    different comparisons; and waits are those that were found before ranks shared the work."""
    ranks = len(logs[0][1])
    alone, shared = IdealTime(ranks), [IdealTime(ranks) for _ in range(ranks)]
    own, few, before = (
        [kind(rank) for rank in range(ranks)] for kind in (MessageMatcher, MessageMatcher, MatcherOfAll)
    )
    for collective, messages in logs:
        alone.add(collective, messages)
        found = together(
            [go_on(its, own[rank], rank, collective, messages) for rank, its in enumerate(shared)]
        )
        for rank, mine in enumerate(found):
            assert shared[rank]._waited_ns.tolist() == alone._waited_ns.tolist()
            names, expected = before[rank].split(messages)
            for its in (mine, few[rank].split(messages)):
                waits = {
                    name: numbers
                    for name, *numbers in zip(
                        its.names, *(getattr(its.split, part).tolist() for part in PARTS), strict=True
                    )
                }
                assert waits == {
                    name: numbers
                    for name, *numbers in zip(
                        names, *(getattr(expected, part).tolist() for part in PARTS), strict=True
                    )
                }
                assert its.split.charged_ns == expected.charged_ns
                assert its.split.hidden_ns == expected.hidden_ns


@examples(60, 300)
@given(programs([Pattern.ALL_TO_ALL]))
def test_ideal_times_with_messages_are_those_of_one_chain(
    logs: list[tuple[np.ndarray, list[np.ndarray]]],
) -> None:
    """Where collective exchanges are of all with all, ranks that replay their own messages have waited as
    long as in a replay of all logs as one chain, as far as both ends of messages are logged together."""
    ranks = len(logs[0][1])
    chain, shared = OneChain(ranks), [IdealTime(ranks) for _ in range(ranks)]
    matchers = [MessageMatcher(rank) for rank in range(ranks)]
    for collective, messages in logs:
        ends = Counter(name for rank, log in enumerate(messages) for name in names_of(log, rank))
        messages = [
            log[[ends[name] == 2 for name in names_of(log, rank)]] for rank, log in enumerate(messages)
        ]
        chain.add(collective, messages)
        together([go_on(its, matchers[rank], rank, collective, messages) for rank, its in enumerate(shared)])
        for its in shared:
            assert its._waited_ns.tolist() == chain.waited_ns.tolist()
