"""The watchdog: it ends processes that hang, and leaves alone those that only take long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.ledger.phases import PHASES, Ledger
from rankwise.runs.folder import RunFolder
from rankwise.survival import watchdog
from rankwise.survival.hangs import Limits
from rankwise.survival.watchdog import LOOK_S, Watchdog
from rankwise.system import machine
from rankwise.system.activity import Activity, Doing

from . import effort
from .conftest import Command
from .test_ledger import FakeClock

pytestmark = pytest.mark.cold

RANK = """
import sys, threading, time
from pathlib import Path
from rankwise.ledger.phases import Ledger
from rankwise.runs.folder import RunFolder
from rankwise.survival.hangs import Limits
from rankwise.survival.watchdog import Watchdog
ledger = Ledger()
folder, phase, code, rank, timeout_s = RunFolder(Path(sys.argv[1])), *sys.argv[2:4], *map(float, sys.argv[4:])
ledger.enter(phase)
with Watchdog(folder, rank=int(rank), ranks=2, ledger=ledger, limits=Limits(timeout_s)):
    print("ready", flush=True)
    exec(code)
"""

BEATS = "while True: time.sleep(0.05); ledger.enter(phase)"
COMPUTES = "while True: pass"
HOLDS_PYTHONS_LOCK = "sum(iter(int, 1))"
LOCKS = "threading.Event().wait()"
SLEEPS = "time.sleep(600)"

LIMIT_S, LATE_S = 30, 2
"""How long ranks may be at rest, and how much later that may be noticed: the looks that make one quiet."""


class Folder(RunFolder):
    """A run folder that keeps the last words it gets, as rank, message and seconds of silence."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.found: list[tuple[int, str, float | None]] = []
        self.heard = threading.Event()

    def leave_words(
        self, rank: int, kind: str, message: str, *, silent_s: float | None = None, **more: Any
    ) -> None:
        assert kind == "hang"
        self.found.append((rank, message, silent_s))
        self.heard.set()


# ---- By a clock of the test's own


