"""What users of other profilers of MPI programs met, and programs that cannot be run.

That `mpi4py.futures` hangs is tried by `known_delays.py` and `test_a_program_does_all_that_it_does_without`,
a program that leaves early by `test_what_was_known_is_left`.
"""

from __future__ import annotations

import atexit
import gc
import py_compile
import shutil
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankwise.comm.mpi_environment import Placement
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, UsageError
from rankwise.launch.order import Order
from rankwise.launch.program_given import given_folder
from rankwise.ledger.call_log import Kind, read_logs
from rankwise.program.log import ROWS, CallLog
from rankwise.program.places import Places
from rankwise.program.wrappers import Seen, logged
from rankwise.program_plan import of_world, program_plan
from rankwise.runs.folder import RunFolder
from rankwise.system.user_code import require_python

from .conftest import Command
from .test_cli import call

LIBRARY = """
import sys

def down(depth, then):
    return then() if depth == 0 else down(depth - 1, then)

def asking(find):
    return lambda: find(sys._getframe())
"""


def library() -> SimpleNamespace:
    """A module as it lies among the installed packages."""
    content: dict[str, Any] = {}
    exec(compile(LIBRARY, f"{sysconfig.get_path('purelib')}/library.py", "exec"), content)
    return SimpleNamespace(**content)


def test_the_line_is_ones_own_however_deep_the_stack(tmp_path: Path) -> None:
    """Of a stack of hundreds of functions, those of libraries below one's own or not, the line is that of the
    last function that is the user's own; two lines that come by the same functions of a library are two."""
    log, numbers = CallLog(tmp_path, 0), list[int]()
    find = Places(log, numbers, "Send").find
    there = library()

    def mine(depth: int) -> list[int]:
        if depth:
            return mine(depth - 1)
        return [
            find(sys._getframe()),
            there.down(150, there.asking(find)),
            there.down(150, there.asking(find)),
        ]

    sites = [*mine(200), there.down(100, lambda: mine(0)[1])]
    log.say("rank", rank=0, start_ns=1)
    log.close()
    (told,) = read_logs(tmp_path)
    first = mine.__code__.co_firstlineno + 4
    assert [told.sites[site].line for site in sites] == [first, first + 1, first + 2, first + 1]
    assert {site.function.rpartition(".")[2] for site in told.sites} == {"mine"}
    assert {site.file for site in told.sites} == {str(Path(__file__).relative_to(Path.cwd()))}


