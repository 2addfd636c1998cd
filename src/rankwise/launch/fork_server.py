"""The process of a host that imports torch once, and from which its ranks come by fork:
``python -P -m rankwise.launch.fork_server HANDLE``.

Each rank of mpiexec's is a stand-in (stand_in.py), which asks here for its fork. From then on neither needs
the server: Linux ends a rank with its stand-in, by a pipe, and the server only tells how a rank has ended.
HANDLE is a socket at which stand-ins call; or the launcher's, over which come such sockets, one for each
start of ranks, whose server is then a fork as well (forking.py). It computes nothing and begins no thread, as
a fork would have none of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import io
import marshal
import os
import re
import resource
import selectors
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from typing import Any, NoReturn

from rankwise.launch import stand_in
from rankwise.system import machine
from rankwise.system.forked import end_with, show_as
from rankwise.system.head_start import importing
from rankwise.system.process_end import at_end, end_process

IMPORTS = (
    *("rankwise.launch.rank", "rankwise.comm.mpi_shared", "rankwise.models.trial", "mpi4py"),
    *("torch.optim", "torch.nn.functional", "torch.utils.data", "numpy.random", "numpy.ma"),
)
"""What ranks need, as far as it begins no thread and no MPI."""


@dataclass(eq=False)
class Caller:
    """A stand-in: the connection to it, and the process of its rank once there is one."""

    link: socket.socket
    pid: int | None = None


def main() -> None:
    handle = socket.socket(fileno=int(sys.argv[1]))
    machine.die_with_parent(signal.SIGKILL)
    with importing():
        for module in IMPORTS:
            importlib.import_module(module)
    if handle.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        machine.outlive_parent()  # others than the rank that started this one may need it
        Server(handle, None).serve()
    else:
        fork_servers(handle)
    os._exit(0)  # at once, without tearing down what was imported


def fork_servers(launcher: socket.socket) -> None:
    """Fork a server for each start of ranks, which tells its process's number, until the launcher is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # so that no ended one stays
    while True:
        content, handles, _, _ = socket.recv_fds(launcher, 1, 2, socket.MSG_CMSG_CLOEXEC)
        if not content:
            return
        listener, owner = map(_socket, handles)
        with listener, owner:
            if os.fork() == 0:
                os.setsid()
                launcher.close()
                owner.sendall(f"{os.getpid()}\n".encode())
                Server(listener, owner).serve()
                os._exit(0)


def _socket(handle: int) -> socket.socket:
    return socket.socket(fileno=handle)


