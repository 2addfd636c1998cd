"""Regions that a program names: `with rankwise.region("load"):`."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rankwise
from rankwise.comm import World
from rankwise.errors import ConfigError
from rankwise.ledger.call_log import Kind, RankLog, read_logs
from rankwise.ledger.program_ledger import account
from rankwise.ledger.regions import collect_in
from rankwise.ledger.timeline import read_timeline
from rankwise.program.log import CallLog
from rankwise.report.program_trace import program_trace
from rankwise.report.run_page import write_report
from rankwise.report.trace import events
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import regions_of

from . import records
from .conftest import Command
from .effort import examples
from .simulation import Clock, simulate, token

LATE_NS = 1_000_000


def test_a_region_has_what_its_rank_did_there() -> None:
    """In a world: how often, and how long by phase, adding up to its length; waiting that is found later too,
    also in a region that is still open then; regions inside are part of those around them."""

    def program(world: World, clock: Clock) -> None:
        with rankwise.region("turn"):
            with rankwise.region("load"):
                clock.work(LATE_NS * (world.rank + 1))
            for _ in range(2):
                with rankwise.region("sum"):
                    world.allreduce(token())
            world.reconcile()
        world.allreduce(token())

    fast, slow = (world.exchange_log.regions.times() for world in simulate(2, program))
    assert list(fast) == [("turn", "load"), ("turn", "sum"), ("turn",)]
    for times, lateness, wait_ns in ((fast, 1, LATE_NS), (slow, 2, 0)):
        assert times["turn", "load"].phases_ns["other"] == lateness * LATE_NS
        assert times["turn", "sum"].count == 2
        assert times["turn", "sum"].phases_ns["wait"] == wait_ns
        assert times["turn", "sum"].phases_ns["transfer"] == 2_000
        assert times["turn",].phases_ns["wait"] == wait_ns
        assert times["turn",].phases_ns["other"] == lateness * LATE_NS


@examples(25, 100)
@given(st.lists(st.tuples(st.sampled_from(["begin", "end", "work", "sum", "compare"]), st.integers(1, 999))))
def test_regions_add_up_whatever_is_in_them(turns: list[tuple[str, int]]) -> None:
    """However regions, exchanges and comparisons follow each other, the time of those of the outermost level
    is what the clock says, no phase of any is negative, and a region has no less of any than those inside."""
    lengths: list[int] = [0, 0]

    def program(world: World, clock: Clock) -> None:
        stack = []
        for what, number in turns:
            if what == "begin":
                stack.append((rankwise.region(f"at {number % 3}"), clock()))
                stack[-1][0].__enter__()
            elif what == "end" and stack:
                region, began_ns = stack.pop()
                region.__exit__(None, None, None)
                lengths[world.rank] += 0 if stack else clock() - began_ns
            elif what == "work":
                clock.work(number * (world.rank + 1))
            elif what == "sum":
                world.allreduce(token())
            elif what == "compare":
                world.reconcile()
        for region, _ in reversed(stack):
            region.__exit__(None, None, None)
        lengths[world.rank] += clock() - stack[0][1] if stack else 0

    for rank, world in enumerate(simulate(2, program)):
        times = world.exchange_log.regions.times()
        assert sum(its.phases_ns.total() for path, its in times.items() if len(path) == 1) == lengths[rank]
        assert all(ns >= 0 for its in times.values() for ns in its.phases_ns.values())


def test_where_nobody_accounts_a_region_does_nothing() -> None:
    """In a program that rankwise does not run, and in another thread, a region is passed through; and a name
    that is none is refused in one line."""
    collect_in(None)
    with rankwise.region("alone"):
        pass
    assert rankwise.region("decorates")(lambda: 7)() == 7
    with pytest.raises(ConfigError, match="needs a name"), rankwise.region(3):  # type: ignore[arg-type]
        pass

    def program(world: World, clock: Clock) -> None:
        def load() -> None:
            with rankwise.region("beside"):
                clock.work(5)

        thread = threading.Thread(target=load)
        thread.start()
        thread.join()

    for world in simulate(1, program):
        assert not world.exchange_log.regions.times()


def program_log(folder: Path) -> RankLog:
    """What a rank of a program leaves that names two regions, one with a barrier in it."""
    log = CallLog(folder, 0)
    log.say("rank", host="here", start_ns=time.monotonic_ns())
    log.say("comm", members=[0], peers=[0], number=0)
    log.say("site", file="a.py", line=3, function="main", call="Barrier")
    collect_in(log)
    try:
        with rankwise.region("turn"), rankwise.region("sum"):
            began_ns = time.monotonic_ns()
            time.sleep(0.002)
            log.main.note(Kind.COLLECTIVE, 0, began_ns, time.monotonic_ns())
    finally:
        collect_in(None)
    log.say("end", ended_ns=time.monotonic_ns())
    log.close()
    (read,) = read_logs(folder)
    return read


def test_regions_of_a_program_without_a_run(tmp_path: Path) -> None:
    """They are read back from what the rank left, each call belongs to those in which it was made, and they
    stand in the trace on a track of their own, the outer one first."""
    read = program_log(tmp_path)
    (found,) = account([read])
    assert list(found.regions) == [("turn", "sum"), ("turn",)]
    for its in found.regions.values():
        assert its.phases_ns["transfer"] == found.phases_ns["transfer"] > 0
    row = regions_of(found.regions)[1]
    assert (row.path, row.count) == (["turn"], 1)
    assert row.wall_ns == sum(row.phases_ns.values()) <= found.wall_ns
    slices = [event for event in program_trace([read]).events if event.kind == "X"]
    assert [(event.rank, event.name) for event in slices] == [(-1, "turn"), (-1, "sum"), (0, "Barrier")]
    assert slices[2].args["line"] == "a.py:3"


def test_regions_of_a_run_are_in_its_report_and_its_trace(tmp_path: Path) -> None:
    """A page has a table of them, over all ranks; the timeline of a rank holds the last, and a timeline of an
    older rankwise none."""

    def program(world: World, clock: Clock) -> None:
        world.timeline.begin()
        for _ in range(3):
            with rankwise.region("load <data>"):
                clock.work(1_000_000_000)
        world.timeline.save(
            *(tmp_path / "0.npz",),
            rank=0,
            role="worker",
            host="h",
            to_common=lambda times: times,
            regions=world.exchange_log.regions.recent,
        )

    (world,) = simulate(1, program)
    line = read_timeline(tmp_path / "0.npz")
    assert line.region_paths == (("load <data>",),)
    found = [e for e in events(records.record(1), [line]) if e.rank < 0]
    assert [event.duration_ns for event in found] == [1_000_000_000] * 3
    row = records.rank(0).model_copy(update={"regions": regions_of(world.exchange_log.regions.times())})
    folder = records.run_folder(tmp_path / "run", records.record([row]))
    write_report([folder.path], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "load &lt;data&gt;" in text
    assert "Regions that the program named" in text


PROGRAM = """
import sys, time, rankwise
from mpi4py import MPI
comm = MPI.COMM_WORLD
with rankwise.region("turn"):
    with rankwise.region("work"):
        time.sleep(0.3 * comm.rank)
    comm.Barrier()
