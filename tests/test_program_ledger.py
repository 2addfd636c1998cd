"""The ledger of a program that uses mpi4py: who waited for whom, found by one rule, and what is left of
it."""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.ledger.call_log import CALL, Comm, Kind, RankLog, Site, paths_of, read_logs
from rankwise.ledger.last_entry import last_to_come
from rankwise.ledger.program_ledger import account
from rankwise.program.log import ENTERED_AT, SITE_AT, CallLog
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import record_of_calls
from rankwise.runs.record import Record

from .conftest import Command
from .effort import FULL, daily, examples

TOLERANCE_S = 0.03

times = st.integers(0, 50)


@given(st.lists(st.lists(st.tuples(times, times), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_last_to_come_before_ones_own_exit_is_charged(columns: list[list[tuple[int, int]]]) -> None:
    """For each member it is the latest entry of another one that is not behind its own exit, found for all
    exchanges at once as one by one."""
    members = min(map(len, columns))
    entries = np.array([[column[m][0] for column in columns] for m in range(members)])
    left = entries + np.array([[column[m][1] for column in columns] for m in range(members)])
    until, late = last_to_come(entries, left)
    for m in range(members):
        for n in range(len(columns)):
            others = [entries[o, n] for o in range(members) if o != m and entries[o, n] <= left[m, n]]
            if others and max(others) > entries[m, n]:
                assert until[m, n] == max(others)
                assert entries[late[m, n], n] == max(others)
                assert late[m, n] != m
            else:
                assert until[m, n] <= entries[m, n]


SITES = [Site("a.py", line, "main", call) for line, call in enumerate(("Send", "Recv", "Barrier"), start=1)]


def log(rank: int, ranks: int, *calls: tuple[Any, ...], ended: int = 1000) -> RankLog:
    """What a rank would have left that made these calls: kind, entry, exit, and what else is known."""
    rows = np.zeros(len(calls), CALL)
    for row, (kind, entered, left, more) in zip(rows, calls, strict=True):
        row["site"] = {Kind.SEND: 0, Kind.RECEIVE: 1}.get(kind, 2)
        for name in ("peer", "tag", "source", "got_tag", "request"):
            row[name] = -1
        row["kind"], row["entered_ns"], row["left_ns"], row["inside_ns"] = kind, entered, left, left - entered
        for name, value in more.items():
            row[name] = value
    world = Comm(tuple(range(ranks)), tuple(range(ranks)), 0)
    said = {"start_ns": 0, "begun_ns": 10, "ended_ns": ended, "cost_ns": 0}
    return RankLog(rank, rows, np.zeros(0, CALL), SITES, [world], said)


def waits(*logs: RankLog) -> list[dict[int, int]]:
    """Whom each rank waited for, and how long; that its time closes is seen to."""
    found = account(logs)
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in found)
    assert all(row.phases_ns["wait"] == sum(row.wait_on_ns.values()) for row in found)
    return [row.wait_on_ns for row in found]


def test_of_a_collective_the_last_one_is_charged_that_came_before_ones_exit() -> None:
    """A root that left at once waited for nobody, another one until the last that had come before it left."""
    assert waits(
        log(0, 3, (Kind.COLLECTIVE, 100, 105, {})),
        log(1, 3, (Kind.COLLECTIVE, 50, 110, {})),
        log(2, 3, (Kind.COLLECTIVE, 300, 310, {})),
    ) == [{}, {0: 50}, {}]


def message(kind: Kind, entered: int, left: int, other: int, tag: int = 0) -> tuple[Any, ...]:
    named = (
        {"peer": other, "tag": tag}
        if kind in (Kind.SEND, Kind.POST_SEND)
        else {"source": other, "got_tag": tag}
    )
    return kind, entered, left, named


def test_a_receive_waits_for_its_sender_and_a_send_for_its_receiver() -> None:
    """Who came first waited until the other one came, also if that one has gone on to other calls by then."""
    late_sender = waits(
        log(0, 2, message(Kind.SEND, 300, 301, 1), message(Kind.SEND, 302, 303, 1)),
        log(1, 2, message(Kind.RECEIVE, 100, 310, 0), message(Kind.RECEIVE, 320, 321, 0)),
    )
    assert late_sender == [{}, {0: 200}]
    late_receiver = waits(
        log(0, 2, message(Kind.SEND, 100, 310, 1)),
        log(1, 2, message(Kind.RECEIVE, 300, 305, 0), (Kind.PLAIN, 306, 400, {})),
    )
    assert late_receiver == [{1: 200}, {}]


def test_what_is_received_is_what_was_sent() -> None:
    """Bytes that came count as their sender had them, whatever the buffer, also where one call sends and
    receives, or a receive goes on in the background; those of a sender that is not known as the buffer has
    them."""

    def both(of_rank: int, size: int) -> tuple[Any, ...]:
        other = {"peer": 1 - of_rank, "tag": 0, "source": 1 - of_rank, "got_tag": 0, "bytes": size}
        return Kind.EXCHANGE, 100, 110, other

    kind, entered, left, named = message(Kind.RECEIVE, 200, 210, 0)
    large_buffer = kind, entered, left, named | {"bytes": 4000}
    *late, named = message(Kind.SEND, 200, 201, 1)
    sent = *late, named | {"bytes": 700}
    *post, named = message(Kind.POST_RECEIVE, 220, 221, 1)
    posted = *post, named | {"bytes": 9000}
    *later, named = message(Kind.SEND, 222, 223, 0)
    answer = *later, named | {"bytes": 50}
    part = Kind.PART, 240, 240, {"request": 2, "source": 1, "got_tag": 0}
    unknown = Kind.RECEIVE, 300, 310, {"source": 1, "got_tag": 7, "bytes": 16}
    first, second = account(
        [
            log(0, 2, both(0, 8), sent, posted, (Kind.WAIT, 230, 240, {}), part, unknown),
            log(1, 2, both(1, 24), large_buffer, answer),
        ]
    )
    assert (first.bytes_sent, first.bytes_received) == (8 + 700, 24 + 50 + 16)
    assert (second.bytes_sent, second.bytes_received) == (24 + 50, 8 + 700)


def test_messages_are_matched_by_tag() -> None:
    """A send ends with the receive of its own tag, whichever was received before."""
    assert waits(
        log(0, 2, message(Kind.POST_SEND, 10, 11, 1, 7), message(Kind.SEND, 100, 510, 1, 8)),
        log(1, 2, message(Kind.RECEIVE, 500, 505, 0, 8), message(Kind.RECEIVE, 600, 601, 0, 7)),
    ) == [{1: 400}, {}]


def test_a_wait_is_for_the_last_of_its_requests() -> None:
    """A wait for several requests lasts until the last partner has come; the lines tell where that one
    was."""
    part = (Kind.PART, 400, 400, {})
    logs = [
        log(0, 3, message(Kind.SEND, 200, 201, 2)),
        log(1, 3, (Kind.PLAIN, 20, 30, {}), message(Kind.SEND, 390, 391, 2)),
        log(
            *(2, 3),
            message(Kind.POST_RECEIVE, 90, 91, 0),
            message(Kind.POST_RECEIVE, 92, 93, 1),
            (Kind.WAIT, 100, 400, {}),
            *((*part[:3], {"request": row}) for row in (0, 1)),
        ),
    ]
    for row in logs[2].rows[:2]:
        row["tag"] = 0
    assert waits(*logs) == [{}, {}, {1: 290}]
    (line,) = (line for line in account(logs)[2].lines if line.wait_ns)
    assert line.late_at == {"rank 1: between a.py:3 and line 1": 290}


def test_collectives_of_another_thread_are_counted() -> None:
    """Which collective of a communicator is the first, all threads of a rank together say: the main thread
    waits for a rank that comes to it in another thread, and what that one then calls itself is the second."""
    first = log(0, 2, (Kind.COLLECTIVE, 600, 610, {"comm": 0}))
    beside = log(0, 2, (Kind.COLLECTIVE, 200, 210, {"comm": 0}))
    other = log(1, 2, (Kind.COLLECTIVE, 100, 205, {"comm": 0}), (Kind.COLLECTIVE, 300, 605, {"comm": 0}))
    first.others = beside.rows
    assert waits(first, other) == [{}, {0: 400}]


def test_a_wait_that_fills_a_piece_of_the_log() -> None:
    """Where the log goes on in a new piece of its file, what that took stands between a wait and the request
    that it ended, and the wait is for its partner all the same."""
    wait = (Kind.WAIT, 100, 500, {})
    found = waits(
        log(
            0,
            2,
            (Kind.POST_RECEIVE, 50, 60, {"comm": 0, "source": 1, "tag": 0}),
            wait,
            (Kind.INSTRUMENT, 501, 502, {"site": -1}),
            (Kind.PART, 500, 500, {"request": 0, "site": -1}),
        ),
        log(1, 2, (Kind.SEND, 400, 410, {"comm": 0, "peer": 0, "tag": 0})),
    )
    assert found == [{1: 300}, {}]


def test_a_wait_for_a_rank_that_waited_itself_is_passed_on() -> None:
    """What the late rank waited itself is charged to the rank that it waited for, one step back, and the rest
    to it; not so what it waited for the rank that waits for it. The lines say where the causes were."""
    chain = [
        log(0, 3, message(Kind.RECEIVE, 100, 1_010, 1)),
        log(1, 3, message(Kind.RECEIVE, 200, 810, 2), message(Kind.SEND, 1_000, 1_005, 0)),
        log(2, 3, (Kind.PLAIN, 20, 30, {}), message(Kind.SEND, 800, 801, 1)),
    ]
    assert waits(*chain) == [{1: 300, 2: 600}, {2: 600}, {}]
    (line,) = (line for line in account(chain)[0].lines if line.wait_ns)
    assert line.late_at == {
        "rank 2: between a.py:3 and line 1": 600,
        "rank 1: between a.py:2 and line 1": 300,
    }
    there_and_back = waits(
        log(0, 2, message(Kind.SEND, 100, 101, 1), message(Kind.RECEIVE, 110, 500, 1)),
        log(1, 2, message(Kind.RECEIVE, 50, 102, 0), message(Kind.SEND, 490, 491, 0)),
    )
    assert there_and_back == [{1: 380}, {0: 50}]


def test_pickling_is_no_waiting() -> None:
    """A rank that still pickles has not come yet, and what it pickles is its own time."""
    sender = (*message(Kind.SEND, 100, 410, 1)[:3], {"peer": 1, "tag": 0, "dumps_ns": 300})
    found = account([log(0, 2, sender), log(1, 2, message(Kind.RECEIVE, 100, 410, 0))])
    assert (found[0].phases_ns["pack"], found[0].phases_ns["transfer"]) == (300, 10)
    assert found[1].wait_on_ns == {0: 300}


def test_a_rank_that_was_killed_in_a_call_was_there_until_the_end() -> None:
    """A call that a rank did not come out of is waiting, for nobody that is known, and names its line."""
    row = log(0, 1, (Kind.OPEN, 100, 100, {"left_ns": 0}))
    del row.said["ended_ns"]
    (found,) = account([row], over_ns=700)
    assert (found.wall_ns, found.phases_ns["wait"], found.is_over) == (700, 600, False)
    assert found.last == "in Barrier at a.py:3"


def record(folder: Path) -> Record:
    return RunFolder(folder).read()


LATE_S = 0.5
"""As known_delays.py has it, which begins MPI wherever it is imported, and leaves memory in /dev/shm."""


EXPECTED = {
    "late_sender": ({"last"}, 0),
    "late_receiver": ({"last"}, 0),
    "barrier": ({"middle", "last"}, 0),
    "allreduce": ({"first", "middle"}, "last"),
    "broadcast": ({"middle", "last"}, 0),
    "gather": ({"first"}, "last"),
    "lower_broadcast": ({"middle", "last"}, 0),
    "lower_gather": ({"first"}, "last"),
    "lower_message": ({"last"}, 0),
    "all_requests": ({"last"}, 0),
    "both_ways": ({"last"}, 0),
    "part_of_all": ({"last"}, 0),
    "any_source": ({"first"}, "last"),
    "scan": ({"middle", "last"}, 0),
    "reduce": ({"first"}, "last"),
    "scatter": ({"middle", "last"}, 0),
    "synchronous_send": ({"last"}, 0),
    "in_background": ({"first", "middle"}, "last"),
    "persistent": ({"last"}, 0),
    "probe": ({"last"}, 0),
    "matched_probe": ({"last"}, 0),
    "polls": ({"last"}, 0),
    "all_from_any": ({"last"}, 0),
    "two_sides": ({"last"}, 0),
    "new_communicator": ({"middle", "last"}, 0),
    "pool": ({"last"}, 0),
}
"""Which ranks wait in each function, and for which."""


@pytest.mark.mpi
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("ranks", "size"), daily(product((2, 3, 5), (8, 65_536, 1_048_576)), [(2, 8), (3, 8)])
)
def test_known_delays_are_found(command: Command, tmp_path: Path, ranks: int, size: int) -> None:
    """In each kind of call the rank that waits, how long, for whom, and the line are those that the programs
    themselves saw: from when the one came to the call until the other was late no more. The time of each rank
    closes; and half a second of pickling is pickling."""
    shutil.copy(Path(__file__).with_name("known_delays.py"), tmp_path)
    cases = [*EXPECTED] if FULL else [*EXPECTED][ranks % 2 :: 2]  # every day half of them on 2 ranks
    words = "seen", str(size), *cases, "pickled"
    done = command.rankwise("run", "--ranks", str(ranks), "--out", "run", "known_delays.py", *words)
    assert done.code == 0, done
    run = record(tmp_path / "run")
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in run.ranks)
    told = [json.loads((tmp_path / f"seen-{rank}.json").read_text()) for rank in range(ranks)]
    last = ranks - 1
    names = {"first": 0, "last": last, **({"middle": 1} if ranks > 2 else {})}
    for case in cases:
        who, late = EXPECTED[case]
        culprit = last if late == "last" else 0
        for rank in sorted({names[name] for name in who if name in names} - {culprit}):
            expected_s = max(0, told[culprit]["came"][case] - told[rank]["seen"][case][0])
            sites = [site for site in run.call_sites if (site.rank, site.function) == (rank, case)]
            found_s = sum(site.wait_on_ns.get(str(culprit), 0) for site in sites) / 1e9
            # A busy machine may bring a rank as late as the one that sleeps: then it has nobody to wait for.
            where = max(sites[0].late_at, key=lambda where: sites[0].late_at[where], default="")
            if (
                case == "pool"
            ):  # whose ranks first exchange much to set it up; the late one is in another thread
                inside_s = sum(site.wait_ns + site.transfer_ns for site in sites) / 1e9
                assert 0 < found_s < expected_s + TOLERANCE_S
                assert inside_s > expected_s / 2
                continue
            assert found_s == pytest.approx(expected_s, rel=0.05, abs=TOLERANCE_S), (case, rank)
            assert where.startswith(f"rank {culprit}: between") or expected_s < TOLERANCE_S, (case, rank)
        waited_ns = [s.wait_ns for s in run.call_sites if (s.rank, s.function) == (culprit, case)]
        assert sum(waited_ns) / 1e9 < LATE_S / 2, case
    began, ended = told[0]["seen"]["pickled"]
    assert run.ranks[0].phases_ns["pack"] / 1e9 == pytest.approx(ended - began, rel=0.05, abs=TOLERANCE_S)
    by_first = sum(EXPECTED[case][1] == 0 for case in cases)
    assert run.ranks[0].phases_ns["compute"] / 1e9 > by_first * LATE_S
    page = command.rankwise("report", "run", "--output", "page.html")
    assert page.code == 0, page
    text = (tmp_path / "page.html").read_text()
    assert all(f"known_delays.py:{site.line}" in text for site in run.call_sites[:10])
    assert "Who waits for whom" in text


