"""Waiting told apart from transfer, and charged to the rank that caused it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankwise.comm import BackgroundExchange, World
from rankwise.comm.clock_sync import CommonClock
from rankwise.errors import RankLost
from rankwise.ledger.exchange_log import ExchangeLog
from rankwise.ledger.ideal_time import IdealTime
from rankwise.ledger.messages import MessageMatcher
from rankwise.ledger.phases import PHASES, Ledger
from rankwise.ledger.timeline import Timeline
from rankwise.ledger.waits import ENTRY, Pattern, split, violations

from .effort import examples
from .lockstep import together
from .simulation import Clock, Program, simulate, token

TRANSFER_NS = 1_000
DELAY_NS = 777_000_000


@st.composite
def logs(draw: st.DrawFn) -> np.ndarray:
    """Logs of collective exchanges with any times, some in the background, some with stalls."""
    ranks, exchanges = draw(st.integers(2, 6)), draw(st.integers(0, 20))

    def some(most: int) -> np.ndarray:
        return draw(arrays(np.int64, (ranks, exchanges), elements=st.integers(0, most)))

    log = np.zeros((ranks, exchanges), ENTRY)
    log["pattern"] = draw(arrays(np.int64, exchanges, elements=st.integers(0, 2)))
    log["peer"] = draw(arrays(np.int64, exchanges, elements=st.integers(0, ranks - 1)))
    log["posted_ns"] = some(10**15)
    log["entered_ns"] = log["posted_ns"] + some(10**12)
    log["left_ns"] = log["entered_ns"] + some(10**12)
    log["inside_ns"] = np.maximum(log["left_ns"] - log["entered_ns"] + some(10**6) - 5 * 10**5, 0)
    log["stall_start_ns"] = log["entered_ns"] + some(10**12)
    log["stall_end_ns"] = np.minimum(log["stall_start_ns"] + some(10**12), log["left_ns"])
    return log


@given(logs())
def test_waiting_is_a_part_of_the_exchange_and_charged_to_others(log: np.ndarray) -> None:
    """Whatever the times, and however clocks drift, a rank waits no longer than it was in an exchange by its
    own clock, all of it is charged, and none to itself."""
    for rank in range(len(log)):
        found = split(log, rank)
        assert (found.wait_ns >= 0).all()
        assert (found.stopped_ns >= 0).all()
        assert (found.wait_ns + found.stopped_ns <= log[rank]["inside_ns"]).all()
        assert sum(found.charged_ns.values()) == found.wait_ns.sum()
        assert all(ns > 0 for ns in found.charged_ns.values())
        assert rank not in found.charged_ns
        assert 0 <= found.hidden_ns <= (log[rank]["entered_ns"] - log[rank]["posted_ns"]).sum()


@given(logs())
def test_the_last_to_come_does_not_wait(log: np.ndarray) -> None:
    """In an exchange of all with all the rank that comes last waits for nobody, unless somebody stops."""
    log["pattern"] = Pattern.ALL_TO_ALL
    log["stall_start_ns"] = log["stall_end_ns"] = 0
    for exchange in range(log.shape[1]):
        last = int(log["posted_ns"][:, exchange].argmax())
        assert split(log[:, exchange : exchange + 1], last).wait_ns == 0


def entry(**columns: int) -> tuple[int, ...]:
    columns["inside_ns"] = columns.get("left_ns", 0) - columns.get("entered_ns", 0)
    return tuple(columns.get(name, 0) for name in ENTRY.names or ())


def test_clocks_that_contradict_each_other_are_counted() -> None:
    """If somebody left an exchange of all before somebody else had come, the clocks disagree."""
    log = np.array([[entry(left_ns=10)], [entry(posted_ns=20, left_ns=30)]], ENTRY)
    assert violations(log) == 1
    log["left_ns"][0] = 25
    assert violations(log) == 0


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_rank_that_stops_inside_an_exchange_is_the_late_one(size: int) -> None:
    """Time in which a rank did not run inside an exchange is the others' wait for it, and its own `other`."""
    for stopped in range(size):
        log = np.array(
            [[entry(posted_ns=100 + rank, entered_ns=100 + rank, left_ns=2_050)] for rank in range(size)],
            ENTRY,
        )
        log["stall_start_ns"][stopped], log["stall_end_ns"][stopped] = 500, 2_000
        other = (stopped + 1) % size  # has a short one of its own, and a later one
        log["stall_start_ns"][other], log["stall_end_ns"][other] = 2_005, 2_030
        latest = 100 + size - 1
        for rank in range(size):
            found = split(log, rank)
            early = latest - 100 - rank
            if rank == stopped:
                assert (found.stopped_ns.sum(), found.wait_ns.sum()) == (1_500, early)
                continue
            assert (found.stopped_ns.sum(), found.wait_ns.sum()) == (0, early + 1_500)
            assert found.charged_ns[stopped] >= 1_500


