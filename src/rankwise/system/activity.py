"""What a process is doing, as Linux tells: whether it runs, was stopped, or sleeps, and in what."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

Doing = Literal["running", "stopped", "locked", "waiting"]

LOCKS = ("futex",)

EVENTS = ("epoll", "ep_poll")

TASKLESS = (*LOCKS, "pipe", "do_wait", "pause")

IDLE = (*TASKLESS, *EVENTS)
"""Parts of the names of the kernel's functions in which threads sleep that have nothing to do: they wait for
another thread or process, by a lock, an event, a pipe."""


@dataclass(frozen=True)
class Activity:
    """What a process was doing at a moment, and the CPU time in ns that it had used by then.

    `stopped`: by a signal or a debugger. `locked`: its main thread sleeps in a lock, and no other thread, its
    own or of its children, sleeps for a time or waits for a disk or a network. Whether one of them computes
    the CPU time tells, which then holds that of the children. `waiting`: its main thread sleeps in anything
    else, or one of these others does.
    """

    doing: Doing
    cpu_ns: int


RUNNING = Activity("running", 0)


def threads_of(pid: int) -> frozenset[int]:
    """The numbers of a process's threads."""
    return frozenset(int(thread.path.name) for thread in _threads(pid))


def look(pid: int, *, apart_from: int = 0, at_home: frozenset[int] | None = None) -> Activity | None:
    """What a process is doing, apart from its thread of the number `apart_from`; None if it has ended.

    A thread that sleeps until an event comes (epoll) may serve a library, or wait for an answer from the
    network: where the numbers of those that serve are known, as `at_home`, the others wait.

    Where Linux does not tell in what threads sleep (/proc/PID/wchan), none is `locked`.
    """
    try:
        main = _thread(Path(f"/proc/{pid}/task/{pid}"))
        cpu_ns = _thread(Path(f"/proc/{pid}")).cpu_ns
    except OSError:
        return None
    if apart_from:
        with suppress(OSError):
            cpu_ns -= _thread(Path(f"/proc/{pid}/task/{apart_from}")).cpu_ns
    if main.state in "ZX":
        return None
    if main.state in "Tt":
        return Activity("stopped", cpu_ns)
    if main.state == "R":
        return Activity("running", cpu_ns)
    if not main.sleeps_in(LOCKS):
        return Activity("waiting", cpu_ns)
    try:
        children = psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return None
    theirs = [thread for child in children for thread in _threads(child.pid)]
    idle = all(_is_idle(thread, at_home) for thread in _threads(pid))
    idle = idle and all(_is_idle(thread, None) for thread in theirs)
    for child in children:
        with suppress(OSError):
            cpu_ns += _thread(Path(f"/proc/{child.pid}")).cpu_ns
    return Activity("locked" if idle else "waiting", cpu_ns)


def _is_idle(thread: _Thread, at_home: frozenset[int] | None) -> bool:
    serves = at_home is None or int(thread.path.name) in at_home
    return thread.state not in "DS" or thread.sleeps_in(IDLE if serves else TASKLESS)


class _Thread(NamedTuple):
    """A thread or a whole process: its folder in /proc, its state in a letter, and its CPU time."""

    path: Path
    state: str
    cpu_ns: int

    def sleeps_in(self, functions: tuple[str, ...]) -> bool:
        """Whether it sleeps in one of the kernel's functions that have these in their names."""
        if self.state != "S":
            return False
        try:
            name = (self.path / "wchan").read_text()
        except OSError:
            return False
        return any(part in name for part in functions)


def _thread(path: Path) -> _Thread:
    """Raises OSError if there is none."""
    fields = (path / "stat").read_text().rpartition(")")[2].split()
    # utime, stime, and of children that have ended cutime and cstime, in the kernel's ticks
    ticks = sum(map(int, fields[11:15]))
    return _Thread(path, fields[0], ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def _threads(pid: int) -> Iterator[_Thread]:
    """The threads of a process, none if it has ended."""
    with suppress(OSError):
        for path in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                yield _thread(path)