EVERYTHING = """
import mpi4py
mpi4py.rc.initialize = False
import sys, threading
import numpy as np
from mpi4py.MPI import COMM_WORLD as comm, COMM_SELF
from mpi4py import MPI
assert not MPI.Is_initialized()
MPI.Init_thread(MPI.THREAD_MULTIPLE)
rank, last = comm.rank, comm.size - 1
box = np.zeros(3)
assert type(comm) is MPI.Intracomm and MPI.Comm.Send.__doc__.startswith("Send(self, buf")
# persistent requests, tests, polls, matched probes
persistent = [comm.Send_init(box, (rank + 1) % comm.size), comm.Recv_init(box.copy())]
for _ in range(3):
    MPI.Prequest.Startall(persistent)
    while not MPI.Request.Testall(persistent):
        pass
for request in persistent:
    request.Free()
comm.Barrier()  # else a receive from anybody could take the next message for its own, which is longer
if rank == 0:
    comm.isend("fire and forget", last).wait()
    comm.Ssend(box, last, tag=5)
elif rank == last:
    while not comm.iprobe():
        pass
    print(comm.mprobe().recv())
    message = comm.Mprobe(tag=5)
    message.Recv(box)
elsewhere = comm.isend("found", rank, tag=9)
print(MPI.Message.probe(comm, rank, 9).recv(), MPI.Message.iprobe(comm, rank, 9))
elsewhere.wait()
request = comm.Ibarrier()
request.Wait()
print(comm.allgather(rank))
# communicators
half = comm.Split(rank % 2, -rank)
twin = half.Dup()
twin.Barrier()
twin.Free()
cart = comm.Create_cart([comm.size], periods=[True])
left, right = cart.Shift(0, 1)
cart.Sendrecv(box, right, recvbuf=box.copy(), source=left)
if rank in (0, last):
    inter = COMM_SELF.Create_intercomm(0, comm, last - rank)
    print(inter.allgather(rank))
    if rank == 0:
        inter.send("between", 0)
    else:
        print(inter.recv(source=0))
    inter.Merge().Barrier()
COMM_SELF.Barrier()
print(sum(map(comm.allreduce, [1, 2])))
# other ways to send
from mpi4py.util import pkl5
other = pkl5.Intracomm(comm)
print(other.bcast(np.arange(3)).sum())
window = MPI.Win.Create(box, comm=comm)
window.Fence()
window.Fence()
window.Free()
thread = threading.Thread(target=lambda: twice.Barrier())
twice = comm.Dup()
thread.start()
thread.join()
try:
    comm.Send(box, 99)
except MPI.Exception as error:
    print(error.Get_error_class() == MPI.ERR_RANK)
try:
    comm.Send(box)
except TypeError:
    print("as without")
from mpi4py.futures import MPICommExecutor
with MPICommExecutor(comm, root=0) as pool:
    if pool is not None:
        print(list(pool.map(abs, [-1, -2, -3])))
print("over", rank, sys.argv[1:])
MPI.Finalize()
"""