def test_a_stop_is_passed_on_by_a_master() -> None:
    """Workers that wait for a master that waits for a stopped worker wait for that worker."""
    gather = {"pattern": Pattern.ALL_TO_ONE}
    spread = {"pattern": Pattern.ONE_TO_ALL}
    log = np.array(
        [
            [
                entry(**gather, left_ns=2_010),
                entry(**spread, posted_ns=2_020, entered_ns=2_020, left_ns=2_030),
            ],
            [entry(**gather, left_ns=2_000, stall_start_ns=10, stall_end_ns=2_000), entry(**spread)],
            [entry(**gather, left_ns=5), entry(**spread, posted_ns=6, entered_ns=6, left_ns=2_035)],
        ],
        ENTRY,
    )
    log["posted_ns"][1, 1] = log["entered_ns"][1, 1] = log["left_ns"][1, 1] = 2_040
    assert split(log, 0).charged_ns == {1: 1_990}
    assert split(log, 1).stopped_ns.tolist() == [1_990, 0]
    found = split(log, 2)
    assert found.wait_ns[1] == 2_020 - 6
    assert found.charged_ns[1] == 1_990


def check_sums(worlds: list[World]) -> None:
    for world in worlds:
        totals = world.ledger.close()
        assert sum(totals.phases_ns.values()) == totals.wall_ns
        assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize(
    "exchange", ["allreduce", "background", "master", "broadcast", "messages", "anybody"]
)
@pytest.mark.parametrize("hosts", ["one host", "several hosts"])
def test_an_injected_delay_is_charged_to_its_rank(size: int, exchange: str, hosts: str) -> None:
    """A delay of known length in rank k's work shows up as the others' wait for k, for every kind of
    exchange, on one host and on hosts whose clocks are days apart and drift."""
    for slow in range(size):

        def program(world: World, clock: Clock, slow: int = slow) -> None:
            me = world.rank
            others = [rank for rank in range(size) if rank != me]
            for _ in range(3):
                with world.ledger.phase("forward"):
                    clock.work(DELAY_NS if me == slow else 0)
                if exchange == "allreduce":
                    world.allreduce(token())
                elif exchange == "background":
                    world.start_allreduce(token()).wait()
                elif exchange == "master":
                    world.gather(token(), 0)
                    world.broadcast(token(), 0)
                elif exchange == "broadcast":
                    world.broadcast(token(), slow)
                elif exchange == "messages":
                    for other in others:
                        world.send(token(), other)
                    for other in others:
                        world.receive(token(), other)
                else:
                    for other in others:
                        world.start_send(token(), other).wait()
                    for _ in others:
                        world.receive(token())

        clocks = None
        if hosts == "several hosts":
            clocks = [Clock(rank * 10**15, 1e-5 * rank) for rank in range(size)]
        worlds = simulate(size, program, clocks=clocks)
        check_sums(worlds)
        near_ns = 200 * TRANSFER_NS if clocks else 50 * TRANSFER_NS
        for world in worlds:
            phases_ns = world.ledger.close().phases_ns
            if world.rank == slow:
                assert phases_ns["forward"] == pytest.approx(3 * DELAY_NS, rel=1e-4)
                assert phases_ns["wait"] <= near_ns
            else:
                assert phases_ns["forward"] == 0
                assert phases_ns["wait"] == pytest.approx(3 * DELAY_NS, rel=1e-4, abs=near_ns)
                assert world.exchange_log.wait_on_ns[slow] == pytest.approx(phases_ns["wait"], abs=near_ns)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("hosts", ["one host", "several hosts"])
