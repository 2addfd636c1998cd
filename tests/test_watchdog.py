"""The watchdog: it ends processes that hang, and leaves alone those that only take long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rankwise.ledger import Ledger
from rankwise.watchdog import Watchdog

from .conftest import Command

RANK = """
import sys, time
from pathlib import Path
from rankwise.ledger import Ledger
from rankwise.watchdog import Watchdog
ledger = Ledger()
path, phase, beats = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True"
rank, timeout_s = int(sys.argv[4]), float(sys.argv[5])
dog = Watchdog(path, rank=rank, ranks=2, ledger=ledger, timeout_s=timeout_s, report=print)
ledger.enter(phase)
with dog:
    print("ready", flush=True)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        time.sleep(0.05)
        if beats:
            ledger.enter(phase)
"""


class Watcher:
    """Rank 0, in this process, which watches rank 1."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        self.found: list[tuple[int, str]] = []
        self.heard = threading.Event()
        self.dog = Watchdog(path, rank=0, ranks=2, ledger=Ledger(), timeout_s=timeout_s, report=self._report)

    def _report(self, rank: int, words: str, silent_s: float) -> None:
        self.found.append((rank, words))
        self.heard.set()


def start(
    command: Command, path: Path, phase: str, beats: bool, *, rank: int = 1, timeout_s: float = 3600
) -> subprocess.Popen[Any]:
    words = [str(path), phase, str(beats), str(rank), str(timeout_s)]
    process = command.start(sys.executable, "-c", RANK, *words)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("stops", "phase"), [(True, "transfer"), (True, "checkpoint"), (False, "forward")])
def test_a_rank_that_hangs_is_ended(command: Command, tmp_path: Path, stops: bool, phase: str) -> None:
    """A process that was stopped, wherever it was, and one that computes without an end, are named with what
    they were at, and killed."""
    path = tmp_path / "beats"
    process = start(command, path, phase, beats=False)
    if stops:
        os.kill(process.pid, signal.SIGSTOP)
    watcher = Watcher(path, timeout_s=1.5)
    with watcher.dog:
        assert watcher.heard.wait(30)
        assert process.wait(10) == -signal.SIGKILL
    ((rank, words),) = watcher.found
    assert rank == 1
    assert f"in {phase}" in words


@pytest.mark.parametrize(("phase", "beats"), [("evaluation", True), ("checkpoint", False), ("wait", False)])
def test_a_rank_that_takes_long_is_left_alone(
    command: Command, tmp_path: Path, phase: str, beats: bool
) -> None:
    """A long evaluation gives signs; a slow disk and waiting for others may take any time."""
    path = tmp_path / "beats"
    process = start(command, path, phase, beats)
    watcher = Watcher(path, timeout_s=1.0)
    with watcher.dog:
        assert not watcher.heard.wait(4)
    assert process.poll() is None


def test_a_number_that_is_another_process_by_now_is_left_alone(command: Command, tmp_path: Path) -> None:
    """A row of a process that has ended does not end the one that has its number."""
    path = tmp_path / "beats"
    process = start(command, path, "forward", beats=False)
    os.kill(process.pid, signal.SIGSTOP)
    watcher = Watcher(path, timeout_s=1.0)
    watcher.dog._rows[1]["started"] += 1
    with watcher.dog:
        assert not watcher.heard.wait(3)
    assert process.poll() is None


def test_after_a_pause_of_the_machine_the_others_tell_first(command: Command, tmp_path: Path) -> None:
    """A watchdog that was itself away for long does not judge by what it finds at its return."""
    path = tmp_path / "beats"
    watched = start(command, path, "forward", beats=True)
    watching = start(command, path, "forward", beats=True, rank=0, timeout_s=2)
    time.sleep(1)
    for process in (watching, watched):
        os.kill(process.pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(watching.pid, signal.SIGCONT)
    time.sleep(0.2)
    os.kill(watched.pid, signal.SIGCONT)
    time.sleep(3)
    assert watched.poll() is None
