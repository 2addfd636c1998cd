"""The watchdog: it ends processes that hang, and leaves alone those that only take long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.ledger.phases import PHASES, Ledger
from rankwise.runs.folder import RunFolder
from rankwise.survival import watchdog
from rankwise.survival.watchdog import LOOK_S, Watchdog
from rankwise.system import machine

from . import effort
from .conftest import Command
from .test_ledger import FakeClock

pytestmark = pytest.mark.cold

RANK = """
import sys, time
from pathlib import Path
from rankwise.ledger.phases import Ledger
from rankwise.runs.folder import RunFolder
from rankwise.survival.watchdog import Watchdog
ledger = Ledger()
folder, phase, beats = RunFolder(Path(sys.argv[1])), sys.argv[2], sys.argv[3] == "True"
rank, timeout_s = int(sys.argv[4]), float(sys.argv[5])
watchdog = Watchdog(folder, rank=rank, ranks=2, ledger=ledger, timeout_s=timeout_s)
ledger.enter(phase)
with watchdog:
    print("ready", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.05)
        if beats:
            ledger.enter(phase)
"""


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
    ends if it is killed."""

    def __init__(
        self, path: Path, process: subprocess.Popen[Any], clock: FakeClock, timeout_s: float
    ) -> None:
        self.clock = clock
        self.folder = Folder(path)
        self.found = self.folder.found
        self.watching, self.watched = (
            Watchdog(
                self.folder,
                rank=rank,
                ranks=2,
                ledger=Ledger(clock, cpu_clock=lambda: 0),
                timeout_s=timeout_s,
            )
            for rank in (0, 1)
        )
        self.process = process

    def tell(self) -> None:
        """Rank 1 tells that it is alive, and since when it has been at what."""
        self.watched._tell()
        row = self.watched._rows[1]
        row["pid"], row["started"] = self.process.pid, machine.start_ticks(self.process.pid)

    def watch(self, looks: int, between: Callable[[int], float | None]) -> float:
        """Rank 0 looks so many times, or until it has found something; before each look `between` says what
        rank 1 does, and how long it takes if that is not LOOK_S. Gives the seconds that went by."""
        began_ns = self.clock.now_ns
        turns: Iterator[int] = iter(range(looks))

        def wait(_: float) -> bool:
            turn = next(turns, None)
            if turn is None or self.found:
                return True
            self.clock.now_ns += round((between(turn) or LOOK_S) * 1e9)
            return False

        self.watching._over = SimpleNamespace(wait=wait)  # type: ignore[assignment]
        self.watching._watch()
        return (self.clock.now_ns - began_ns) / 1e9