def test_a_stop_inside_an_exchange_is_charged(size: int, hosts: str) -> None:
    """A rank that is stopped inside an exchange has that in `other`, and the others wait for it, whatever
    clocks they read."""
    for stopped in range(size):

        def program(world: World, clock: Clock, stopped: int = stopped) -> None:
            with world.ledger.phase("forward"):
                clock.work(1_000_000)
            if world.rank == stopped:
                clock.stop_inside(DELAY_NS)
            world.allreduce(token())

        clocks = None
        if hosts == "several hosts":
            clocks = [Clock((4 - rank) * 10**15) for rank in range(size)]
        worlds = simulate(size, program, clocks=clocks)
        check_sums(worlds)
        for world in worlds:
            phases_ns = world.ledger.close().phases_ns
            if world.rank == stopped:
                assert phases_ns["other"] == pytest.approx(DELAY_NS, abs=100 * TRANSFER_NS)
                assert phases_ns["wait"] <= 100 * TRANSFER_NS
            else:
                waited_ns = world.exchange_log.wait_on_ns[stopped]
                assert waited_ns == pytest.approx(DELAY_NS, abs=100 * TRANSFER_NS)


def test_what_is_hidden_stands_beside_the_sum() -> None:
    """An exchange that goes on behind computing is hidden, and no waiting; only the rest is in the sum."""

    def program(world: World, clock: Clock) -> None:
        clock.work(50_000 * world.rank)
        exchange = world.start_allreduce(token())
        with world.ledger.phase("backward"):
            clock.work(1_000_000)
        exchange.wait()

    worlds = simulate(2, program)
    check_sums(worlds)
    for world in worlds:
        phases_ns = world.ledger.close().phases_ns
        assert phases_ns["backward"] == 1_000_000
        assert phases_ns["wait"] <= 50_000 + 10 * TRANSFER_NS
        # Rank 0 posted first: it has company, and something to hide, only once rank 1 has come.
        assert world.exchange_log.hidden_ns == pytest.approx(
            950_000 if world.rank == 0 else 1_000_000, abs=TRANSFER_NS
        )


@pytest.mark.parametrize("hosts", ["one host", "several hosts"])
@pytest.mark.parametrize("late_end", ["receive", "send"])
def test_the_ends_of_a_message_may_be_told_apart(late_end: str, hosts: str) -> None:
    """A message whose two ends stand in different logs is split like any other, whatever the clocks, and
    measuring those takes nobody's message."""

    def program(world: World, clock: Clock) -> None:
        if world.rank == 0:
            clock.work(DELAY_NS)
            exchange = world.start_send(token(), 1)
        else:
            exchange = world.start_receive(token())
        if (world.rank == 0) != (late_end == "send"):
            exchange.wait()
            world.reconcile()
        else:
            world.reconcile()
            exchange.wait()

    worlds = simulate(2, program, clocks=[Clock(), Clock(10**15)] if hosts == "several hosts" else None)
    check_sums(worlds)
    waited_ns = worlds[1].exchange_log.wait_on_ns[0]
    if late_end == "receive":
        # It was in the settling that the receiver waited; when it came to the receive, all was there.
        assert waited_ns == pytest.approx(DELAY_NS, abs=200 * TRANSFER_NS)
        assert worlds[1].exchange_log.hidden_ns > 0
    else:
        assert waited_ns == pytest.approx(DELAY_NS, abs=200 * TRANSFER_NS)


