"""What mpiexec starts for a rank that comes by fork: ``python -IS stand_in.py TOKEN FOLDER [START]``.

It asks the server of its host (fork_server.py) for a fork, and hands over what a process has from who
started it: environment, folder, cores, output. Then it is the rank as far as mpiexec can see: it passes
signals on, ends as the rank ends, and the rank ends with it. Where there is no server it starts one; where
that does not work either, it becomes the rank itself, which then imports torch by itself.

It is run as a file and imports next to nothing, as each rank has one.
"""

from __future__ import annotations

import binascii
import contextlib
import marshal
import os
import re
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping
from typing import NoReturn

RANK = "rankwise.launch.rank"
SERVER = "rankwise.launch.fork_server"

PATIENCE_S = 300.0
"""How long a server may take to import torch and to answer."""

LAST_WORD_S = 2.0
"""How long a server may take to say how a rank ended that has ended."""

OF_MPI = re.compile(
    rb"(OMPI|OPAL|PMIX|PMI|PRTE|PRRTE|HYDI|HYDRA|MPIR|MPIEXEC|MPI_LOCAL|I_MPI|GFORTRAN)[A-Za-z0-9_]*="
)
OF_SHELLS = (b"_=", b"PWD=", b"OLDPWD=", b"SHLVL=", b"HOSTNAME=")

BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "KMP_HW_SUBSET")

NOT_PASSED_ON = {
    *(signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD, signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU),
    *(signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS),
}
PASSED_ON = signal.valid_signals() - NOT_PASSED_ON

SAME = ("Uid", "Gid", "Groups", "CapEff", "NoNewPrivs", "Seccomp", "Mems_allowed_list")
"""Lines of /proc/self/status that a fork has from the server, and no rank may have otherwise."""


GONE = "the process from which they were to come has ended"


class NoForkError(Exception):
    """Why this rank cannot come by fork."""


def address(token: str, environment: Mapping[bytes, bytes]) -> str:
    """The server's address in the abstract namespace of Unix sockets, which leaves nothing on a disk.

    A part of it is a sum of all that a fork has from its server and cannot change: so one is found only by
    who would start the same.
    """
    lines = [b"=".join(item) for item in environment.items() if item[0] != b"LD_LIBRARY_PATH"]
    lines = sorted(line for line in lines if not OF_MPI.match(line) and not line.startswith(OF_SHELLS))
    # mpiexec puts its own folder in front, now and then several times.
    lines.append(b":".join(dict.fromkeys(filter(None, environment.get(b"LD_LIBRARY_PATH", b"").split(b":")))))
    with open("/proc/self/status") as file:
        lines += [line.encode() for line in file if line.startswith(SAME)]
    with open("/proc/self/cgroup") as file:
        lines.append(file.read().encode())
    spaces = ("mnt", "pid", "net", "uts", "user", "ipc", "time")
    lines += [os.readlink(f"/proc/self/ns/{name}").encode() for name in spaces]
    lines += [os.readlink("/proc/self/root").encode(), sys.executable.encode(), sys.version.encode()]
    total = binascii.crc32(b"\n".join(lines))
    return f"\0rankwise-{token}-{total:08x}"


def binds_threads(environment: Mapping[str, str]) -> bool:
    """Whether OpenMP binds threads when it is loaded: it would be to the cores of the server."""
    return any(name in environment for name in BINDING)


def require_own(link: socket.socket) -> None:
    """Raises NoForkError if the other end is another user's: anybody may listen at any address."""
    peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if int.from_bytes(peer[4:8], sys.byteorder) != os.getuid():
        raise NoForkError("another user listens where its server should")