def steps(work: Callable[[], Any]) -> int:
    """How many functions, Python's and C's, are called."""
    count = 0

    def one(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # what it calls is none of the work's
    sys.setprofile(one)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_bytes_of_a_call_in_place_are_those_of_its_buffer(tmp_path: Path) -> None:
    """Where an array stands in for what is sent, as with MPI.IN_PLACE, its bytes are told."""
    log = CallLog(tmp_path, 0)
    log.say("rank", start_ns=0)
    seen = Seen(log)
    in_place: Any = object()
    seen.mpi = SimpleNamespace(IN_PLACE=in_place)
    comm: Any = SimpleNamespace(handle=1)
    seen.comms[1] = 0

    def nothing(comm: Any, sendbuf: Any, recvbuf: Any) -> None:
        """Allreduce(self, sendbuf: BufSpec | InPlace, recvbuf: BufSpec) -> None"""

    content: dict[str, Any] = {}
    exec(compile("def run(call, *args, **more): call(*args, **more)", "program.py", "exec"), content)
    allreduce, array = logged(seen, nothing, "Allreduce", Kind.COLLECTIVE), np.zeros(5)
    content["run"](allreduce, comm, in_place, array)
    content["run"](allreduce, comm, in_place, [array, "DOUBLE"])
    content["run"](allreduce, comm, in_place, recvbuf=array)
    content["run"](allreduce, comm, array[:2], array)
    log.close()
    (found,) = read_logs(tmp_path)
    assert found.rows["bytes"].tolist() == [40, 40, 40, 16]


def test_a_call_takes_as_few_steps_late_and_deep_as_at_first(tmp_path: Path) -> None:
    """What is logged of a call does not grow with how many there were, nor with the functions of the program
    around it, and no call writes to a file: a run takes no hundred times as long."""
    log = CallLog(tmp_path, 0)
    seen = Seen(log)
    comm: Any = SimpleNamespace(handle=1)
    seen.comms[1] = 0

    def nothing(comm: Any) -> None:
        """Barrier(self) -> None"""

    barrier = logged(seen, nothing, "Barrier", Kind.COLLECTIVE)
    content: dict[str, Any] = {}
    program = "def calls(depth):\n    calls(depth - 1) if depth else barrier(comm)\n"
    exec(compile(program, "program.py", "exec"), {"barrier": barrier, "comm": comm}, content)
    calls = content["calls"]
    calls.__globals__["calls"] = calls
    calls(0)
    at_first = steps(lambda: calls(0))
    assert at_first <= 12
    for _ in range(ROWS // 2):
        calls(0)
    assert steps(lambda: calls(0)) == at_first
    assert steps(lambda: calls(500)) == at_first + 500
    log.close()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("letter.txt", b"Dear reader,\nthis is a letter.\n", "letter.txt is no Python, line 1: "),
        ("image.py", b"\x89PNG\x00\x01\xff", "image.py is no Python"),
        ("folder", None, "folder is no file"),
    ],
)
def test_a_script_that_is_no_python(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: bytes | None,
    told: str,
) -> None:
    """It is refused in one line and with code 2 before a rank starts, and leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    if content is None:
        Path(name).mkdir()
    else:
        Path(name).write_bytes(content)
    assert call("run", "--ranks", "2", "--out", "run", name, "--its", "own") == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1), err
    assert told in err
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_what_python_runs_is_no_bad_script(tmp_path: Path) -> None:
    """A script that is compiled already, a package in one file, and one that Python warns of are taken."""
    script = tmp_path / "script.py"
    script.write_text("print(1)\n")
    compiled = py_compile.compile(str(script), str(tmp_path / "script.pyc"))
    script.write_text("print('\\d', 1 is 1)\n")
    packed = tmp_path / "packed.pyz"
    with zipfile.ZipFile(packed, "w") as archive:
        archive.write(script, "__main__.py")
    for path in (script, Path(compiled), packed):
        require_python(path)
    script.write_text("print(1)\n)\n")
    with pytest.raises(ConfigError, match="is no Python, line 2"):
        require_python(script)


WHO = """
import inspect, sys
def mine(): pass
print(sys.argv, __file__, __name__, __package__, __spec__, __cached__, type(__loader__).__name__, sys.path[0])
print(sys.modules["__main__"].__dict__ is globals(), inspect.getsource(mine), mine.__module__)
"""


@pytest.mark.cold  # as people run it
def test_a_script_sees_itself_as_under_python(command: Command, tmp_path: Path) -> None:
    """Its words, its file, which is absolute, its module and its source are what plain Python gives it: a
    program that starts itself anew looks at them."""
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "who.py").write_text(WHO)
    plain = command(command.python, "below/who.py", "--its", "own")
    assert str(tmp_path / "below" / "who.py") in plain.out
    seen = command.rankwise("run", "--out", "run", "below/who.py", "--its", "own")
    assert (seen.code, seen.out) == (0, plain.out), seen


def test_ranks_that_run_different_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a user's own mpiexec a rank that was given another script than rank 0 is refused by both names;
    one with other arguments of its own takes part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PMIX_NAMESPACE", "job-1")
    order = Order(TrainConfig(out=tmp_path / "run"))

    def folder_of(rank: int, *program: str) -> Path:
        plan = program_plan(of_world(order.config.given(), 2), program)
        return given_folder(order, plan, Placement(rank, 2, rank, 2)).path

    assert folder_of(0, "a.py", "1") == tmp_path / "run"
    assert folder_of(1, "a.py", "2") == tmp_path / "run"
    with pytest.raises(UsageError, match=r"rank 1 was given b.py, and rank 0 a.py: expected one script"):
        folder_of(1, "b.py", "1")


def test_a_rank_that_begins_when_rank_0_is_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a user's own mpiexec the ranks of a program without MPI need not meet: one that starts later
    finds the folder all the same, and the last one leaves nothing of how it was found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PMIX_NAMESPACE", "job-2")
    monkeypatch.setattr(atexit, "register", lambda act, *words: act(*words))  # rank 0 ends at once
    order = Order(TrainConfig(out=tmp_path / "run"))
    plan = program_plan(of_world(order.config.given(), 3), ("a.py",))
    for rank in range(3):
        assert given_folder(order, plan, Placement(rank, 3, rank, 3)).path == tmp_path / "run"
    assert not [*tmp_path.glob(".job-*"), *(tmp_path / "run").glob(".noted")]


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_a_short_program_leaves_all_that_it_did(command: Command, tmp_path: Path) -> None:
    """A program of two lines is over before anything would be sampled, and is there: each rank, its call and
    its line."""
    (tmp_path / "short.py").write_text("from mpi4py.MPI import COMM_WORLD as comm\ncomm.Barrier()\n")
    done = command.rankwise("run", "--ranks", "2", "--out", "run", "short.py")
    assert done.code == 0, done
    found = RunFolder(tmp_path / "run").read()
    assert sorted((site.rank, site.call, site.line) for site in found.call_sites) == [
        (0, "Barrier", 2),
        (1, "Barrier", 2),
    ]
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in found.ranks)


def test_two_programs_into_one_folder(command: Command, tmp_path: Path) -> None:
    """The second one is refused in one line and with code 2, and what the first one left stays as it is."""
    (tmp_path / "first.py").write_text("print(1)\n")
    (tmp_path / "second.py").write_text("print(2)\n")
    assert command.rankwise("run", "--out", "run", "first.py").code == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = command.rankwise("run", "--out", "run", "second.py")
    assert (done.code, done.out, len(done.told)) == (2, "", 1), done
    assert "run" in done.told[0]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


C_CALLS = """
#include <mpi.h>
int meet(MPI_Comm *comm) { return MPI_Barrier(*comm); }
"""

CALLS_C = """
import ctypes, time
from mpi4py import MPI
comm = MPI.COMM_WORLD.Dup()
meet = ctypes.CDLL("./libmeets.so").meet
time.sleep(0.5 * (1 - comm.rank))
print(meet(ctypes.c_void_p(MPI._addressof(comm))))
comm.Barrier()
"""


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_calls_from_c_are_computing_and_said_to_be(command: Command, tmp_path: Path) -> None:
    """A library that takes the communicator's handle works as without the ledger; what it waits counts as own
    work, and record and summary say whose calls were not seen."""
    compiler = Path(sys.executable).with_name("mpicc")
    if not (compiler.exists() and shutil.which("gcc")):
        pytest.skip("there is no compiler for MPI")
    (tmp_path / "meets.c").write_text(C_CALLS)
    (tmp_path / "calls.py").write_text(CALLS_C)
    made = command(str(compiler), "-shared", "-fPIC", "-o", "libmeets.so", "meets.c")
    assert made.code == 0, made
    done = command.rankwise("run", "--ranks", "2", "--out", "run", "calls.py")
    assert done.code == 0, done
    assert done.out.count("] 0\n") == 2
    assert "What libmeets.so calls in MPI is not seen, and counts as computing." in done.out + done.err
    run = RunFolder(tmp_path / "run").read()
    assert run.environment.calls_from_c == ["libmeets.so"]
    assert all(sum(row.phases_ns.values()) == row.wall_ns for row in run.ranks)
    assert all(row.phases_ns["compute"] > 0.45e9 for row in run.ranks)
    assert {site.call for site in run.call_sites} == {"Dup", "Barrier"}