class Pair:
    """Rank 0 watches rank 1 by a clock that moves only when told. Rank 1 stands for a real process, which
    ends if it is killed. Rank 0 waits in an exchange."""

    def __init__(self, path: Path, process: subprocess.Popen[Any], clock: FakeClock, limits: Limits) -> None:
        self.clock = clock
        self.folder = Folder(path)
        self.found = self.folder.found
        self.watching, self.watched = (
            Watchdog(
                self.folder, rank=rank, ranks=2, ledger=Ledger(clock, cpu_clock=lambda: 0), limits=limits
            )
            for rank in (0, 1)
        )
        self.watching._ledger.enter("transfer")
        self.process = process

    def tell(self, doing: Doing = "running", cpu_s: float = 0.0) -> None:
        """Rank 1 tells what it is at and since when, and what its process is doing."""
        self.watched._tell()
        beat = self.watched._beats.all()[1]
        pid, started = self.process.pid, machine.start_ticks(self.process.pid)
        assert started is not None
        activity = Activity(doing, round(cpu_s * 1e9))
        self.watched._beats.tell(1, replace(beat, pid=pid, started=started, watcher=0, activity=activity))

    def stop(self) -> None:
        """Stop the process of rank 1."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def watch(self, looks: int, between: Callable[[int], object]) -> float:
        """Rank 0 looks so many times, or until it has found something; before each look `between` says what
        rank 1 does, and how long it takes if that is not LOOK_S. Gives the seconds that went by."""
        began_ns = self.clock.now_ns
        turns: Iterator[int] = iter(range(looks))

        def wait(_: float) -> bool:
            turn = next(turns, None)
            if turn is None or self.found:
                return True
            takes_s = between(turn)
            self.clock.now_ns += round((takes_s if isinstance(takes_s, float) else LOOK_S) * 1e9)
            return False

        self.watching._over = SimpleNamespace(wait=wait)  # type: ignore[assignment]
        self.watching._watch()
        return (self.clock.now_ns - began_ns) / 1e9

    def is_left_alone(self) -> bool:
        return not self.found and self.process.poll() is None and 1 in self.watching._beats.all()


@pytest.fixture
def pair(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    """Ranks that may be at rest for 30 s, and in the same step for 1,000; rank 1 has told of itself once."""
    clock = FakeClock(10**15)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic_ns=clock))
    pair = Pair(tmp_path, command.start("sleep", "600"), clock, Limits(LIMIT_S, 1000))
    pair.tell()
    yield pair
    pair.process.kill()


def is_ended(pair: Pair, seconds: float) -> None:
    """Rank 1 alone was killed, after its time and not much later."""
    ((rank, _, silent_s),) = pair.found
    assert rank == 1
    assert silent_s is not None
    assert LIMIT_S < silent_s <= seconds <= LIMIT_S + LATE_S
    assert pair.process.wait(10) == -signal.SIGKILL
    assert 1 not in pair.watching._beats.all()


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_stopped_is_ended_in_time(pair: Pair, phase: str) -> None:
    """A rank that was stopped in any phase, and so tells nothing, is looked at and ended."""
    pair.watched._ledger.enter(phase)
    pair.tell()
    pair.stop()
    seconds = pair.watch(120, lambda _: None)
    is_ended(pair, seconds)
    assert f"stopped in {phase}; waiting for it: rank 0" in pair.found[0][1]


def test_what_is_locked_is_ended_in_time(pair: Pair) -> None:
    """A rank that tells for ever of the same lock is ended, while another waits in an exchange."""
    pair.watched._ledger.enter("forward")
    is_ended(pair, pair.watch(120, lambda _: pair.tell("locked")))
    assert "asleep in a lock in forward; waiting for it: rank 0" in pair.found[0][1]


def test_a_lock_that_nobody_waits_for(pair: Pair) -> None:
    """A rank asleep in a lock is left alone while no other is in an exchange."""
    pair.watched._ledger.enter("forward")
    pair.watching._ledger.enter("forward")
    pair.watch(120, lambda _: pair.tell("locked"))
    assert pair.is_left_alone()


@pytest.mark.parametrize("doing", ["running", "waiting", "locked"])
def test_what_is_slow_is_left_alone(pair: Pair, doing: Doing) -> None:
    """A rank that computes, waits for what is not in its hands, or whose children compute, may take its
    time."""
    pair.watched._ledger.enter("evaluation")
    pair.watch(1000, lambda turn: pair.tell(doing, turn / 10))
    assert pair.is_left_alone()


def test_who_tells_nothing_and_is_not_stopped_is_left_alone(pair: Pair) -> None:
    """A rank whose watching thread does not get its turn is looked at, and not taken for a dead one."""
    pair.watched._ledger.enter("forward")
    pair.tell()
    pair.watch(1000, lambda _: None)
    assert pair.is_left_alone()


def test_locks_of_one_phase_after_another_are_no_hang(pair: Pair) -> None:
    """A rank that goes from phase to phase may sleep in locks for hours."""

    def next_batch(turn: int) -> None:
        if turn % 50 == 0:
            pair.watched._ledger.enter("evaluation")
        pair.tell("locked")

    pair.watch(1200, next_batch)
    assert pair.is_left_alone()


def test_a_step_without_an_end_is_ended(pair: Pair) -> None:
    """With a limit for steps a rank that computes is ended after it, and one that goes on is not."""
    pair.watching.steps_begin()

    def step(turn: int) -> None:
        if turn < 3000 and turn % 1000 == 0:
            pair.watched._ledger.enter("backward")
        pair.tell("running", turn)

    assert 2000 < pair.watch(6000, step) <= 2002
    ((rank, words, _),) = pair.found
    assert rank == 1
    assert words == "no end of backward after 1000 s, with --step-timeout 1000; waiting for it: rank 0"
    assert pair.process.wait(10) == -signal.SIGKILL


def test_what_is_built_before_training_is_no_step(pair: Pair) -> None:
    """Before steps begin, a rank that reads its dataset is waited for, but not one that is stopped in it."""
    pair.watched._ledger.enter("data")
    pair.watch(6000, lambda turn: pair.tell("running", turn))
    assert pair.is_left_alone()
    pair.stop()
    pair.watch(120, lambda _: None)
    assert [rank for rank, *_ in pair.found] == [1]


def test_a_number_that_is_another_process_by_now_is_left_alone(pair: Pair) -> None:
    """A row of a process that has ended does not end the one that has its number, and is not looked at
    again."""
    beat = pair.watched._beats.all()[1]
    pair.watched._beats.tell(1, replace(beat, started=beat.started + 1))
    pair.stop()
    pair.watch(120, lambda _: None)
    assert pair.found == []
    assert pair.process.poll() is None
    assert 1 not in pair.watching._beats.all()


@pytest.mark.parametrize(("away_s", "is_one"), [(1.9, False), (2.1, True), (31.0, True), (3600.0, True)])
def test_after_a_pause_of_the_machine_the_others_tell_first(pair: Pair, away_s: float, is_one: bool) -> None:
    """A watchdog that was itself away for long does not judge by what it finds at its return: the others have
    all their time again to tell. One that came a little late does."""
    pair.stop()

    def pause(turn: int) -> float | None:
        if turn == 101:
            pair.process.send_signal(signal.SIGCONT)
        return away_s if turn == 50 else None  # after 25 s of silence, of the 30 that there are

    pair.watch(200, pause)
    assert bool(pair.found) is not is_one
    if is_one:
        pair.tell()
        pair.stop()
        is_ended(pair, pair.watch(120, lambda _: None))


# ---- With real processes in real time


def watcher(path: Path, timeout_s: float) -> tuple[Watchdog, Folder]:
    """Rank 0, in this process, which watches rank 1 and waits for it."""
    folder, ledger = Folder(path), Ledger()
    ledger.enter("wait")
    return Watchdog(folder, rank=0, ranks=2, ledger=ledger, limits=Limits(timeout_s)), folder


def start(
    command: Command, path: Path, phase: str, code: str, *, rank: int = 1, timeout_s: float = 3600
) -> subprocess.Popen[Any]:
    words = [str(path), phase, code, str(rank), str(timeout_s)]
    process = command.start(sys.executable, "-c", RANK, *words)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("stops", "phase", "code"),
    [(True, "transfer", BEATS), (True, "checkpoint", COMPUTES), (False, "forward", LOCKS)],
)
def test_a_rank_that_hangs_is_ended(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool, phase: str, code: str
) -> None:
    """A process that was stopped, wherever it was, and one that sleeps in a lock, are named with what they
    were at, and killed."""
    process = start(command, tmp_path, phase, code)
    if stops:
        os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.1)
    watchdog_of_0, folder = watcher(tmp_path, timeout_s=0.7)
    with watchdog_of_0:
        assert folder.heard.wait(30)
        assert process.wait(10) == -signal.SIGKILL
    ((rank, words, _),) = folder.found
    assert rank == 1
    assert f"in {phase}" in words


@pytest.mark.parametrize(
    "code", effort.daily([HOLDS_PYTHONS_LOCK, BEATS, COMPUTES, SLEEPS], [HOLDS_PYTHONS_LOCK])
)
def test_a_rank_that_takes_long_is_left_alone(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """A rank that computes is left alone, even if its own watchdog gets no turn; so is one that sleeps."""
    process = start(command, tmp_path, "forward", code)
    monkeypatch.setattr(watchdog, "LOOK_S", 0.1)
    watchdog_of_0, folder = watcher(tmp_path, timeout_s=0.7)
    with watchdog_of_0:
        assert not folder.heard.wait(3)
    assert process.poll() is None


@effort.only_in_full
def test_a_real_pause(command: Command, tmp_path: Path) -> None:
    """A watchdog that was itself away for long does not judge by what it finds at its return."""
    watched = start(command, tmp_path, "forward", BEATS)
    watching = start(command, tmp_path, "forward", BEATS, rank=0, timeout_s=2)
    time.sleep(1)
    for process in (watching, watched):
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(watching.pid, signal.SIGCONT)
    time.sleep(0.2)
    os.kill(watched.pid, signal.SIGCONT)
    time.sleep(3)
    assert watched.poll() is None