def test_a_master_passes_waiting_on_by_messages_too() -> None:
    """Workers that wait for a message of a master that waited for a late worker's wait for that worker."""

    def program(world: World, clock: Clock) -> None:
        if world.rank == 0:
            for _ in (1, 2):
                world.receive(token())
            for worker in (1, 2):
                world.send(token(), worker)
        else:
            clock.work(DELAY_NS if world.rank == 2 else 0)
            world.send(token(), 0)
            world.receive(token(), 0)

    worlds = simulate(3, program)
    check_sums(worlds)
    for rank in (0, 1):
        assert worlds[rank].exchange_log.wait_on_ns[2] == pytest.approx(DELAY_NS, abs=50 * TRANSFER_NS)


def test_a_synchronous_sender_waits_for_a_late_receiver() -> None:
    """A sender that is held until its receiver comes waits for it; one that was let go does not."""
    send = {"pattern": Pattern.SEND, "peer": 1, "posted_ns": 100, "entered_ns": 100}
    receive = {"pattern": Pattern.RECEIVE, "peer": 0, "posted_ns": 900, "entered_ns": 900, "left_ns": 1_000}
    held, let_go = (np.array([entry(**send, left_ns=left)], ENTRY) for left in (950, 120))
    other = np.array([entry(**receive)], ENTRY)
    assert MessageMatcher(0).split([held, other]).split.charged_ns == {1: 800}
    assert MessageMatcher(0).split([let_go, other]).split.charged_ns == {}


def test_a_held_sender_charges_its_receiver() -> None:
    """It is receivers that pass waiting on: a sender that is held waits for who takes its message, also where
    that one waited for another's meanwhile."""
    to_1 = entry(pattern=Pattern.SEND, peer=1, posted_ns=100, entered_ns=100, left_ns=950)
    from_2 = entry(pattern=Pattern.RECEIVE, peer=2, left_ns=800)
    from_0 = entry(pattern=Pattern.RECEIVE, posted_ns=900, entered_ns=900, left_ns=1_000)
    late = entry(pattern=Pattern.SEND, peer=1, posted_ns=790, entered_ns=790, left_ns=800)
    logs = [np.array(rows, ENTRY) for rows in ([to_1], [from_2, from_0], [late])]
    assert MessageMatcher(0).split(logs).split.charged_ns == {1: 800}


@pytest.mark.parametrize("first", [0, 300])
@given(st.integers(0, 2**32), st.integers(1, 20))
def test_waiting_for_messages_is_a_part_of_them_and_charged_to_others(
    first: int, seed: int, messages: int
) -> None:
    """Whatever the times and whoever sent to whom, also where ranks have high numbers: a rank waits no longer
    than it was in an exchange, all of that is charged, and none to itself."""
    rows: list[list[tuple[int, ...]]] = [[] for _ in range(first + 3)]
    rng = np.random.default_rng(seed)
    for number in range(messages):
        source, dest, _ = rng.permutation(3)
        for pattern, owner, peer in ((Pattern.SEND, source, dest), (Pattern.RECEIVE, dest, source)):
            posted_ns, entered_ns, left_ns = np.sort(rng.integers(0, 100, 3))
            times = {"posted_ns": posted_ns, "entered_ns": entered_ns, "left_ns": left_ns}
            rows[first + owner].append(entry(pattern=pattern, peer=first + peer, number=number, **times))
    logs = [np.array(its, ENTRY) for its in rows]
    for rank in range(first, first + 3):
        matched = MessageMatcher(rank).split(logs)
        found = matched.split
        assert len(matched.names) == len(logs[rank])
        assert (found.wait_ns >= 0).all()
        assert (found.wait_ns <= logs[rank]["left_ns"] - logs[rank]["entered_ns"]).all()
        assert sum(found.charged_ns.values()) == found.wait_ns.sum()
        assert rank not in found.charged_ns