@pytest.mark.mpi
@pytest.mark.timeout(200)
def test_a_program_does_all_that_it_does_without(command: Command, tmp_path: Path) -> None:
    """Persistent requests, probes, communicators of all kinds, threads, pkl5, futures, windows, errors, MPI
    begun and ended by hand: under a user's own mpiexec, too, a program prints what it prints without the
    ledger, and each rank's time closes."""
    (tmp_path / "everything.py").write_text(EVERYTHING)
    plain = command.mpiexec(3, "everything.py", "--x", "1")
    assert plain.code == 0, plain
    seen = command.mpiexec(3, "-m", "rankwise", "run", "--out", "run", "everything.py", "--x", "1")
    assert seen.code == 0, seen
    # MPICH's mpiexec may break a rank's line where another one writes.
    assert sorted(seen.out.replace("\n", "")) == sorted(plain.out.replace("\n", ""))
    assert "run folder: run" in seen.err
    run = record(tmp_path / "run")
    assert run.outcome == "completed"
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in run.ranks)
    assert all(ns >= 0 for row in run.ranks for ns in row.phases_ns.values())
    calls = {site.call for site in run.call_sites}
    assert calls >= {
        "Testall",
        "iprobe",
        "mprobe",
        "recv",
        "Mprobe",
        "Recv",
        "Wait",
        "Split",
        "allreduce",
        "Fence",
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".job")]


