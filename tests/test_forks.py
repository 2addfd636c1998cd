"""Ranks that come by fork: what they have, how they end, and with whom.

A stand-in is started here as mpiexec starts it; its server has no torch, and the rank is a piece of code.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from rankwise.comm.mpi_environment import find_mpiexec
from rankwise.launch import forking, stand_in
from rankwise.runs.folder import RunFolder
from rankwise.system import head_start

from . import effort, tiny
from .processes import wait_for

if TYPE_CHECKING:
    from .conftest import Command

ROOT = Path(__file__).parents[1]


class Starter:
    """Starts stand-ins, of which those of one environment find the same server."""

    def __init__(self, folder: Path) -> None:
        text = Path(stand_in.__file__).read_text().replace(stand_in.RANK, "tests.forked_rank")
        self._stand_in = folder / "stand_in.py"
        self._stand_in.write_text(text.replace(stand_in.SERVER, "tests.light_fork_server"))
        self.mark = f"{folder.name}-{os.getpid()}"
        self._begun: list[subprocess.Popen[str]] = []

    def __call__(
        self, code: str, *, plainly: bool = False, by: Sequence[str] = (), **options: Any
    ) -> subprocess.Popen[str]:
        """Start a stand-in for a rank that runs a piece of code; `plainly` the rank itself."""
        words = ["-P", "-m", "tests.forked_rank"] if plainly else ["-IS", str(self._stand_in), self.mark]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}", "MARK": self.mark}
        environment |= options.pop("env", {})
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        process = subprocess.Popen([*by, sys.executable, *words, code], env=environment, **options)
        self._begun.append(process)
        return process

    def end(self) -> None:
        """End all; nothing is left of them."""
        for process in self._begun:
            with process:
                process.kill()
        with contextlib.suppress(AssertionError):
            wait_for(lambda: not marked(self.mark), 20)
        left = marked(self.mark)
        for one in left:
            one.kill()
        assert not left


@pytest.fixture
def start_apart(tmp_path: Path) -> Iterator[Starter]:
    """Starts stand-ins whose server is this test's."""
    starter = Starter(tmp_path)
    yield starter
    starter.end()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts stand-ins; one that waits keeps their server."""
    starter = Starter(tmp_path_factory.mktemp("stand-ins"))
    begun(starter(WAITS.replace("60", "600")))
    yield starter
    starter.end()


def marked(mark: str) -> list[psutil.Process]:
    """The processes that have this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def lives(pid: int) -> bool:
    """Whether a process is there, and not only its number, which nobody has taken note of yet."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def said_by(process: subprocess.Popen[str]) -> str:
    """What it prints to its end, which is a good one."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out


WAITS = "import os, time; print(os.getpid(), os.getppid(), flush=True); time.sleep(60)"


def begun(process: subprocess.Popen[str]) -> tuple[int, int]:
    """The processes of a rank that waits, and of its parent."""
    assert process.stdout is not None
    rank, parent = process.stdout.readline().split()
    return int(rank), int(parent)


TELLS = """
import json, os, resource, signal, sys
import __main__
os.write(1, b"")
told = {
    "words": sys.orig_argv, "argv": sys.argv, "shown": open("/proc/self/cmdline").read(),
    "environment": dict(os.environ), "flags": str(sys.flags), "main": __main__.__spec__.name,
    "shown environment": sorted(open("/proc/self/environ", errors="surrogateescape").read().split(chr(0))),
    "folder": os.getcwd(), "cores": sorted(os.sched_getaffinity(0)), "path": sys.path,
    "mask": os.umask(0), "niceness": os.nice(0), "input": sys.stdin.read(),
    "handlers": {str(n): str(signal.getsignal(n)) for n in signal.valid_signals()},
    "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
    "limits": sorted(
        (name, resource.getrlimit(getattr(resource, name))) for name in dir(resource) if name[:7] == "RLIMIT_"
    ),
    "leads its group": os.getpgid(0) == os.getpid(),
    "line by line": sys.stdout.line_buffering, "encoding": sys.stdout.encoding,
    "pipe": os.fstat(int(os.environ["PMI_FD"])).st_ino,
    "handles": sorted(os.readlink(f"/proc/self/fd/{n}") for n in (0, 1, 2)),
}
print(json.dumps(told))
print("to stderr", file=sys.stderr)
"""


