"""What processes are doing, looked at from outside while they really do it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import repeat

import pytest

from rankwise.system.activity import Activity, Doing, look, threads_of

from .processes import wait_for

STEADY, LOOK_S = 5, 0.02
"""So many looks must find the same, so long after each other: processes are at something else before."""

IMPORTS = "import ctypes, os, signal, socket, subprocess, sys, threading, time"
PAIR = "s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname())"


def lock() -> str:
    return "l = threading.Lock(); l.acquire(); l.acquire()"


def compute() -> str:
    return "exec('while True: pass')"


def disk() -> str:
    """Asleep as in waiting for a disk: until a child that shares its memory has ended, which does nothing."""
    return "ctypes.CDLL(None).vfork() or signal.pause()"


def thread(code: str) -> str:
    """Waits for a thread."""
    return f"t = threading.Thread(target=exec, args=({code!r}, globals())); t.start(); t.join()"


def child(code: str, wait: str) -> str:
    """Has a child, and waits in a way of its own."""
    return f"p = subprocess.Popen([sys.executable, '-S', '-c', {f'{IMPORTS}; {code}'!r}]); {wait}"


DOING: list[tuple[Doing, str, str]] = [
    ("running", "computing", compute()),
    ("stopped", "stopped", "os.kill(os.getpid(), signal.SIGSTOP)"),
    ("stopped", "stopped in a lock", thread("os.kill(os.getpid(), signal.SIGSTOP)")),
    ("locked", "lock", lock()),
    ("locked", "event", "threading.Event().wait(600)"),
    ("locked", "lock of a thread in a lock", thread(lock())),
    ("locked", "lock of a thread without a task", thread("os.read(os.pipe()[0], 1)")),
    ("locked", "lock with a child in a lock", child(lock(), lock())),
    ("locked", "lock with a child without a task", child("os.read(os.pipe()[0], 1)", lock())),
    ("waiting", "sleep", "time.sleep(600)"),
    ("waiting", "disk", disk()),
    ("waiting", "pipe", "os.read(os.pipe()[0], 1)"),
    ("waiting", "network", f"{PAIR}; c.recv(1)"),
    ("waiting", "network with a timeout", f"{PAIR}; c.settimeout(600); c.recv(1)"),
    ("waiting", "child", child("time.sleep(600)", "p.wait()")),
    ("waiting", "thread that sleeps", thread("time.sleep(600)")),
    ("waiting", "thread at a disk", thread(disk())),
    ("waiting", "thread at the network", thread(f"{PAIR}; c.recv(1)")),
    ("waiting", "lock with a child that sleeps", child("time.sleep(600)", lock())),
    ("waiting", "lock with a child at a disk", child(disk(), lock())),
]


@contextlib.contextmanager
def process(code: str) -> Iterator[int]:
    """The number of a process that runs this Python, which is there when it begins; it and its children are
    ended afterwards."""
    program = f"{IMPORTS}; print('ready', flush=True); {code}"
    words = [sys.executable, "-S", "-c", program]
    with subprocess.Popen(words, stdout=subprocess.PIPE, start_new_session=True) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == b"ready\n"
            yield started.pid
        finally:
            os.killpg(started.pid, signal.SIGKILL)


def seen(pid: int, until: Callable[[list[Activity]], bool]) -> list[Activity]:
    """STEADY looks at a process in a row, as soon as they are such."""
    found: list[Activity] = []

    def enough() -> bool:
        found.clear()
        for _ in repeat(None, STEADY):
            now = look(pid)
            assert now is not None
            found.append(now)
            time.sleep(LOOK_S)
        return until(found)

    wait_for(enough, 30)
    return found


@pytest.mark.parametrize(("doing", "code"), [pytest.param(*case[::2], id=case[1]) for case in DOING])
def test_what_a_process_does(doing: Doing, code: str) -> None:
    """Each way of working and of resting is told from the others, from outside and without help of the
    process; what does not work takes no CPU time."""

    def settled(looks: list[Activity]) -> bool:
        """A child that begins may be seen reading its program, between two turns on a busy core."""
        rests = looks[-1].cpu_ns - looks[0].cpu_ns <= 10_000_000
        return all(now.doing == doing for now in looks) and rests == (doing != "running")

    with process(code) as pid:
        assert settled(seen(pid, settled))


@pytest.mark.parametrize(
    "code", [compute(), thread(compute()), child(compute(), lock())], ids=["itself", "thread", "child"]
)
def test_cpu_time_moves(code: str) -> None:
    """Where a process computes, in its first thread, another or a child for which it waits in a lock, its CPU
    time tells."""
    with process(code) as pid:
        before = look(pid)
        assert before is not None

        def has_computed() -> bool:
            now = look(pid)
            return now is not None and now.doing in ("running", "locked") and now.cpu_ns > before.cpu_ns + 2e8

        wait_for(has_computed, 30)
        assert has_computed()


def test_a_thread_that_waits_for_the_network_by_events_is_no_lock() -> None:
    """A thread that has begun since and waits for an answer by epoll, as event loops do, is waiting; one that
    was there before serves a library, and a process in a lock beside it is locked."""
    waits = thread("import select; e = select.epoll(); e.poll(600)")
    with process(waits) as pid:
        wait_for(lambda: len(threads_of(pid)) == 2, 30)
        seen(pid, lambda looks: all(now.doing == "locked" for now in looks))
        now = look(pid, at_home=frozenset({pid}))
        assert now is not None
        assert now.doing == "waiting"
        now = look(pid, at_home=threads_of(pid))
        assert now is not None
        assert now.doing == "locked"


def test_the_thread_that_looks_is_left_out() -> None:
    """What a watching thread takes of the CPU is not the process's."""
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            sum(range(1000))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        me, its = os.getpid(), watcher.native_id or 0
        with_it, without = look(me), look(me, apart_from=its)
        wait_for(lambda: look(me).cpu_ns > with_it.cpu_ns + 3e8, 30)  # type: ignore[union-attr]
        after = look(me, apart_from=its)
    finally:
        over.set()
        watcher.join()
    assert without is not None
    assert after is not None
    assert after.cpu_ns - without.cpu_ns < 2e8


def test_what_has_ended_does_nothing() -> None:
    """Of a process that has ended, collected or not, there is nothing to see."""
    with process("pass") as pid:
        wait_for(lambda: look(pid) is None, 30)
        assert look(pid) is None
    assert look(pid) is None
