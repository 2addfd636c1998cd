"""Signal handlers for as long as a piece of work lasts, and a terminal that is gone."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FrameType

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""What asks a run to stop: Ctrl-C, kill, a terminal that is closed, and a batch system's notice."""


@contextlib.contextmanager
def handling(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    """While inside, `handler` gets these signals; then the handlers that got them before. Under nohup, which
    has SIGHUP ignored, it stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread of a script may set handlers
        return
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers = [number for number in numbers if number != signal.SIGHUP]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def leave_lost_terminal() -> None:
    """Send what is still written to a terminal that was closed nowhere, where it would be an error."""
    for handle in (1, 2):
        watch = select.poll()
        watch.register(handle, 0)
        if any(event & select.POLLHUP for _, event in watch.poll(0)) and _is_terminal(handle):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, handle)
            os.close(nowhere)


def _is_terminal(handle: int) -> bool:
    try:
        return stat.S_ISCHR(os.fstat(handle).st_mode)
    except OSError:
        return False