def test_a_fork_has_what_a_process_has_that_is_started(start: Starter, tmp_path: Path) -> None:
    """Command line and environment, also as the system shows them, folder, cores, mask, niceness, limits,
    signals that are ignored, input, output, and MPICH's handle: all is as in a Python that mpiexec starts."""
    (tmp_path / "input").write_text("some input")
    (tmp_path / "folder").mkdir()
    ours, theirs = os.pipe()
    core = min(os.sched_getaffinity(0))

    def before() -> None:
        os.setpgid(0, 0)
        os.umask(0o027)
        os.nice(3)
        os.sched_setaffinity(0, [core])
        resource.setrlimit(resource.RLIMIT_NOFILE, (700, 800))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 4096))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    told = []
    for plainly in (False, True):
        with (tmp_path / "input").open() as given, (tmp_path / "error").open("w") as error:
            done = start(
                TELLS,
                plainly=plainly,
                stdin=given,
                stderr=error,
                cwd=tmp_path / "folder",
                env={"PMI_FD": str(theirs), "OMPI_COMM_WORLD_RANK": "3", "WORDS": "a=b\nc \udc80"},
                pass_fds=[theirs],
                preexec_fn=before,
                stdout=(out := (tmp_path / "out").open("w")),
            )
            assert done.wait(60) == 0, (tmp_path / "error").read_text()
            out.close()
            told.append(json.loads((tmp_path / "out").read_text()))
            assert (tmp_path / "error").read_text() == "to stderr\n"
    os.close(ours)
    os.close(theirs)
    forked, started = told
    assert forked["mask"] == 0o027
    assert forked["environment"]["OMPI_COMM_WORLD_RANK"] == "3"
    assert {name for name in started if started[name] != forked[name]} == set()


def test_the_handle_of_mpich_keeps_its_number(start: Starter) -> None:
    """Whatever the server has at that number itself: MPICH's library finds its mpiexec by it."""
    ours, theirs = os.pipe()
    code = "import os; print(os.fstat(int(os.environ['PMI_FD'])).st_ino)"
    for number in range(3, 16, 1 if effort.FULL else 6):
        by = ["bash", "-c", f'exec "$@" {number}<&{theirs}', "bash"]
        process = start(code, by=by, env={"PMI_FD": str(number)}, pass_fds=[theirs])
        assert said_by(process) == f"{os.fstat(theirs).st_ino}\n"
    os.close(ours)
    os.close(theirs)


ENDS = [
    *(("pass", 0), ("import sys; sys.exit(3)", 3), ("import sys; sys.exit()", 0)),
    *(("import sys; sys.exit('words')", 1), ("raise ValueError('an error')", 1)),
    ("import os; os._exit(7)", 7),
    *(
        (f"import os; os.kill(os.getpid(), {int(number)})", -number)
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGUSR1)
    ),
]


@pytest.mark.parametrize(("code", "number"), effort.daily(ENDS, [ENDS[0], ENDS[1], ENDS[4], ENDS[6]]))
def test_a_stand_in_ends_as_its_rank(start: Starter, code: str, number: int) -> None:
    """By the same code, or by the same signal; and what the rank prints at its end is printed."""
    process = start(code)
    _, err = process.communicate(timeout=60)
    assert process.returncode == number
    assert ("an error" in err, "words" in err) == ("an error" in code, "words" in code)


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_rank_ends_with_its_stand_in(start: Starter, stopped: bool) -> None:
    """By kill -9 of it, also if the rank is stopped."""
    process = start(WAITS)
    rank, _ = begun(process)
    if stopped:
        os.kill(rank, signal.SIGSTOP)
    process.kill()
    process.wait(20)
    wait_for(lambda: not lives(rank), 20)


def test_ranks_do_without_their_server(start_apart: Starter) -> None:
    """A server that is killed takes no rank with it. A rank's code arrives, or that it was killed, and it
    still ends with its stand-in."""
    code = "import os, sys; print(os.getpid(), os.getppid(), flush=True); sys.exit(int(input()))"
    well, badly, killed, lonely = processes = [start_apart(code, stdin=subprocess.PIPE) for _ in range(4)]
    ranks, servers = zip(*map(begun, processes), strict=True)
    assert len({*servers}) == 1
    os.kill(servers[0], signal.SIGKILL)
    wait_for(lambda: not lives(servers[0]), 20)
    assert [process.poll() for process in processes] == [None] * 4
    for process, number in ((well, 0), (badly, 4)):
        process.communicate(f"{number}\n", timeout=20)
        assert process.returncode == number
    os.kill(ranks[2], signal.SIGKILL)
    assert killed.wait(20) == -signal.SIGKILL
    assert lives(ranks[3])
    lonely.kill()
    wait_for(lambda: not lives(ranks[3]), 20)


