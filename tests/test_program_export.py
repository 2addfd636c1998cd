"""Exports of programs without a `Run`, each opened by the reader for which it is made."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import otf2
import pytest

from rankwise.export.program_calls import ProgramCalls, program_calls
from rankwise.ledger.call_log import CALL, Comm, Kind
from rankwise.program.log import PUT_ALL, SIZE, CallLog
from rankwise.report.program_trace import read_calls
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import record_of_calls
from rankwise.runs.record import Outcome

from . import records
from .conftest import Command
from .readers import ask
from .test_cli import call
from .test_export import EXTRAP, TALP_PAGES, ns_of, of_kind, read_otf2, readers, rows_of, slices, written

__all__ = ["readers"]

pytestmark = [pytest.mark.timeout(700), pytest.mark.xdist_group("readers")]

NAMES = CALL.names or ()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@dataclass(frozen=True)
class Made:
    """A call by hand: its name and kind, when it was entered and left, and what else its row has."""

    name: str
    kind: Kind
    entered_ns: int
    left_ns: int
    more: Mapping[str, int]


def made(name: str, kind: Kind, entered_ns: int, left_ns: int, **more: int) -> Made:
    return Made(name, kind, entered_ns, left_ns, more)


def ended(request: int, left_ns: int, **more: int) -> Made:
    """The end of what row `request` began, as a part of the wait before it."""
    return made("", Kind.PART, left_ns, left_ns, request=request, **more)


def program(
    path: str,
    *ranks: Iterable[Made],
    comms: Iterable[Comm] = (),
    words: tuple[str, ...] = ("a.py",),
    outcome: Outcome = "completed",
    ended_ns: int = 1000,
    **said: Any,
) -> RunFolder:
    """The run folder of a program whose ranks made these calls, each at a line of its own; row 0 is the first
    of a rank."""
    folder = RunFolder(Path(path))
    folder.create()
    folder.calls.mkdir(exist_ok=True)
    ranks_of = tuple(range(len(ranks)))
    for number, calls in enumerate(ranks):
        log = CallLog(folder.calls, number)
        about = {"host": "here", "python": "3.11.7", "cores": 2, "has_mpi": True, **said}
        log.say("rank", rank=number, size=len(ranks), start_ns=0, begun_ns=5, **about)
        log.say("mpi", mpi="Open MPI v5.0.11", cost_ns=0)
        for comm in (Comm(ranks_of, ranks_of, 0), *comms):
            log.add_comm(list(comm.members), list(comm.peers), comm.number)
        sites: dict[str, int] = {}
        for one in calls:
            if one.name and one.name not in sites:
                sites[one.name] = len(sites)
                log.say("site", file="a.py", line=len(sites), function="main", call=one.name)
            row = dict.fromkeys(NAMES, 0) | dict.fromkeys(("peer", "tag", "source", "got_tag", "request"), -1)
            times = {"entered_ns": one.entered_ns, "left_ns": one.left_ns}
            times["inside_ns"] = one.left_ns - one.entered_ns
            row |= {"kind": int(one.kind), "site": sites.get(one.name, -1), **times, **one.more}
            main = log.main
            PUT_ALL(main.buffer, main.at, *(row[name] for name in NAMES))
            main.at += SIZE
        log.say("end", ended_ns=ended_ns, exit_code=0, words="", cpu_s=1.0)
        log.close()
    config = {**records.record(len(ranks)).config, "program": list(words)}
    found = record_of_calls(folder, config, outcome, None)
    assert found is not None
    folder.write(found)
    return folder


def content(folder: RunFolder) -> ProgramCalls:
    """What exporters know of it."""
    return program_calls(read_calls(folder))


# OTF2


def operation(event: Any) -> str:
    """The name of a collective."""
    known = otf2.enums.CollectiveOp
    return next(name for name in dir(known) if name.isupper() and getattr(known, name) == event.collective_op)


def test_messages_of_a_program_in_otf2() -> None:
    """A message is a send and a receive that name each other's place in their communicator, with its tag and
    the bytes that were sent; in the background it is posted in the call that began it and completed in the
    wait that ended it. Calls are regions at their lines, with what they are; one of which the other end is
    not known is a region alone."""
    backwards = Comm((2, 0), (2, 0), 0)
    program(
        "run",
        [
            made("Send", Kind.SEND, 10, 30, comm=0, peer=2, tag=7, bytes=800),
            made("isend", Kind.POST_SEND, 40, 45, comm=1, peer=0, tag=1, bytes=64),
            made("Send", Kind.SEND, 46, 48, comm=0, peer=1, tag=5, bytes=8),  # which nobody receives
            made("Waitall", Kind.WAIT, 50, 90),
            ended(1, 90),
        ],
        [made("Iprobe", Kind.PROBE, 20, 25, comm=0)],
        [
            made("Irecv", Kind.POST_RECEIVE, 12, 15, comm=1, peer=1, source=1, tag=1),
            made("Recv", Kind.RECEIVE, 20, 32, comm=0, source=0, got_tag=7, bytes=1000),
            made("Wait", Kind.WAIT, 60, 70),
            ended(0, 70),
        ],
        comms=[backwards],
    )
    found = read_otf2(written("otf2", "run"))
    events = otf2.events
    ((at, send),) = of_kind(found, events.MpiSend)
    assert (at, send.time, send.receiver, send.msg_tag, send.msg_length) == ("rank 0 worker", 10, 2, 7, 800)
    ((at, receive),) = of_kind(found, events.MpiRecv)
    assert (at, receive.time, receive.sender, receive.msg_tag, receive.msg_length) == (
        *("rank 2 worker", 32, 0, 7, 800),
    )
    assert send.communicator.name == receive.communicator.name == "all ranks"
    ((_, posted),), ((_, done),) = of_kind(found, events.MpiIsend), of_kind(found, events.MpiIsendComplete)
    ((_, asked),), ((_, came),) = of_kind(found, events.MpiIrecvRequest), of_kind(found, events.MpiIrecv)
    assert [event.time for event in (posted, done, asked, came)] == [40, 90, 12, 70]
    assert (posted.receiver, posted.msg_tag, posted.msg_length) == (0, 1, 64)
    assert (came.sender, came.msg_tag, came.msg_length) == (1, 1, 64)
    assert posted.communicator.name == came.communicator.name == "ranks 2, 0"
    assert found.communicators["ranks 2, 0"] == ["rank 2 worker", "rank 0 worker"]
    assert posted.request_id == done.request_id != asked.request_id == came.request_id
    assert found.regions["Send at a.py:1"] == otf2.enums.RegionRole.POINT2POINT
    drawn = [one[:4] for one in slices(found)]
    assert ("rank 0 worker", "Send at a.py:1", 46, 48) in drawn
    assert ("rank 1 worker", "Iprobe at a.py:1", 20, 25) in drawn
    with otf2.reader.open("out.otf2/traces.otf2") as trace:
        lines = {one.name: (one.source_file, one.begin_line_number) for one in trace.definitions.regions}
    assert lines["Waitall at a.py:3"] == ("a.py", 3)


def test_collectives_of_a_program_in_otf2() -> None:
    """A collective is told under its own name, on its communicator, with its root by the place in it and what
    each rank sent and received; also in the background, and of communicators with the same ranks each by
    itself. What has no name there, as making a communicator, is a region."""
    twin = Comm((0, 1, 2), (0, 1, 2), 1)
    per_rank = [
        [
            made("Bcast", Kind.COLLECTIVE, 10 + late, 40, comm=0, peer=2, bytes=100),
            made("Dup", Kind.COLLECTIVE, 50 + late, 60, comm=0),
            made("gather", Kind.COLLECTIVE, 70 + late, 80, comm=1, peer=1, bytes=10 * (late + 1)),
            made("Iallreduce", Kind.POST_COLLECTIVE, 90 + late, 95, comm=1, bytes=16),
            made("Scatter", Kind.COLLECTIVE, 100 + late, 110, comm=0, peer=0, bytes=0 if late else 96),
            made("Wait", Kind.WAIT, 120, 130),
            ended(3, 130),
        ]
        for late in range(3)
    ]
    program("run", *per_rank, comms=[twin])
    found = read_otf2(written("otf2", "run"))
    ends: dict[str, list[Any]] = defaultdict(list)
    for at, event in of_kind(found, otf2.events.MpiCollectiveEnd):
        about = (int(at.split()[1]), event.time, event.root, event.size_sent, event.size_received)
        ends[f"{operation(event)} {event.communicator.name}"].append(about)
    assert {name: sorted(its) for name, its in ends.items()} == {
        "BCAST all ranks": [(0, 40, 2, 0, 100), (1, 40, 2, 0, 100), (2, 40, 2, 200, 0)],
        "GATHER all ranks, no. 2": [(0, 80, 1, 10, 0), (1, 80, 1, 0, 40), (2, 80, 1, 30, 0)],
        "SCATTER all ranks": [(0, 110, 0, 96, 0), (1, 110, 0, 0, 32), (2, 110, 0, 0, 32)],
    }
    asked = of_kind(found, otf2.events.NonBlockingCollectiveRequest)
    done = of_kind(found, otf2.events.NonBlockingCollectiveComplete)
    assert [(at, event.time) for at, event in asked] == [(f"rank {n} worker", 90 + n) for n in range(3)]
    assert {(event.time, operation(event), event.size_sent) for _, event in done} == {(130, "ALLREDUCE", 16)}
    assert found.regions["Bcast at a.py:1"] == otf2.enums.RegionRole.COLL_ONE2ALL
    assert found.regions["Dup at a.py:2"] == otf2.enums.RegionRole.COLL_OTHER
    assert [one[1:4] for one in slices(found)].count(("Dup at a.py:2", 50, 60)) == 1


def test_what_is_no_message_between_ranks_that_are_known() -> None:
    """Between the sides of an intercommunicator, on a communicator of which a member left no log, or of a
    send that no wait ended, there is no message; a collective that not all mean alike is none."""
    sides, gone = Comm((0,), (1,), 1), Comm((0, 1, 5), (0, 1, 5), 0)
    folder = program(
        "run",
        [
            made("send", Kind.SEND, 10, 20, comm=1, peer=0, tag=0),
            made("send", Kind.SEND, 30, 40, comm=2, peer=1, tag=0),
            made("isend", Kind.POST_SEND, 50, 60, comm=0, peer=1, tag=0),
            made("bcast", Kind.COLLECTIVE, 70, 80, comm=0, peer=0),
        ],
        [
            made("recv", Kind.RECEIVE, 10, 20, comm=1, source=0, got_tag=0),
            made("recv", Kind.RECEIVE, 30, 40, comm=2, source=0, got_tag=0),
            made("recv", Kind.RECEIVE, 50, 60, comm=0, source=0, got_tag=0),
            made("bcast", Kind.COLLECTIVE, 70, 80, comm=0, peer=1),
        ],
        comms=[sides, gone],
    )
    logs = read_calls(folder)
    logs[1].comms[1] = Comm((1,), (0,), 1)
    found = program_calls(logs)
    assert (found.messages, found.collectives) == ((), ())
    assert len([one for one in found.regions if one.call]) == 8


def test_a_program_without_messages_in_otf2() -> None:
    """Regions that the program named, and calls that are neither message nor collective, are an archive too,
    in which nothing is sent."""
    folder = program("run", [made("Put", Kind.PLAIN, 10, 20), made("Fence", Kind.PLAIN, 30, 40)])
    found = read_otf2(written("otf2", "run"))
    assert [one[1:4] for one in slices(found)] == [("Put at a.py:1", 10, 20), ("Fence at a.py:2", 30, 40)]
    assert {type(event) for _, event in found.events} == {otf2.events.Enter, otf2.events.Leave}
    assert content(folder).remarks == ()


MESSAGES = """
import json, sys
import numpy as np
import rankwise
from mpi4py import MPI
comm = MPI.COMM_WORLD
rank, size = comm.rank, comm.size
pair = comm.Split(rank == size - 1, -rank)
box = np.zeros(100)
with rankwise.region("around"):
    right, left = (rank + 1) % size, (rank - 1) % size
    comm.Sendrecv(box, right, 3, recvbuf=box.copy(), source=left, recvtag=3)
    comm.sendrecv([rank] * 10, right, 4, source=left, recvtag=4)
