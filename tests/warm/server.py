"""Imports what ranks need, and forks a Python for each stand-in that asks: see __init__.py."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import pkgutil
import runpy
import selectors
import signal
import socket
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STACKS = Path(__file__).parents[1] / "stacks" / "sitecustomize.py"


@dataclass
class Fork:
    """A stand-in that asks for a fork, or has one."""

    link: socket.socket
    content: bytes = b""
    length: int | None = None
    handles: list[int] = field(default_factory=list)
    pid: int | None = None


def serve(place: str) -> dict[str, Any]:
    """Fork for whoever asks, until our input ends; returns in each fork, with what is wanted of it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    ended, wakes = socket.socketpair()
    ended.setblocking(False)
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    for source in (listener, ended, sys.stdin):
        selector.register(source, selectors.EVENT_READ)
    forks: dict[int, Fork] = {}
    print("ready", flush=True)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                for pid in forks:
                    os.kill(pid, signal.SIGKILL)
                os._exit(0)
            elif key.fileobj is listener:
                fork = Fork(listener.accept()[0])
                selector.register(fork.link, selectors.EVENT_READ, fork)
            elif key.fileobj is ended:
                with contextlib.suppress(BlockingIOError):
                    ended.recv(4096)
                tell_ends(forks, selector)
            else:
                fork = key.data
                if not hear(fork):
                    if fork.pid in forks:
                        os.kill(fork.pid, signal.SIGKILL)  # as its stand-in was
                    selector.unregister(fork.link)
                    fork.link.close()
                elif fork.length is not None and len(fork.content) == fork.length and fork.pid is None:
                    fork.pid = os.fork()
                    if not fork.pid:
                        return become(fork, [listener, ended, wakes, *(its.link for its in forks.values())])
                    forks[fork.pid] = fork
                    for handle in fork.handles:
                        os.close(handle)
                    tell(fork, fork.pid)


def hear(fork: Fork) -> bool:
    """Take what a stand-in sends: its output's handles and the length of the rest, then the rest. Returns
    False when it is gone."""
    try:
        if fork.length is None:
            head, fork.handles, _, _ = socket.recv_fds(fork.link, 8, 3)
            fork.length = int.from_bytes(head, "little")
            return bool(head)
        part = fork.link.recv(2**20)
    except ConnectionResetError:  # killed before it had read our answer
        return False
    fork.content += part
    return bool(part)


def tell(fork: Fork, number: int) -> None:
    """Tell a stand-in a number, unless it is gone."""
    with contextlib.suppress(OSError):
        fork.link.sendall(f"{number}\n".encode())


def tell_ends(forks: dict[int, Fork], selector: selectors.BaseSelector) -> None:
    """Tell the stand-ins of forks that have ended how they did."""
    while forks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        tell(forks.pop(pid), os.waitstatus_to_exitcode(status))


def become(fork: Fork, others: list[socket.socket]) -> dict[str, Any]:
    """In the fork: leave the server's things behind, and take the place of the stand-in."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    for other in (*others, fork.link):
        other.close()
    for number, handle in enumerate(fork.handles):
        os.dup2(handle, number)
        os.close(handle)
    wanted: dict[str, Any] = json.loads(fork.content)
    os.environ.clear()
    os.environ.update(wanted["environment"])
    os.sched_setaffinity(0, wanted["cores"])
    os.chdir(wanted["folder"])
    return wanted


def run(words: list[str], environment: dict[str, str]) -> None:
    """Do what Python does with these words."""
    import numpy as np
    import torch

    from rankwise.launch import forking
    from rankwise.system import head_start

    # Forks share the generators of their server, those that users' scripts may draw from too.
    torch.seed()
    np.random.seed()  # noqa: NPY002
    if "OMP_NUM_THREADS" in environment:  # which torch has read already
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    runpy.run_path(str(STACKS))  # which Python does at its start
    forking.possible = lambda plan: False  # ranks are forks already, of this server
    head_start.begin = lambda words: None
    path = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:] = [*path, *(part for part in sys.path if part not in path)]
    safe_path = words[0] == "-P"
    words = words[safe_path:]
    if words[0] == "-m":
        if not safe_path:
            sys.path.insert(0, os.getcwd())
        sys.argv = words[1:]
        sys.modules.pop(words[1], None)  # it is run, not found imported
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.path.insert(0, "")
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def warm_up() -> None:
    """Import all of rankwise and what it needs; MPI is left to whoever wants it."""
    import rankwise

    for module in pkgutil.walk_packages(rankwise.__path__, "rankwise."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    import sklearn.datasets  # noqa: F401
    import torch._dynamo  # two seconds more, which the first step of each user's own optimizer takes
    import torch.distributed
    import torch.optim  # noqa: F401

    gc.collect()
    gc.freeze()


def main() -> None:
    place, stand_in = sys.argv[1:]
    del sys.path[0]
    warm_up()
    wanted = serve(place)
    sys.executable = stand_in
    code: Any = 0
    try:
        run(wanted["words"], wanted["environment"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    mpi = sys.modules.get("mpi4py.MPI")
    ends_itself = mpi is None or sys.modules["mpi4py"].rc.finalize is False
    if not ends_itself and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()  # as mpi4py does by itself when Python is torn down
    # To tear torch down takes half a second, and nothing is left that could tell.
    os._exit(code or 0)


if __name__ == "__main__":
    main()