@pytest.mark.parametrize("failed_ns", [1, 12_345])
def test_an_exchange_that_fails_is_recovery(failed_ns: int) -> None:
    """Finding out that a rank is lost is recovery, to the nanosecond, and neither transfer nor computing."""

    def program(world: World, clock: Clock) -> None:
        def lose() -> Any:
            clock.work(failed_ns)
            raise RankLost("a rank was lost")

        with world.ledger.phase("forward"):
            clock.work(500)
            with pytest.raises(RankLost):
                world.finish(world.exchange_log.open(Pattern.RECEIVE, 0, 8), lose)
        phases_ns = world.ledger.close().phases_ns
        assert (phases_ns["recovery"], phases_ns["transfer"]) == (failed_ns, 0)
        assert phases_ns["forward"] == world.exchange_log.ideal_ns() == 500

    assert len(simulate(2, program)) == 2


def test_an_exchange_that_fails_in_the_background_is_recovery() -> None:
    """A loss that is found where an exchange is begun or polled is recovery, for the time of that alone."""
    clock = Clock()
    ledger = Ledger(clock, cpu_clock=lambda: 0)
    log = ExchangeLog(0, 1, ledger, Timeline(ledger), CommonClock(SimpleNamespace(clock_of=[0]), clock))  # type: ignore[arg-type]
    ledger.enter("backward")
    exchange = log.open(Pattern.ALL_TO_ALL, -1, 8)

    def look_after(duration_ns: int, error: Exception | None) -> None:
        with exchange.beside():
            clock.work(duration_ns)
            if error is not None:
                raise error

    look_after(100, None)
    clock.work(1_000)
    with pytest.raises(RankLost):
        look_after(20, RankLost("a rank was lost"))
    assert ledger.running == "backward"
    phases_ns = ledger.close().phases_ns
    assert (phases_ns["transfer"], phases_ns["recovery"], phases_ns["backward"]) == (100, 20, 1_000)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_what_survivors_had_together_is_told_apart(lost: int) -> None:
    """When a rank is lost, the others' waiting for each other until then is charged; what they waited for it,
    and exchanges whose root it was, stay transfer."""
    exchanges = [
        (pattern, root, late)
        for pattern in (Pattern.ALL_TO_ALL, Pattern.ALL_TO_ONE, Pattern.ONE_TO_ALL)
        for root in ([-1] if pattern == Pattern.ALL_TO_ALL else range(3))
        for late in range(3)
    ]
    begins_ns = 1_000 * np.arange(1, len(exchanges) + 1)
    delays_ns = 2 ** np.arange(len(exchanges))  # of which each sum tells whose they are
    ranks = [_Recorded(rank, 3) for rank in range(3)]
    for (pattern, root, late), begin_ns, delay_ns in zip(exchanges, begins_ns, delays_ns, strict=True):
        for rank in ranks:
            came_ns = int(begin_ns + delay_ns * (rank.number == late))
            rank.exchange(pattern, root, came_ns, int(begin_ns + delay_ns) + 10)
    left = [rank for rank in range(3) if rank != lost]
    chunks = [ranks[rank].exchange_log.last_chunk() for rank in left]
    standings = np.stack([chunk.standing for chunk in chunks])
    closings = [
        ranks[rank].exchange_log.closing(chunk, standings, left, [False, False])
        for rank, chunk in zip(left, chunks, strict=True)
    ]
    for rank, closed in zip(left, together(closings), strict=True):
        ranks[rank].exchange_log.leave_out(closed, standings, left, ranks[rank].clock)
        (other,) = {*left} - {rank}
        waited_ns = sum(
            int(delay_ns)
            for (_, root, late), delay_ns in zip(exchanges, delays_ns, strict=True)
            if late == other and root != lost
        )
        assert ranks[rank].exchange_log.wait_on_ns == {other: waited_ns}
        phases_ns = ranks[rank].ledger.close().phases_ns
        assert phases_ns["wait"] == waited_ns
        others_ns = sum(
            int(ns) for ns, (_, _, late) in zip(delays_ns, exchanges, strict=True) if late != rank
        )
        assert phases_ns["transfer"] == others_ns + 10 * len(exchanges) - waited_ns