@pytest.fixture
def pair(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Ranks that may be silent for 30 s; rank 1 has told of itself once."""
    clock = FakeClock(10**15)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic_ns=clock))
    pair = Pair(tmp_path, command.start("sleep", "600"), clock, timeout_s=30)
    pair.tell()
    return pair


OWN_DOING = ("forward", "backward", "optimizer", "pack", "evaluation", "other", "instrument")


@pytest.mark.parametrize(
    ("stops", "phase"), [*((True, phase) for phase in PHASES), *((False, phase) for phase in OWN_DOING)]
)
def test_what_hangs_is_ended_in_time(pair: Pair, stops: bool, phase: str) -> None:
    """A rank that tells nothing is ended in any phase, one that tells for ever of the same where that is its
    own doing: not before its time is over, and by the second look after."""
    pair.watched._ledger.enter(phase)
    pair.tell()
    seconds = pair.watch(120, lambda _: None if stops else pair.tell())
    ((rank, words, silent_s),) = pair.found
    assert rank == 1
    assert words.startswith(f"no sign of life for {silent_s:.0f} s, in {phase}")
    assert 30 < silent_s == seconds <= 30 + 2 * LOOK_S
    assert pair.process.wait(10) == -signal.SIGKILL
    assert pair.watching._rows[1]["pid"] == 0


@pytest.mark.parametrize("phase", sorted(set(PHASES) - set(OWN_DOING)))
def test_what_others_make_long_may_be(pair: Pair, phase: str) -> None:
    """A rank that tells of itself may wait for others, or for a disk, as long as it takes."""
    pair.watched._ledger.enter(phase)
    assert pair.watch(1200, lambda _: pair.tell()) == 1200 * LOOK_S
    assert pair.found == []
    assert pair.process.poll() is None


def test_a_long_evaluation_gives_signs(pair: Pair) -> None:
    """A rank that goes from batch to batch may stay in a phase for hours."""

    def next_batch(_: int) -> None:
        pair.watched._ledger.enter("evaluation")
        pair.tell()

    assert pair.watch(1200, next_batch) == 1200 * LOOK_S
    assert pair.found == []
    assert pair.process.poll() is None


def test_a_number_that_is_another_process_by_now_is_left_alone(pair: Pair) -> None:
    """A row of a process that has ended does not end the one that has its number, and is not looked at
    again."""
    pair.watched._rows[1]["started"] += 1
    pair.watch(120, lambda _: None)
    assert pair.found == []
    assert pair.process.poll() is None
    assert pair.watching._rows[1]["pid"] == 0


@pytest.mark.parametrize(("away_s", "is_one"), [(1.9, False), (2.1, True), (31, True), (3600, True)])
def test_after_a_pause_of_the_machine_the_others_tell_first(pair: Pair, away_s: float, is_one: bool) -> None:
    """A watchdog that was itself away for long does not judge by what it finds at its return: the others have
    all their time again to tell. One that came a little late does."""

    def pause(turn: int) -> float | None:
        if turn > 100:
            pair.tell()
        return away_s if turn == 50 else None  # after 25 s of silence, of the 30 that there are

    pair.watch(200, pause)
    assert bool(pair.found) is not is_one
    if is_one:
        assert pair.watch(120, lambda _: None) <= 30 + 2 * LOOK_S
        assert len(pair.found) == 1


# ---- With real processes in real time


def watcher(path: Path, timeout_s: float) -> tuple[Watchdog, Folder]:
    """Rank 0, in this process, which watches rank 1."""
    folder = Folder(path)
    return Watchdog(folder, rank=0, ranks=2, ledger=Ledger(), timeout_s=timeout_s), folder


def start(
    command: Command, path: Path, phase: str, beats: bool, *, rank: int = 1, timeout_s: float = 3600
) -> subprocess.Popen[Any]:
    words = [str(path), phase, str(beats), str(rank), str(timeout_s)]
    process = command.start(sys.executable, "-c", RANK, *words)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("stops", "phase"), [(True, "transfer"), (True, "checkpoint"), (False, "forward")])
def test_a_rank_that_hangs_is_ended(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stops: bool, phase: str
) -> None:
    """A process that was stopped, wherever it was, and one that computes without an end, are named with what
    they were at, and killed."""
    process = start(command, tmp_path, phase, beats=False)
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


@effort.only_in_full
@pytest.mark.parametrize(("phase", "beats"), [("evaluation", True), ("checkpoint", False), ("wait", False)])
def test_a_rank_that_takes_long_is_left_alone(
    command: Command, tmp_path: Path, phase: str, beats: bool
) -> None:
    """A long evaluation gives signs; a slow disk and waiting for others may take any time."""
    process = start(command, tmp_path, phase, beats)
    watchdog_of_0, folder = watcher(tmp_path, timeout_s=1.0)
    with watchdog_of_0:
        assert not folder.heard.wait(4)
    assert process.poll() is None


@effort.only_in_full
def test_a_real_pause(command: Command, tmp_path: Path) -> None:
    """A watchdog that was itself away for long does not judge by what it finds at its return."""
    watched = start(command, tmp_path, "forward", beats=True)
    watching = start(command, tmp_path, "forward", beats=True, rank=0, timeout_s=2)
    time.sleep(1)
    for process in (watching, watched):
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(watching.pid, signal.SIGCONT)
    time.sleep(0.2)
    os.kill(watched.pid, signal.SIGCONT)
    time.sleep(3)
    assert watched.poll() is None