requests = [comm.Irecv(np.zeros(10), left, 5), comm.Isend(np.ones(10), right, 5)]
MPI.Request.Waitall(requests)
if rank == 0:
    for number in range(1, size):
        comm.Recv(box, MPI.ANY_SOURCE, MPI.ANY_TAG)
else:
    comm.Send(box[: 10 * rank], 0, tag=rank)
comm.Barrier()
if rank == 0:
    comm.mprobe(1, 0).recv()
if rank == 1:
    comm.ssend("late", 0)
if pair.size > 1 and pair.rank < 2:
    pair.send(b"x", 1 - pair.rank) if pair.rank else pair.recv(source=1)
persistent = [comm.Send_init(box[:5], right, 6), comm.Recv_init(box[:5].copy(), left, 6)]
for _ in range(2):
    MPI.Prequest.Startall(persistent)
    MPI.Request.Waitall(persistent)
comm.Isendrecv(box[:7], right, 8, recvbuf=box[:7].copy(), source=left, recvtag=8).Wait()
comm.Sendrecv(box[:9], right, 8, recvbuf=box[:9].copy(), source=left, recvtag=8)
comm.Allreduce(MPI.IN_PLACE, box)
comm.Ibarrier().Wait()
comm.gather(rank, root=1)
"""


@pytest.mark.mpi
def test_a_real_program_in_otf2(command: Command, tmp_path: Path) -> None:
    """Of a program on 3 ranks each message that it sends is there once, from whom to whom, with its tag and
    bytes, sent before it is received; each collective has all ranks; the reader's order is that of time, and
    regions nest."""
    (tmp_path / "messages.py").write_text(MESSAGES)
    done = command.rankwise("run", "--ranks", "3", "--out", "run", "messages.py")
    assert done.code == 0, done
    found = read_otf2(written("otf2", "run"))
    slices(found)
    times = [event.time for _, event in found.events]
    assert times == sorted(times)
    sent: Counter[Any] = Counter()
    events = otf2.events
    for at, event in found.events:
        places = found.communicators[event.communicator.name] if hasattr(event, "communicator") else []
        if isinstance(event, (events.MpiSend, events.MpiIsend)):
            sent[at, places[event.receiver], event.msg_tag, event.msg_length] += 1
        elif isinstance(event, (events.MpiRecv, events.MpiIrecv)):
            key = places[event.sender], at, event.msg_tag, event.msg_length
            sent[key] -= 1
            assert sent[key] >= 0, key
    assert not any(sent.values())
    rank = [f"rank {number} worker" for number in range(3)]
    around = [(rank[n], rank[(n + 1) % 3]) for n in range(3)]
    lengths = {(at, to, tag): size for at, to, tag, size in sent}
    assert set(lengths) == {
        *((at, to, tag) for at, to in around for tag in (3, 4, 5, 6, 8)),
        *((rank[n], rank[0], n) for n in (1, 2)),
        (rank[1], rank[0], 0),
        (rank[0], rank[1], 0),
    }
    assert all(lengths[(*pair, 3)] == 800 and lengths[(*pair, 5)] == 80 for pair in around)
    assert all(lengths[(*pair, 6)] == 40 and 20 < lengths[(*pair, 4)] < 80 for pair in around)
    assert lengths[rank[2], rank[0], 2] == 160
    # The row of Isendrecv is not that of its send, which is over unseen; the next one is not taken for it.
    assert all(lengths[(*pair, 8)] == 72 for pair in around)
    assert [event.msg_tag for _, event in of_kind(found, events.MpiRecv)].count(8) == 3
    begun = len(of_kind(found, events.MpiSend)) + len(of_kind(found, events.MpiIsend))
    assert begun == 3 * (1 + 1 + 1 + 2 + 1) + 2 + 1 + 1
    ends = of_kind(found, events.MpiCollectiveEnd)
    assert Counter(operation(event) for _, event in ends) == {
        "BARRIER": 3,
        "ALLREDUCE": 3,
        "GATHER": 3,
    }
    done_later = of_kind(found, events.NonBlockingCollectiveComplete)
    assert [operation(event) for _, event in done_later] == ["BARRIER"] * 3
    assert any(one[1] == "around" for one in slices(found))


# The others


def wait_s(ranks: int) -> float:
    return 1 + 2 * math.log2(ranks)


def several(*numbers: int, **more: Any) -> list[str]:
    """Runs of one program on these numbers of ranks: 4 s of computing on each, 8 s in all over ranks, and a
    Barrier that takes 1 + 2 log2(ranks) s."""
    names = []
    for ranks in numbers:
        names.append(f"run-{ranks}")
        barrier_ns = round(wait_s(ranks) * 1e9)
        calls = [made("Barrier", Kind.COLLECTIVE, 10**9, 10**9 + barrier_ns, comm=0)]
        program(names[-1], *[calls] * ranks, ended_ns=5 * 10**9 + barrier_ns, **more)
    return names


def test_programs_in_extrap(readers: Path) -> None:
    """Extra-P finds in whole runs of a program what was put in: the wall time of the longest rank and the
    mean seconds of each phase over numbers of ranks."""
    found = ask(readers, EXTRAP, written("extrap", *several(1, 2, 4, 8, 16)), "64")
    assert set(found) == {"program", *(f"program->{name}" for name in ("startup", "compute", "transfer"))}
    walls = {str(n): [pytest.approx(5 + wait_s(n)), 1] for n in (1, 2, 4, 8, 16)}
    assert found["program"]["points"] == walls
    assert found["program->transfer"]["predicted"] == [pytest.approx(13.0, rel=0.01)]
    assert found["program->compute"]["predicted"] == [pytest.approx(5.0, rel=0.01)]


def test_a_program_in_talp(readers: Path) -> None:
    """TALP's pages read the ledger's efficiencies of a program, and what it computed as useful."""
    program(
        "run",
        [made("Barrier", Kind.COLLECTIVE, 200, 1000, comm=0)],
        [made("Barrier", Kind.COLLECTIVE, 800, 1000, comm=0)],
    )
    (found,) = ask(readers, TALP_PAGES, written("talp", "run"))
    assert found["parallelEfficiency"] == pytest.approx((195 + 795) / 2 / 995)
    assert found["mpiLoadBalance"] == pytest.approx((195 + 795) / 2 / 795)


def test_a_program_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """The seconds of each rank's phases add up to its wall time to the nanosecond, under epoch 0, as a
    program has none; nothing is said to be missing."""
    folder = program(
        "run",
        [made("Barrier", Kind.COLLECTIVE, 200, 1000, comm=0)],
        [made("Barrier", Kind.COLLECTIVE, 800, 1000, comm=0)],
    )
    rows = rows_of(written("csv", "run"))
    assert capsys.readouterr().err == ""
    assert {row["epoch"] for row in rows} == {"0"}
    found: Counter[tuple[int, str]] = Counter()
    for row in rows:
        found[int(row["rank"]), row["phase"]] += ns_of(row["seconds"])
    assert found[0, "wait"] == 600
    assert found[0, "compute"] == 195
    for rank in folder.read().ranks:
        assert sum(ns for (of, _), ns in found.items() if of == rank.rank) == rank.wall_ns


BAD_INPUT = [
    (["run-2", "--format", "mlperf"], ["run-2", "without a rankwise.Run", "mlperf", "otf2"]),
    (["run-2", "--format", "extrap"], ["extrap", "numbers of ranks", "2", "two or more"]),
    (["run-2", "failed", "--format", "extrap"], ["failed", "did not come to its end", "extrap"]),
    (["run-2", "other", "--format", "extrap"], ["program", "a.py", "other", "a.py 5"]),
    (["run-2", "training", "--format", "extrap"], ["run-2", "training", "without a rankwise.Run"]),
    (["training", "run-2", "--format", "extrap"], ["run-2", "training", "without a rankwise.Run"]),
    (["no-calls", "--format", "otf2"], ["no-calls", "no calls of MPI", "csv"]),
    (["cleared", "--format", "otf2"], ["cleared", "no calls", "csv"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT, ids=lambda value: " ".join(value)[-40:])
def test_bad_input(words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot be exported of a program is one line that says why and what to do, and code 2; nothing is
    written."""
    several(2)
    program("failed", [], outcome="failed")
    program("other", [], words=("a.py", "5"))
    program("no-calls", [])
    cleared = program("cleared", [made("Barrier", Kind.COLLECTIVE, 200, 1000, comm=0)])
    for path in cleared.calls.iterdir():
        path.unlink()
    records.run_folder(Path("training"), records.record(3))
    before = sorted(Path.cwd().rglob("*"))
    assert call("export", *words, "--output", "new") == 2
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1, err
    assert all(word in err for word in expected), err
    assert out == ""
    assert sorted(Path.cwd().rglob("*")) == before