def test_signals_are_passed_on(start: Starter) -> None:
    """What a stand-in gets, the rank gets, and what it does then counts."""
    process = start(
        "import signal, sys, time\n"
        "for n in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):\n"
        "    signal.signal(n, lambda n, _: print(n, flush=True))\n"
        "signal.signal(signal.SIGUSR2, lambda *_: sys.exit(5))\n"
        "print('begun', flush=True)\n"
        "while True: time.sleep(1)"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(number)
        assert process.stdout.readline() == f"{int(number)}\n"
    process.send_signal(signal.SIGUSR2)
    assert process.wait(20) == 5


def test_a_stand_in_that_waits_for_its_server_ends_by_a_signal(start_apart: Starter) -> None:
    """At once, as a rank that imports torch does, and nobody holds its output then: who stops a run as it
    begins is not kept waiting."""
    try:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            process = start_apart(WAITS, env={"SERVER_TAKES_S": "600"})
            wait_for(lambda: sockets(process.pid), 20)  # noqa: B023
            process.send_signal(number)
            assert process.communicate(timeout=20) == ("", "")
            assert process.returncode == -number
    finally:
        for server in marked(start_apart.mark):
            server.kill()


def sockets(pid: int) -> list[str]:
    """Those that a process has open."""
    handles = os.listdir(f"/proc/{pid}/fd")
    return [handle for handle in handles if os.readlink(f"/proc/{pid}/fd/{handle}").startswith("socket:")]


def test_ranks_of_a_host_have_one_server(start_apart: Starter) -> None:
    """Ranks that are started at once, as mpiexec does, are forks of one process, which has gone when the last
    of them has. It holds nobody's output, and its forks draw other numbers than each other."""
    code = "import os, numpy as np; print(os.getppid(), np.random.randint(2**62)); input()"
    several = [start_apart(code, stdin=subprocess.PIPE, env={"PMIX_RANK": str(n)}) for n in range(4)]
    waits = start_apart(WAITS)
    _, server = begun(waits)
    told = [process.communicate("\n", timeout=60)[0].split() for process in several]
    assert {parent for parent, _ in told} == {str(server)}
    assert len({number for _, number in told}) == 4
    waits.kill()
    wait_for(lambda: not lives(server), 20)


def test_another_environment_has_another_server(start: Starter) -> None:
    """A library may have read a variable when it was loaded: only who has the same one is served."""
    processes = [start(WAITS, env=env) for env in ({}, {"OMP_NUM_THREADS": "1"}, {})]
    parents = [begun(process)[1] for process in processes]
    assert parents[0] == parents[2] != parents[1]


@pytest.mark.parametrize("variable", ["SERVER_FAILS", "OMP_PROC_BIND"])
def test_without_a_server_a_rank_starts_by_itself(start: Starter, variable: str) -> None:
    """One line says so, and the rank is what mpiexec started."""
    process = start("import os; print(os.getpid())", env={variable: "1"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, f"{process.pid}\n")
    assert re.fullmatch(r"rankwise: ranks import torch one by one, as none can be forked here: .+\n", err)
    other = start("pass", env={variable: "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1"})
    assert said_by(other) == ""


def test_a_rank_starts_by_itself_where_processes_have_no_handles(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Python that was built for an older Linux, and on an older Linux, before anything is asked for."""
    stand_in.require_handles()

    def refuse(pid: int) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    with pytest.raises(OSError, match="not implemented"):
        stand_in.require_handles()
    monkeypatch.delattr(os, "pidfd_open")
    with pytest.raises(stand_in.NoForkError, match="without pidfd_open"):
        stand_in.require_handles()


@pytest.mark.parametrize(
    ("words", "begins"),
    [
        ("train --ranks 3", True),
        ("train --lr 0.1 --ranks=2 --spares 1", True),
        ("train --ranks 1", False),
        ("train --ranks three", False),
        ("train --ranks", False),
        ("train --ranks 1 --ranks=2", False),
        ("train --ranks 3 --no-fork", False),
        ("train --ranks 3 --help", False),
        ("train --ranks 3 --hosts a:1,b:2", False),
        ("train --ranks 3 --hostfile=hosts", False),
        ("run --ranks 3 script.py", False),
        ("", False),
    ],
)
def test_the_import_begins_with_the_command_line(
    monkeypatch: pytest.MonkeyPatch, words: str, begins: bool
) -> None:
    """If that plainly asks for several ranks of this host, and this process is not a rank itself."""
    started: list[Any] = []
    monkeypatch.setattr(head_start, "start", started.append)
    monkeypatch.setattr(head_start, "_begun", [])
    head_start.begin(words.split())
    assert len(started) == begins
    monkeypatch.setenv("PMI_RANK", "0")
    head_start.begin(words.split())
    assert len(started) == begins


@pytest.mark.parametrize("changes", ["nothing", "a variable", "where the ranks are"])
def test_what_was_begun_is_taken_if_it_fits(monkeypatch: pytest.MonkeyPatch, changes: str) -> None:
    """The process that the command line began serves the ranks, or it has gone where they want another
    environment, or are on other hosts."""
    monkeypatch.setattr(head_start, "SERVER", "tests.light_fork_server")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'src'}")
    monkeypatch.setattr(head_start, "_begun", [])
    head_start.begin(["train", "--ranks", "2"])
    (ahead,) = head_start._begun
    if changes == "a variable":
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
    forks = forking.Forking(find_mpiexec(), here=changes != "where the ranks are")
    try:
        assert lives(ahead.process.pid) == (changes == "nothing")
        server = forks.serve()
        place = stand_in.address(server.token, os.environb | {b"LD_LIBRARY_PATH": ranks_libraries()})
        with socket.socket(socket.AF_UNIX) as link:
            if changes == "where the ranks are":
                with pytest.raises(ConnectionRefusedError):
                    link.connect(place)
            else:
                link.connect(place)
    finally:
        forks.end()
    assert not lives(ahead.process.pid)


def ranks_libraries() -> bytes:
    """LD_LIBRARY_PATH of ranks under this Python's mpiexec."""
    mpiexec, own = find_mpiexec(), os.environ.get("LD_LIBRARY_PATH", "")
    return os.fsencode(head_start.with_libraries_of(mpiexec.path, os.environ) if mpiexec.is_open_mpi else own)


MODEL = """
import json, os, sys
import numpy as np, torch
from tests import tiny

def net(image_shape, classes):
    told = {
        "pid": os.getpid(), "parent": os.getppid(), "torch": torch.random.default_generator.seed(),
        "numpy": int(np.random.randint(2**62)), "words": sys.orig_argv,
    }
    with open(f"told-{os.environ['OMPI_COMM_WORLD_RANK']}", "a") as file:
        file.write(json.dumps(told) + chr(10))
    return tiny.net(image_shape, classes)
"""


def told_by(folder: Path) -> list[list[dict[str, Any]]]:
    """What each rank tells, each time that it makes a network."""
    return [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("told-*"))
    ]


@pytest.mark.cold
@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.timeout(300)
def test_a_run_goes_on_without_its_server(command: Command, tmp_path: Path) -> None:
    """Ranks under mpiexec are forks of one process, found by command line and environment. If it is killed
    the run goes on, and a rank that is killed then is lost as any is; all is gone at the end."""
    (tmp_path / "own.py").write_text(MODEL)
    words = ["--dataset", tiny.DATASET, "--model", "own:net", "--lr", "0.02", "--ranks", "3"]
    process = command.start(
        *(sys.executable, "-m", "rankwise", "train", *words, "--epochs", "4000", "--out", "run"),
        *("--strategy", "allreduce", "--fault", "kill:rank=1,epoch=4"),
    )
    folder = RunFolder(tmp_path / "run")
    wait_for(lambda: len(folder.read_metrics()) >= 1)
    ranks = [told[0] for told in told_by(tmp_path)]
    assert len({rank["parent"] for rank in ranks}) == 1
    for number, rank in enumerate(ranks):
        seen = psutil.Process(rank["pid"])
        assert seen.cmdline() == [sys.executable, "-P", "-m", "rankwise.launch.rank", "run"] == rank["words"]
        assert seen.environ()["OMPI_COMM_WORLD_RANK"] == str(number)
    os.kill(ranks[0]["parent"], signal.SIGKILL)
    before = len(folder.read_metrics())
    wait_for(lambda: len(folder.read_metrics()) >= max(before, 4) + 2)
    assert [fault.rank for fault in folder.read().faults] == [1]
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert not any(lives(rank["pid"]) for rank in ranks)
