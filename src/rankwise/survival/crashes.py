"""Where a rank was when a signal that its own code raised ended it: SIGSEGV, SIGABRT, SIGFPE, SIGBUS, SIGILL.

No Python runs any more then, but Python's faulthandler still writes down the lines at which its threads were.
"""

from __future__ import annotations

import faulthandler
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rankwise.system.call_sites import NOT_THE_USERS

_SIGNAL = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)
_THREAD = re.compile(r"^(?:Current t|T)hread 0x[0-9a-f]+.*:$", re.MULTILINE)
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in ', re.MULTILINE)

_on: list[bool] = []  # while a crash of this process would be written down: whether one was shown before


@dataclass(frozen=True)
class Crash:
    """What ended a rank: the signal and, if Python was at a line, the innermost one, in words; and all lines
    at which its threads were."""

    what: str
    has_place: bool
    stacks: str


@contextmanager
def written_down(path: Path) -> Iterator[None]:
    """While inside, a crash of this process is written to a file, which goes away with the end; to none where
    none can be made."""
    with ExitStack() as stack:
        with suppress(OSError):
            path.parent.mkdir(exist_ok=True)
            file = stack.enter_context(path.open("w"))
            stack.callback(_forget, path)
            stack.callback(_stop)
            _on.append(faulthandler.is_enabled())
            faulthandler.enable(file)
        yield


def read(path: Path) -> Crash | None:
    """What was written down of a process that has ended; None if that was no crash."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    signal = _SIGNAL.search(text)
    if signal is None:
        return None
    threads = [text[start.start() :] for start in _THREAD.finditer(text)]
    current = [thread for thread in threads if thread.startswith("Current")]
    # A thread that a library has begun has no lines; the main thread, which comes last, waits for it.
    found = (frames for frames in map(_frames, (*current, *threads[-1:])) if frames)
    place = _place(next(found, []))
    return Crash(f"{signal[1]} in {place}" if place else signal[1], bool(place), text)


def _frames(thread: str) -> list[tuple[str, int]]:
    """Files and lines of the first thread of a text, from the inside."""
    lines = thread.partition("\n\n")[0]
    return [(file, int(line)) for file, line in _FRAME.findall(lines)]


def _place(frames: list[tuple[str, int]]) -> str:
    """The innermost line, and that of the user's code which called it, if that is another."""
    users = [frame for frame in frames if not frame[0].startswith(NOT_THE_USERS)]
    found = dict.fromkeys([*frames[:1], *users[:1]])
    return ", called in ".join(f"{Path(file).name}, line {line}" for file, line in found)


def _stop() -> None:
    faulthandler.disable()
    if _on.pop():
        faulthandler.enable()


def _forget(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
        path.parent.rmdir()  # the last one


def _in_child() -> None:
    if _on:
        faulthandler.disable()  # a child that crashes is not its rank


os.register_at_fork(after_in_child=_in_child)
