"""How a rank's process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