class _Recorded:
    """One rank's log, whose exchanges take the time that they are given."""

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self._now = Clock()
        self._now.now_ns = 0
        self.ledger = Ledger(self._now, cpu_clock=lambda: 0)
        transport: Any = SimpleNamespace(rank=number, clock_of=[0] * size)
        self.clock = CommonClock(transport, self._now)
        self.exchange_log = ExchangeLog(number, size, self.ledger, Timeline(self.ledger), self.clock)
        self.ledger.enter("other")

    def exchange(self, pattern: Pattern, root: int, came_ns: int, left_ns: int) -> None:
        """An exchange of all."""
        self._now.now_ns = came_ns
        with self.exchange_log.open(pattern, root, 8) as exchange:
            self._now.now_ns = left_ns
            exchange.stalls.skip()


@pytest.mark.parametrize(("clocks", "late_ns", "near"), [(1, 500, 0.001), (2, 50_000, 0.1)])
def test_a_long_log_is_compared_on_the_way(clocks: int, late_ns: int, near: float) -> None:
    """However many exchanges, the log stays short, and the sums are right; also where clocks are measured
    again each time."""

    def program(world: World, clock: Clock) -> None:
        for _ in range(10_000):
            clock.work(late_ns * world.rank)
            world.allreduce(token())
            assert len(world.exchange_log._collective) <= 4_100

    fast, slow = simulate(2, program, clocks=[Clock(), Clock(10**15)] if clocks == 2 else None)
    assert fast.ledger.close().phases_ns["wait"] == pytest.approx(10_000 * late_ns, rel=near)
    assert slow.ledger.close().phases_ns["wait"] <= (clocks - 1) * 10_000 * TRANSFER_NS


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_stopwatch_with_barriers_agrees(size: int) -> None:
    """The cross-check by barriers finds the waiting that the logs tell."""

    def program(world: World, clock: Clock) -> None:
        world.cross_check = True
        for turn in range(20):
            clock.work(100_000 * ((world.rank + turn) % size))
            world.allreduce(token())
            world.gather(token())
            world.broadcast(token())
        world.cross_check = False

    for world in simulate(size, program):
        waited_ns = world.ledger.close().phases_ns["wait"]
        assert waited_ns >= 1_000_000
        # A barrier's own transfer is in its stopwatch: three a turn.
        assert world.barrier_wait_ns == pytest.approx(waited_ns + 60 * TRANSFER_NS, abs=70 * TRANSFER_NS)


@st.composite
def programs(draw: st.DrawFn) -> tuple[int, Program]:
    """Random programs: work of random length between exchanges of every kind."""
    size = draw(st.integers(2, 5))
    turns = draw(
        st.lists(
            st.tuples(
                st.sampled_from(
                    ["allreduce", "background", "gather", "broadcast", "message", "later", "reconcile"]
                ),
                st.integers(0, size - 1),
                st.lists(st.integers(0, 10**6), min_size=size, max_size=size),
            ),
            max_size=15,
        )
    )

    def program(world: World, clock: Clock) -> None:
        for kind, root, work in turns:
            clock.work(work[world.rank])
            if kind == "allreduce":
                world.allreduce(token())
            elif kind == "background":
                exchange = world.start_allreduce(token())
                clock.work(work[root])
                exchange.wait()
            elif kind == "gather":
                world.gather(token(), root)
            elif kind == "broadcast":
                world.broadcast(token(), root)
            elif kind == "reconcile":
                world.reconcile()
            elif kind == "later":
                if world.rank == root:
                    exchange = world.start_send(token(), (root + 1) % size)
                    clock.work(work[root])
                    world.reconcile()
                    exchange.wait()
                else:
                    if world.rank == (root + 1) % size:
                        world.receive(token(), root)
                    world.reconcile()
            elif world.rank == root:
                world.send(token(), (root + 1) % size)
            elif world.rank == (root + 1) % size:
                world.receive(token())
        world.barrier()

    return size, program