def require_handles() -> None:
    """Raises NoForkError, or OSError, where processes have no handles: they came with Linux 5.3, and a Python
    that was built on an older one does not know them."""
    if not (hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")):
        raise NoForkError("this Python was built for a Linux without pidfd_open")
    os.close(os.pidfd_open(os.getpid()))


def reach(place: str) -> socket.socket:
    """A connection to the server of this host, which is started if there is none, once it has all that ranks
    need. Raises NoForkError, or OSError."""
    link = socket.socket(socket.AF_UNIX)
    give_up = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up:
        try:
            link.connect(place)
            break
        except ConnectionRefusedError:
            listener = socket.socket(socket.AF_UNIX)
            try:
                listener.bind(place)
            except OSError:  # another rank has just done so, and does not listen yet
                listener.close()
                time.sleep(0.005)
                continue
            listener.listen(socket.SOMAXCONN)
            link.connect(place)
            start_server(listener)
            break
    require_own(link)
    # Until it is there a signal ends this process at once, and nothing of it lies in wait for the server.
    link.settimeout(PATIENCE_S)
    if not link.recv(1):
        raise NoForkError(GONE)
    return link


def start_server(listener: socket.socket) -> None:
    """Start a server beside this rank, which outlives it as long as others need it, and holds no output."""
    with listener:
        if os.fork():
            return
        try:
            os.setsid()
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            nowhere = os.open(os.devnull, os.O_RDWR)
            for number in range(3):
                os.dup2(nowhere, number)
            os.dup2(listener.fileno(), 3)
            os.set_inheritable(3, True)
            os.closerange(4, 1024)  # of what mpiexec gave to this rank
            kept = [line for line in os.environb.items() if not OF_MPI.match(b"=".join(line))]
            words = [sys.executable, "-P", "-m", SERVER, "3"]
            os.execve(sys.executable, words, dict(kept))
        finally:
            os._exit(1)


def ask(link: socket.socket, words: list[str]) -> tuple[int, int, bytes]:
    """Ask for a fork that is a rank with these words. Returns a handle of its process, the end of a pipe that
    must stay open as long as it shall live, and what was told besides. Raises NoForkError, or OSError."""
    ignored = [number for number in PASSED_ON if signal.getsignal(number) == signal.SIG_IGN]
    pmi = int(os.environ.get("PMI_FD", -1))
    mask = os.umask(0)
    os.umask(mask)
    wanted = {
        "words": words,
        "environment": dict(os.environb),
        "folder": os.getcwdb(),
        "cores": sorted(os.sched_getaffinity(0)),
        "ignored": [int(number) for number in ignored],
        "mask": mask,
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "stand_in": os.getpid(),
        "pmi": pmi,
    }
    content = os.memfd_create("rankwise")
    os.write(content, marshal.dumps(wanted))
    ends, lives = os.pipe()
    handles = [content, ends, 0, 1, 2]
    if pmi >= 0:
        handles.append(pmi)
    socket.send_fds(link, [b"fork"], handles)
    os.close(content)
    os.close(ends)
    process = -1
    answers = b""
    while not (b"forked\n" in answers and b"ready\n" in answers):
        part, given, _, _ = socket.recv_fds(link, 4096, 1, socket.MSG_CMSG_CLOEXEC)
        process = given[0] if given else process
        if not part:
            raise NoForkError(GONE)
        answers += part
        if refused := re.search(rb"^no (.*)\n", answers, re.MULTILINE):
            raise NoForkError(refused[1].decode(errors="replace"))
    if process < 0:
        raise NoForkError("no handle of the fork has come")
    link.settimeout(None)
    return process, lives, answers.replace(b"forked\n", b"").replace(b"ready\n", b"")


def stand_by(link: socket.socket, process: int, said: bytes) -> NoReturn:
    """Pass signals on, and end as the rank ends, of which something may have been `said` already."""
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: pass_on(process, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
    parent, above = os.getppid(), -1
    try:
        above = os.pidfd_open(parent)
    except ProcessLookupError:
        end(-signal.SIGKILL)
    watch = select.poll()
    for handle in (link.fileno(), process, above):
        watch.register(handle, select.POLLIN)
    if os.getppid() != parent:
        end(-signal.SIGKILL)
    code, over_at, is_gone = None, 0.0, False
    while True:
        *lines, said = said.split(b"\n")
        for line in lines:
            if line.startswith(b"status "):  # from the server, when the rank has gone
                end(int(line[7:]))
            if line.startswith(b"code "):  # from the rank itself, which is about to go
                code = int(line[5:])
        if over_at and (is_gone or time.monotonic() > over_at + LAST_WORD_S):  # the server was killed
            end(-signal.SIGKILL if code is None else code)
        events = {handle for handle, _ in watch.poll(100 if over_at else None)}
        if above in events:  # or the rank might stay behind when a host's daemon is lost
            end(-signal.SIGKILL)
        if link.fileno() in events:
            part = link.recv(4096)
            said += part
            if not part:
                is_gone = True
                watch.unregister(link)
        if process in events:
            over_at = time.monotonic()
            watch.unregister(process)


def pass_on(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        signal.pidfd_send_signal(process, number)


def end(code: int) -> NoReturn:
    """End with this code, or by a signal if it is negative."""
    if code >= 0:
        os._exit(code)
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank's own is enough
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (-code,))
    os.kill(os.getpid(), -code)
    os._exit(1)


def is_first() -> bool:
    """Whether this is the first rank of its host, which speaks for all."""
    names = ("OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def main() -> None:
    token, *rest = sys.argv[1:]
    words = [sys.executable, "-P", "-m", RANK, *rest]
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which says nothing
    try:
        if binds_threads(os.environ):
            raise NoForkError("OpenMP is told to bind threads")
        require_handles()
        link = reach(address(token, os.environb))
        # What comes before it can be passed on waits until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
        process, _lives, said = ask(link, words)
        if "PMI_FD" in os.environ:  # or MPICH's mpiexec would see a death late
            os.close(int(os.environ["PMI_FD"]))
    except (NoForkError, OSError, AttributeError, ValueError) as error:
        if is_first():
            why = getattr(error, "strerror", None) or str(error)
            told = f"rankwise: ranks import torch one by one, as none can be forked here: {why}\n"
            os.write(2, told.encode())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        os.execv(sys.executable, words)
    stand_by(link, process, said)


if __name__ == "__main__":
    main()
