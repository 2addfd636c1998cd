"""What makes a forked process one of its own: what Linux shows of it, and with whom it ends."""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_F_SETSIG = 10
_PR_SET_MM, _PR_SET_MM_MAP = 35, 14

_shown: list[ctypes.Array[ctypes.c_char]] = []
"""The memory that Linux reads; it must stay."""


def end_with(pipe: int) -> None:
    """Have this process killed, by Linux itself, when the last process has gone that holds the other end of a
    pipe: whatever it does then, and stopped or not. Raises OSError where there is no such thing."""
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, os.O_ASYNC)
    watch = select.poll()
    watch.register(pipe, 0)
    if watch.poll(0):  # it has gone meanwhile
        os.kill(os.getpid(), signal.SIGKILL)


def show_as(words: Sequence[str], environment: Mapping[bytes, bytes]) -> None:
    """Show these words as this process's command line, and this environment as that with which it was
    started: by them processes are found, by people and by tools. Raises OSError where Linux does not."""
    line = b"".join(os.fsencode(word) + b"\0" for word in words)
    variables = b"".join(b"=".join(item) + b"\0" for item in environment.items())
    memory = ctypes.create_string_buffer(line + variables)
    begin = ctypes.addressof(memory)
    middle, end = begin + len(line), begin + len(line) + len(variables)
    # From the third field on, as the second may hold blanks; numbered as in proc(5).
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start_code, end_code, start_stack = (int(fields[number - 3]) for number in (26, 27, 28))
    start_data, end_data, start_brk = (int(fields[number - 3]) for number in (45, 46, 47))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sbrk.restype = ctypes.c_void_p
    libc.prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    # struct prctl_mm_map of linux/prctl.h: no auxv, and the file that is run stays.
    layout = (ctypes.c_uint64 * 13)(
        *(start_code, end_code, start_data, end_data, start_brk, 0, start_stack),
        *(begin, middle, middle, end),
        *(0, int.from_bytes(struct.pack("=II", 0, 0xFFFFFFFF), sys.byteorder)),
    )
    layout[5] = libc.sbrk(0)  # last, as what was made before may have moved it
    if libc.prctl(_PR_SET_MM, _PR_SET_MM_MAP, ctypes.addressof(layout), ctypes.sizeof(layout), 0):
        raise OSError(ctypes.get_errno(), "Linux does not let a process show another command line")
    _shown.append(memory)