@examples(30, 100)
@given(programs(), st.integers(1, 10**5))
def test_the_ideal_time_is_that_of_a_network_without_cost(
    made: tuple[int, Program], transfer_ns: int
) -> None:
    """The ideal time of a run is the time that the same program takes where exchanges take none."""
    size, program = made
    real = simulate(size, program, transfer_ns=transfer_ns)
    free = simulate(size, program, transfer_ns=0)
    for slow, ideal in zip(real, free, strict=True):
        assert slow.exchange_log.ideal_ns() == ideal.ledger.close().wall_ns
        assert slow.exchange_log.ideal_ns() <= slow.ledger.close().wall_ns


@examples(30, 100)
@given(
    programs(),
    st.integers(1, 10**5),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=8),
    st.integers(0, 10**4),
)
def test_no_phase_of_an_epoch_is_negative(
    made: tuple[int, Program],
    transfer_ns: int,
    several_hosts: bool,
    ends: list[tuple[int, int]],
    cost_ns: int,
) -> None:
    """Whatever the order of exchanges, reconciliations and ends of epochs, also where clocks drift, no phase
    of an epoch is negative, each epoch adds up to its length, and what is charged is what was waited."""
    size, program = made
    clocks = [Clock(rank * 10**12, 1e-4 * rank) for rank in range(size)] if several_hosts else None

    def in_epochs(world: World, clock: Clock) -> None:
        # Epochs end at other moments on each rank: within what it works between exchanges.
        due = sorted(turn + (shift + world.rank) % 3 for turn, shift in ends)
        worked = 0
        work = clock.work

        def work_and_end_epochs(duration_ns: int) -> None:
            nonlocal worked
            worked += 1
            work(duration_ns)
            while due and due[0] <= worked:
                due.pop(0)
                world.timeline.epoch(len(ends) - len(due))

        world.ledger._cost_ns = cost_ns
        world.timeline.begin()
        clock.work = work_and_end_epochs  # type: ignore[method-assign]
        program(world, clock)
        clock.work = work  # type: ignore[method-assign]
        world.reconcile()
        world.timeline.epoch(0)

    for world in simulate(size, in_epochs, transfer_ns=transfer_ns, clocks=clocks):
        rows = world.timeline.epochs()
        for row in rows:
            assert min(row[phase] for phase in PHASES) >= 0
            assert sum(row[phase] for phase in PHASES) == row["end_ns"] - row["start_ns"]
        totals = world.ledger.close()
        assert sum(totals.phases_ns.values()) == totals.wall_ns
        assert min(totals.phases_ns.values()) >= 0
        assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
        assert sum(row["wait"] for row in rows) <= totals.phases_ns["wait"]


def test_waiting_that_is_found_late_stands_where_it_was() -> None:
    """Waiting in one epoch that is found out in the next is added to the first one, and taken from its
    transfer."""

    def program(world: World, clock: Clock) -> None:
        world.timeline.begin()
        clock.work(DELAY_NS if world.rank == 1 else 0)
        world.allreduce(token())
        world.timeline.epoch(1)
        clock.work(1_000)
        world.reconcile()
        world.timeline.epoch(2)

    early, late = (world.timeline.epochs() for world in simulate(2, program))
    assert early["wait"].tolist() == [DELAY_NS, 0]
    assert early["transfer"][0] == TRANSFER_NS
    assert late["wait"][0] == 0


def test_what_accounting_exchanges_is_counted_apart() -> None:
    """The traffic of a program is the same, however often its logs are compared on the way."""

    def often(world: World, clock: Clock) -> None:
        for _ in range(3):
            world.allreduce(token())
            world.reconcile()

    def never(world: World, clock: Clock) -> None:
        for _ in range(3):
            world.allreduce(token())

    for one, other in zip(simulate(3, often), simulate(3, never), strict=True):
        assert one.traffic == other.traffic
        assert one.overhead.bytes_sent > other.overhead.bytes_sent > 0