class Server:
    """Forks for the stand-ins that call at `listener`, as long as its `owner` is there, or without one until
    no rank of its is left."""

    def __init__(self, listener: socket.socket, owner: socket.socket | None) -> None:
        self._listener = listener
        self._owner = owner
        self._callers: set[Caller] = set()
        self._selector = selectors.DefaultSelector()
        self._ended, self._wakes = socket.socketpair()
        self._began = False

    def serve(self) -> None:
        """Returns when all is over."""
        for end in (self._ended, self._wakes):
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakes.fileno(), warn_on_full_buffer=False)
        for source in (self._listener, self._ended, *((self._owner,) if self._owner else ())):
            self._selector.register(source, selectors.EVENT_READ)
        while self._owner is not None or self._callers or not self._began:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._ended:
                    with contextlib.suppress(BlockingIOError):
                        self._ended.recv(4096)
                elif key.fileobj is self._owner:
                    self._selector.unregister(self._owner)
                    self._owner, self._began = None, True
                else:
                    self._hear(key.data)
            self._tell_ends()

    def _accept(self) -> None:
        link, _ = self._listener.accept()
        self._began = True
        peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        if int.from_bytes(peer[4:8], sys.byteorder) != os.getuid():
            link.close()
            return
        with contextlib.suppress(OSError):  # it has gone, of which we hear in a moment
            link.sendall(b".")
        caller = Caller(link)
        self._callers.add(caller)
        self._selector.register(link, selectors.EVENT_READ, caller)

    def _hear(self, caller: Caller) -> None:
        """A stand-in asks, or has gone: then Linux has ended its rank, or is about to."""
        try:
            content, handles, _, _ = socket.recv_fds(caller.link, 16, 8, socket.MSG_CMSG_CLOEXEC)
        except OSError:
            content, handles = b"", []
        if content and caller.pid is None:
            self._fork(caller, handles)
            return
        for handle in handles:
            os.close(handle)
        self._selector.unregister(caller.link)
        if caller.pid is None:
            self._forget(caller)

    def _forget(self, caller: Caller) -> None:
        caller.link.close()
        self._callers.discard(caller)

    def _fork(self, caller: Caller, handles: list[int]) -> None:
        caller.pid = os.fork()
        if caller.pid == 0:
            self._leave_behind(caller)
            be_rank(caller.link, *handles)
        for handle in handles:  # at once: mpiexec waits until nobody holds a rank's output
            os.close(handle)
        process = os.pidfd_open(caller.pid)
        with contextlib.suppress(OSError):  # it has gone: so has its rank
            socket.send_fds(caller.link, [b"forked\n"], [process])
        os.close(process)

    def _leave_behind(self, caller: Caller) -> None:
        """In a fork: close all that is the server's, and what belongs to other ranks."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        others = (other.link for other in self._callers if other is not caller)
        for its in (self._listener, self._ended, self._wakes, *others):
            its.close()
        if self._owner is not None:
            self._owner.close()

    def _tell_ends(self) -> None:
        """Tell the stand-ins of ranks that have ended how they did."""
        while any(caller.pid for caller in self._callers):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            for caller in [caller for caller in self._callers if caller.pid == pid]:
                with contextlib.suppress(OSError):
                    caller.link.sendall(f"status {os.waitstatus_to_exitcode(status)}\n".encode())
                with contextlib.suppress(KeyError, ValueError):
                    self._selector.unregister(caller.link)
                self._forget(caller)


def be_rank(link: socket.socket, content: int, pipe: int, *streams: int) -> NoReturn:
    """In a fork: become the process for which a stand-in stands, and be a rank."""
    try:
        wanted = read_wanted(content)
        taken: int = wanted["pmi"]  # a number that has to be free
        link, pipe = socket.socket(fileno=clear_of(link.detach(), taken)), clear_of(pipe, taken)
        take_on(wanted, pipe, streams)
        link.sendall(b"ready\n")
    except BaseException as error:
        with contextlib.suppress(OSError):
            why = " ".join((getattr(error, "strerror", None) or str(error)).split())
            link.sendall(f"no {why}\n".encode())
        os._exit(1)
    rank = importlib.import_module(stand_in.RANK)

    def tell(code: int) -> None:
        with contextlib.suppress(OSError):
            link.sendall(f"code {code}\n".encode())

    at_end.append(tell)
    sys.modules["__main__"] = rank  # for what starts Pythons that import it again
    sys.orig_argv[:] = wanted["words"]
    sys.argv[:] = [str(rank.__file__), *wanted["words"][4:]]
    code: object = 0
    try:
        rank.main()
    except SystemExit as ending:
        code = ending.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    end_process(code if isinstance(code, int) else int(code is not None), ends_libraries=True)


def read_wanted(content: int) -> dict[str, Any]:
    """What a stand-in asks for."""
    with open(content, "rb") as file:
        file.seek(0)
        wanted: dict[str, Any] = marshal.loads(file.read())
    return wanted


def clear_of(handle: int, number: int) -> int:
    """The same as the handle, but not of this number."""
    return fcntl.fcntl(handle, fcntl.F_DUPFD_CLOEXEC, number + 1) if handle == number else handle


def take_on(wanted: dict[str, Any], pipe: int, streams: tuple[int, ...]) -> None:
    """Take from the stand-in what a process has from who started it."""
    end_with(pipe)
    os.setpgid(0, 0)
    for number in wanted["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
        os.close(stream)
    if streams[3:]:
        os.dup2(streams[3], wanted["pmi"])
        if streams[3] != wanted["pmi"]:
            os.close(streams[3])
    os.environb.clear()
    os.environb.update(wanted["environment"])
    os.umask(wanted["mask"])
    os.sched_setaffinity(0, wanted["cores"])
    take_limits_of(wanted["stand_in"])
    if (more := wanted["niceness"] - os.getpriority(os.PRIO_PROCESS, 0)) > 0:
        os.nice(more)
    show_as(wanted["words"], wanted["environment"])
    machine.was_started_as(wanted["stand_in"])
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
    reseed()
    os.chdir(wanted["folder"])
    if threading.active_count() != 1:
        raise OSError(0, "its server has begun threads")


def take_limits_of(pid: int) -> None:
    """Have the limits that a process has: of open files, say, or of the size of core files."""
    for name in filter(re.compile("RLIMIT_[A-Z]+$").match, dir(resource)):
        which = getattr(resource, name)
        limits = resource.prlimit(pid, which)
        if limits != resource.getrlimit(which):
            resource.setrlimit(which, limits)


def reseed() -> None:
    """Have generators of this process's own, as if it had imported them itself: a fork's are its server's."""
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if random := sys.modules.get("numpy.random"):
        random.seed()


if __name__ == "__main__":
    main()
