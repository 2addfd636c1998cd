"""What a rank leaves behind that a signal of its own code has ended, and what others make of it."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rankwise.runs.folder import RunFolder
from rankwise.survival import crashes
from rankwise.survival.causes import find_crashes, last_words

RANK = """
import ctypes, os, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from rankwise.survival.crashes import written_down

def fork():
    if os.fork() == 0:
        os.abort()
    os.wait()

with written_down(Path(sys.argv[1])):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    exec(compile(sys.argv[2], "own.py", "exec"))
"""


def left_by(tmp_path: Path, how: str) -> tuple[int, Path]:
    """How a process ends that does this, and the file to which a crash of it would be written."""
    (tmp_path / "rank.py").write_text(RANK)
    path = tmp_path / ".crashes" / "rank.txt"
    words = [sys.executable, str(tmp_path / "rank.py"), str(path), how]
    return subprocess.run(words, check=False, capture_output=True).returncode, path


@pytest.mark.parametrize(
    ("how", "number", "what"),
    [
        (
            "\nctypes.string_at(0)",
            signal.SIGSEGV,
            r"Segmentation fault in __init__.py, line \d+, called in own.py",
        ),
        ("\nos.abort()", signal.SIGABRT, "Aborted in own.py"),
        ("\nos.kill(os.getpid(), 7)", signal.SIGBUS, "Bus error in own.py"),
        ("\nos.kill(os.getpid(), 8)", signal.SIGFPE, "Floating.point exception in own.py"),
    ],
    ids=["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE"],
)
def test_a_crash_says_where(tmp_path: Path, how: str, number: int, what: str) -> None:
    """The signal and the innermost line, that of the user's code too where it is a library's; the signal
    still ends the process."""
    code, path = left_by(tmp_path, how)
    assert code == -number
    crash = crashes.read(path)
    assert crash is not None
    assert re.fullmatch(f"{what}, line 2", crash.what), crash
    assert crash.has_place
    assert "in <module>" in crash.stacks


@pytest.mark.parametrize(
    ("how", "code"), [("pass", 0), ("raise ValueError", 1), ("os.kill(os.getpid(), 9)", -9), ("fork()", 0)]
)
def test_what_is_no_crash_leaves_none(tmp_path: Path, how: str, code: int) -> None:
    """A process that ends by itself, by an exception or by SIGKILL, or whose child crashes, has not."""
    found, path = left_by(tmp_path, how)
    assert found == code
    assert crashes.read(path) is None
    assert path.exists() is (code == -9)


def test_where_nothing_can_be_written_the_rank_goes_on(tmp_path: Path) -> None:
    """A full disk is no reason to end."""
    (tmp_path / "file").write_text("")
    with crashes.written_down(tmp_path / "file" / "rank.txt"):
        pass
    assert crashes.read(tmp_path / "file" / "rank.txt") is None


THREADS = """
Fatal Python error: {signal}

{current} (most recent call first):
{frames}

Thread 0x00007f (most recent call first):
  File "/home/me/main.py", line {line} in main
"""


def crashed(folder: RunFolder, rank: int, signal: str = "Bus error", line: int = 7) -> None:
    """A rank has crashed in a thread that a library has begun, while its main thread was at a line."""
    path = folder.crash_of(rank)
    path.parent.mkdir(exist_ok=True)
    current, frames = "Current thread 0x00007e", "  <no Python frame>"
    path.write_text(THREADS.format(signal=signal, current=current, frames=frames, line=line))


def test_two_ranks_that_crash_alike_are_the_programs_error(tmp_path: Path) -> None:
    """The same signal at the same line in the same epoch ends the run, in one line; all else is a rank that
    was lost. Each of them has left words."""
    folder = RunFolder(tmp_path)
    crashed(folder, 0)
    folder.crash_of(1).write_text("")  # of a rank that lives
    assert find_crashes(folder, range(3)) is None
    crashed(folder, 1, signal="Aborted")
    crashed(folder, 2, line=8)
    assert find_crashes(folder, range(3)) is None
    assert last_words(folder) == (
        "rank 0: Bus error in main.py, line 7; rank 1: Aborted in main.py, line 7; "
        "rank 2: Bus error in main.py, line 8"
    )
    crashed(folder, 3, line=8)
    found = find_crashes(folder, [3])
    assert str(found) == (
        "Bus error in main.py, line 8 (it ended rank 2 and rank 3 in the same epoch, and would end one rank "
        "after the other: mend the program)"
    )
    assert folder.read_words(3)["kind"] == "crash"


def test_crashes_in_epochs_apart_or_nowhere_are_not_alike(tmp_path: Path) -> None:
    """A rank that crashes as another did an epoch before, and two of which no line is known, are lost."""
    folder = RunFolder(tmp_path)
    crashed(folder, 0)
    assert find_crashes(folder, [0]) is None
    folder.metrics.write_text("{}\n")
    crashed(folder, 1)
    assert find_crashes(folder, [1]) is None
    for rank in (2, 3):
        folder.crash_of(rank).write_text("Fatal Python error: Bus error\n\nCurrent thread 0x7 (most recent c")
    assert find_crashes(folder, [2, 3]) is None
    assert folder.read_words(3)["message"] == "Bus error"


def test_words_are_whole_or_not_there(tmp_path: Path) -> None:
    """Survivors that read a rank's last words while another writes them find all or none of them, and of
    those who write at once the first counts."""
    folder, parts, over = RunFolder(tmp_path), [], threading.Event()

    def read() -> None:
        while not over.is_set():
            parts.extend(rank for rank, words in folder.read_all_words().items() if "traceback" not in words)

    def write(name: str) -> None:
        for rank in range(200):
            folder.leave_words(rank, "crash", name, traceback=" " * 10_000)

    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(read)
        for writing in [pool.submit(write, name) for name in "ab"]:
            writing.result()
        over.set()
        reading.result()
    sys.setswitchinterval(interval_s)
    assert not parts
    words = folder.read_all_words()
    assert sorted(words) == list(range(200))
    folder.leave_words(7, "crash", "late")
    assert folder.read_words(7) == words[7]
    assert sorted(path.name for path in folder.last_words.iterdir()) == [
        f"rank-{n:04d}.json" for n in range(200)
    ]
