"""How a rank's process ends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rankwise.system.process_end import wait_until_read

ENDS = """
import atexit, sys, threading, time
from rankwise.system.process_end import end_process

def work():
    time.sleep(0.2)
    print("thread")

atexit.register(print, "first registered")
atexit.register(print, "last registered")
threading.Thread(target=work).start()
sys.stderr.write("no newline")
end_process({code}, ends_libraries={libraries})
"""


@pytest.mark.parametrize("libraries", [True, False])
@pytest.mark.parametrize("code", [0, 130])
def test_a_process_ends_as_by_sys_exit(code: int, libraries: bool) -> None:
    """Its threads come to their end, what was registered for the end is called, backwards, all output is
    written, and the code is the one that was given: as if by `sys.exit`."""
    program = ENDS.format(code=code, libraries=libraries)
    plain = program.replace("end_process(", "sys.exit(").replace(f", ends_libraries={libraries}", "")
    ours, pythons = (
        subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False)
        for text in (program, plain)
    )
    assert pythons.stdout == "thread\nlast registered\nfirst registered\n"
    assert (ours.returncode, ours.stdout, ours.stderr) == (code, pythons.stdout, pythons.stderr)
    assert pythons.returncode == code


def test_what_was_written_is_read_before_the_end() -> None:
    """A rank that is about to end all waits until mpiexec has read its last words, but not for ever."""
    ours, theirs = os.pipe()
    os.write(theirs, b"the line")
    wait_until_read(theirs, most_s=0.01)  # nobody reads
    read: list[float] = []

    def reads() -> None:
        time.sleep(0.2)
        read.append(time.monotonic())
        os.read(ours, 100)

    reader = threading.Thread(target=reads)
    reader.start()
    wait_until_read(theirs, most_s=60)
    assert read
    assert time.monotonic() >= read[0]
    reader.join()
    os.close(ours)
    os.close(theirs)


def test_only_a_pipe_has_a_reader(tmp_path: Path) -> None:
    """Output into a file is not waited for, however much of it lies behind the place where it stands."""
    path = tmp_path / "output"
    path.write_text("words")
    with path.open("r+b") as file:
        began_s = time.monotonic()
        wait_until_read(file.fileno(), most_s=300)
    assert time.monotonic() - began_s < 60