ENDS = """
import os, sys, time
from mpi4py import MPI
comm = MPI.COMM_WORLD
comm.Barrier()
how = sys.argv[1]
if comm.rank == 0:
    comm.recv(source=1)
time.sleep(0.3)
if how == "raise":
    raise ValueError("on purpose")
if how == "abort":
    comm.Abort(7)
if how == "leave":
    os._exit(5)
os.kill(os.getpid(), 9)
"""


@pytest.mark.mpi
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("how", "code", "told"),
    [
        ("abort", 7, "rank 1 ended with code 7: it called Abort at ends.py:13"),
        pytest.param("raise", 1, "ValueError: on purpose", marks=pytest.mark.full),
        pytest.param("leave", 5, "rank 1 after Barrier at ends.py:5", marks=pytest.mark.full),
        pytest.param("kill", 1, "rank 1 after Barrier at ends.py:5", marks=pytest.mark.full),
    ],
)
def test_what_was_known_is_left(command: Command, tmp_path: Path, how: str, code: int, told: str) -> None:
    """A program that aborts, raises, leaves at once or is killed leaves the time of its ranks until then,
    ends with its code, and says in one line who did not come to an end, and where that one was."""
    (tmp_path / "ends.py").write_text(ENDS)
    done = command.rankwise("run", "--ranks", "2", "--out", "run", "ends.py", how)
    by_signal = 128 + signal.SIGKILL  # which MPICH's mpiexec tells, and Open MPI's does not
    assert done.code == code or (how, done.code) == ("kill", by_signal), done
    assert len(done.told) == 1
    assert told in done.told[0]
    run = record(tmp_path / "run")
    assert run.outcome == "failed"
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in run.ranks)
    assert any(site.call == "recv" and site.rank == 0 for site in run.call_sites) or how == "kill"
    again = command.rankwise("run", "--resume", "run")
    assert again.code == 2
    assert "made no rankwise.Run" in again.told[0]


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_a_folder_that_nobody_was_left_to_finish(command: Command, tmp_path: Path) -> None:
    """Where all ranks under a user's own mpiexec were killed, the page is made from what they had logged."""
    (tmp_path / "ends.py").write_text(ENDS)
    done = command.mpiexec(2, "-m", "rankwise", "run", "--out", "run", "ends.py", "kill")
    assert done.code != 0, done
    assert not (tmp_path / "run" / "record.json").exists()
    page = command.rankwise("report", "run", "--output", "page.html")
    assert page.code == 0, page
    assert "did not come to an end" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("said", ["", '{"what": "rank", "rank": 1', '{"what": "begun", "begun_ns": 7}\n'])