@examples(20, 100)
@given(programs())
def test_what_is_sent_is_received(made: tuple[int, Program]) -> None:
    """Over all ranks as many bytes and messages are received as were sent."""
    traffic = [world.traffic for world in simulate(*made)]
    assert sum(one.bytes_sent for one in traffic) == sum(one.bytes_received for one in traffic)
    assert sum(one.messages_sent for one in traffic) == sum(one.messages_received for one in traffic)


@st.composite
def computing(draw: st.DrawFn) -> tuple[int, list[tuple[Pattern, int, list[int], list[int]]]]:
    """Collective exchanges of some ranks: what each computed before it, and behind it until it waited."""
    ranks = draw(st.integers(1, 5))
    work = st.lists(st.integers(0, 1_000), min_size=ranks, max_size=ranks)
    patterns = st.sampled_from([Pattern.ALL_TO_ALL, Pattern.ALL_TO_ONE, Pattern.ONE_TO_ALL])
    return ranks, draw(st.lists(st.tuples(patterns, st.integers(0, ranks - 1), work, work), max_size=8))


@given(computing(), st.lists(st.integers(0, 9_000), max_size=3))
def test_the_replay_moves_clocks_to_whom_they_cannot_do_without(
    made: tuple[int, list[tuple[Pattern, int, list[int], list[int]]]], newcomers: list[int]
) -> None:
    """After each collective exchange a rank's ideal clock is where its own computing brings it, or whoever it
    needs had come, if that is later; newcomers begin where the latest is, however long they have computed."""
    ranks, exchanges = made
    ideal_time = IdealTime(ranks)
    ideal, busy = [0] * ranks, [0] * ranks
    for pattern, root, before, behind in exchanges:
        log = np.zeros((ranks, 1), ENTRY)
        log["pattern"], log["peer"] = pattern, root
        log["posted_busy_ns"][:, 0] = [b + more for b, more in zip(busy, before, strict=True)]
        log["entered_busy_ns"][:, 0] = log["posted_busy_ns"][:, 0] + behind
        came = [clock + more for clock, more in zip(ideal, before, strict=True)]
        for rank in range(ranks):
            everybody = pattern == Pattern.ALL_TO_ALL or (pattern == Pattern.ALL_TO_ONE and rank == root)
            nobody = pattern == Pattern.ALL_TO_ONE and rank != root
            needed = came if everybody else [came[rank] if nobody else came[root]]
            ideal[rank] = max(came[rank] + behind[rank], *needed)
        busy = [int(ns) for ns in log["entered_busy_ns"][:, 0]]
        ideal_time.add(log, [np.zeros(0, ENTRY)] * ranks)
        assert [ideal_time.ideal_ns(rank, busy[rank]) for rank in range(ranks)] == ideal
    ideal_time.welcome([*busy, *newcomers])
    for rank, busy_ns in enumerate(newcomers, ranks):
        assert ideal_time.ideal_ns(rank, busy_ns) == max(ideal)


@pytest.mark.parametrize("end", ["send", "receive"])
def test_messages_in_the_background_are_replayed_where_they_count(end: str) -> None:
    """A message is on its way when it was posted, whenever its sender looks after it, and holds up its
    receiver only where that waits for it: other exchanges meanwhile neither wait for it nor hold it up."""
    late_ns = 100_000

    def program(world: World, clock: Clock) -> None:
        mine: BackgroundExchange | None = None
        if world.rank == 0:
            mine = world.start_send(token(), 2) if end == "send" else world.start_receive(token(), 1)
        if world.rank == 1:
            clock.work(late_ns)
            if end == "receive":
                world.send(token(), 0)
        # Sent before rank 0 waits here for rank 1; or received behind this, for which rank 2 needs rank 0.
        world.gather(token(), 0) if end == "send" else world.broadcast(token(), 0)
        if mine:
            mine.wait()
        if world.rank == 2 and end == "send":
            world.receive(token(), 0)

    worlds = simulate(3, program)
    assert [world.exchange_log.ideal_ns() for world in worlds] == [late_ns, late_ns, 0]
