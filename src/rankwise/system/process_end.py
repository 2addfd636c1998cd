"""The end of a process that has loaded much."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
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