def test_a_rank_that_was_ended_before_it_said_who_it_is(tmp_path: Path, said: str) -> None:
    """It counts for nothing, whatever its file holds by then, and the others are accounted as without it."""
    first = CallLog(tmp_path, 0)
    first.say("rank", rank=0, size=2, host="here", start_ns=1)
    first.say("comm", members=[0, 1], peers=[0, 1], number=0)
    first.main.note(Kind.COLLECTIVE, -1, 10, 20)
    first.close()
    alone = account(read_logs(tmp_path))
    CallLog(tmp_path, 1).close()
    (tmp_path / "rank-0001.jsonl").write_text(said)
    assert account(read_logs(tmp_path)) == alone
    assert [row.rank for row in alone] == [0]


def test_a_program_without_mpi_computes(command: Command, tmp_path: Path) -> None:
    """All time of a program that never comes to MPI is its own work, and it is said that it did not come."""
    (tmp_path / "plain.py").write_text("print('here')\n")
    done = command.rankwise("run", "--out", "run", "plain.py")
    assert done.code == 0, done
    assert done.out == "here\n"
    assert "did not come to MPI" in done.err
    (rank,) = record(tmp_path / "run").ranks
    assert rank.wall_ns == rank.phases_ns["startup"] + rank.phases_ns["compute"]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(("comm", "enter", "leave", "region", "end"))),
        max_size=25,
    )
)
@examples(20, 300)
def test_ranks_killed_at_any_moment_leave_what_was_known(turns: list[tuple[int, str]]) -> None:
    """Whatever each rank had written when all were killed, of the three that there were, makes a record in
    which the time of each that had begun closes."""
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        folder.calls.mkdir()
        logs: dict[int, CallLog] = {}
        sites, entered, over = Counter[int](), {}, set()
        for now, (rank, what) in enumerate(turns, start=1):
            if rank not in logs:
                log = logs[rank] = CallLog(folder.calls, rank)
                if what != "end":  # else it was killed before it could say who it is
                    said = {"host": "here", "cores": 2, "cpu_model": "", "clock": "monotonic", "python": "3"}
                    log.say("rank", rank=rank, size=3, pid=1, start_ns=now, **said)
                    continue
            log = logs[rank]
            if rank in over:
                continue
            match what:
                case "comm":
                    log.add_comm([0, 1, 2], [0, 1, 2], sites[rank])
                case "enter" if rank not in entered:
                    log.say("site", file="a.py", line=now, function="f", call="Barrier")
                    log.main.last[ENTERED_AT], log.main.last[SITE_AT] = now, sites[rank]
                    entered[rank], sites[rank] = now, sites[rank] + 1
                case "leave" if rank in entered:
                    log.main.note(Kind.COLLECTIVE, sites[rank] - 1, entered.pop(rank), now)
                case "region":
                    log.begin("r")
                    log.end()
                case "end":
                    log.say("end", ended_ns=now, exit_code=0, words="")
                    over.add(rank)
        record = record_of_calls(folder, {}, "failed", None)
        begun = {
            rank for rank, log in logs.items() if b'"rank"' in paths_of(folder.calls, rank)[1].read_bytes()
        }
        assert {row.rank for row in record.ranks} == begun if record else not begun
        for row in record.ranks if record else ():
            assert row.wall_ns == sum(row.phases_ns.values())