"""


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_a_program_that_uses_mpi4py_names_regions(command: Command, tmp_path: Path) -> None:
    """Each rank's regions stand in the record with what it waited in them, and `rankwise trace` shows calls,
    with line and rank waited for, and regions."""
    (tmp_path / "named.py").write_text(PROGRAM)
    done = command.rankwise("run", "--ranks", "2", "--out", "run", "named.py")
    assert done.code == 0, done
    fast, slow = RunFolder(tmp_path / "run").read().ranks
    turn, work = ({tuple(row.path): row for row in rank.regions} for rank in (fast, slow))
    assert turn["turn",].phases_ns["wait"] == pytest.approx(fast.phases_ns["wait"])
    # It sleeps for 0.3 s; how much longer either takes is for the machine to say.
    assert 0.2 < turn["turn",].phases_ns["wait"] / 1e9 < 5
    assert 0.29 < work["turn", "work"].phases_ns["compute"] / 1e9 < 5
    traced = command.rankwise("trace", "run", "--output", "trace.json")
    assert traced.code == 0, traced
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    (barrier,) = (e for e in events if e["name"] == "Barrier" and e.get("args", {}).get("waited_for"))
    assert barrier["args"]["waited_for"] == "rank 1"
    assert barrier["args"]["line"] == "named.py:8"
    assert sum(event["name"] == "turn" for event in events) == 2
    assert {event["ph"] for event in events} == {"M", "X", "s", "f"}
