"""A closed terminal: it asks a run to stop as SIGTERM does, and under nohup it does not."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.system import signals

from .processes import wait_for

LAUNCHER = """
import sys
from pathlib import Path
from rankwise.launch.supervision import start, supervise
print("begins", flush=True)
result = supervise(start([sys.executable, "-c", RANKS], lambda line: print(line.text, flush=True)))
print("ended", flush=True)
Path("result").write_text(f"{result.code} {result.interrupted}")
"""
RANKS = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(5))
Path("ready").touch()
time.sleep(0.5 if Path("brief").exists() else 60)
"""


def launcher(folder: Path, terminal: int, *before: str) -> subprocess.Popen[bytes]:
    """Our side of a launcher, on a terminal of its own, with ranks that end by code 5 when they are asked."""
    code = LAUNCHER.replace("RANKS", repr(RANKS))
    process = subprocess.Popen(
        [*before, sys.executable, "-c", code],
        cwd=folder,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    wait_for((folder / "ready").exists)
    return process


@pytest.mark.cold
def test_a_closed_terminal_stops_the_ranks(tmp_path: Path) -> None:
    """The ranks are asked once, though kernel and shell both tell, and nothing fails on what is written to a
    terminal that is gone."""
    ours, terminal = pty.openpty()
    process = launcher(tmp_path, terminal)
    os.close(ours)
    for _ in range(2):
        process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    assert (tmp_path / "result").read_text() == "5 True"


@pytest.mark.cold
def test_under_nohup_it_goes_on(tmp_path: Path) -> None:
    """What was started to outlive its terminal does."""
    (tmp_path / "brief").touch()
    ours, terminal = pty.openpty()
    process = launcher(tmp_path, terminal, "nohup")
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0
    os.close(ours)
    assert (tmp_path / "result").read_text() == "0 False"


def test_nothing_is_left_open() -> None:
    """A launcher closes what it read from its ranks: Python has no ResourceWarning to give."""
    code = (
        "import sys; from rankwise.launch.supervision import start, supervise\n"
        "supervise(start([sys.executable, '-c', 'print(1)'], lambda line: None))\n"
        "import gc; gc.collect()"
    )
    words = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


def test_an_ignored_hangup_stays_ignored() -> None:
    """Handlers for as long as work lasts leave a SIGHUP alone that nohup has ignored, and set the others."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handling(signals.STOP, lambda *_: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with signals.handling(signals.STOP, lambda *_: None):
            assert callable(signal.getsignal(signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
