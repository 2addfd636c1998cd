"""The end of a process that has loaded much."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import os
import stat
import struct
import sys
import termios
import threading
import time
from collections.abc import Callable
from typing import NoReturn

at_end: list[Callable[[int], None]] = []
"""What is to be told this process's exit code, when all else is over."""


def end_process(code: int, *, ends_libraries: bool) -> NoReturn:
    """End this process as `sys.exit` does, but without tearing down Python's modules: with torch loaded that
    takes half a second of a core, in which nothing is left to do. `ends_libraries`: what libraries in C have
    registered for the end is called; without torch's it is over at once."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()  # MPI ends here
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    for tell in at_end:
        tell(code)
    if ends_libraries:
        ctypes.CDLL(None).exit(code)
    os._exit(code)


def wait_until_read(*handles: int, most_s: float = 1.0) -> None:
    """Wait until all that was written into these pipes has been read, but no longer than `most_s` seconds.
    What is no pipe is not waited for."""
    give_up = time.monotonic() + most_s
    for handle in handles:
        while _unread(handle) and time.monotonic() < give_up:
            time.sleep(0.005)


def _unread(handle: int) -> int:
    """Bytes that lie in a pipe; of a file the same question tells what follows."""
    try:
        if not stat.S_ISFIFO(os.fstat(handle).st_mode):
            return 0
        answer = fcntl.ioctl(handle, termios.FIONREAD, b"\0" * 4)
    except OSError:
        return 0
    return int(struct.unpack("i", answer)[0])
