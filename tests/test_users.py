"""Users as they come: with files called like Python's own, and without a name or a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.comm.mpi_environment import mpi_environment
from rankwise.system.namesakes import namesakes

from .conftest import Command
from .test_starts import LOOP
from .tiny import DATASET, MODEL

PROGRAM = """
import random, tempfile
from statistics import mine
assert random.mine == mine == "yours"
import helper
assert helper.mine == "yours"
assert tempfile._Random is not None   # Python's own, which takes Python's random
import importlib.util
assert importlib.import_module("fractions").Fraction(1, 2) == 0.5

import secrets.inner as inner, secrets
from secrets import inner as again
assert secrets.inner is inner is again and inner.mine == secrets.mine == "yours"
assert importlib.import_module("secrets").token_hex   # Python's

import numpy
assert numpy.mine == "yours"
from rankwise.ledger.waits import np as numpy_of_a_library
assert numpy_of_a_library.zeros(1).shape == (1,)
assert "site-packages" in importlib.util.find_spec("torch").origin

import pickle
found = pickle.loads(pickle.dumps(secrets.Kept(1)))
assert type(found) is secrets.Kept and found.default == 1
print("went well")
"""

PACKAGE = """
from __future__ import annotations
import dataclasses
from . import inner
from secrets.inner import mine
import secrets.inner

@dataclasses.dataclass
class Kept:
    number: dataclasses.InitVar[int]   # told from a field by looking into the class's own module
    def __post_init__(self, number):
        self.default = number
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user has files and packages that Python or a library has, too, and a program that means its
    own."""
    for name in ("statistics", "random", "fractions", "tokenize", "numpy", "torch", "rich"):
        (tmp_path / f"{name}.py").write_text('mine = "yours"\n')
    for name in ("secrets", "logging"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text('mine = "yours"\n')
        (tmp_path / name / "inner.py").write_text('mine = "yours"\n')
    (tmp_path / "secrets" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "helper.py").write_text("from random import mine\n")
    (tmp_path / "prog.py").write_text(PROGRAM)
    return tmp_path


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_program_has_its_own_and_libraries_have_pythons(folder: Path) -> None:
    """Under `rankwise run` the user's files import each other, and whatever a library imports, now or later,
    is Python's."""
    code = "from rankwise.launch.program_process import run_script; run_script(['prog.py'])"
    done = python(folder, "-P", "-c", code)
    assert (done.returncode, done.stdout) == (0, "went well\n"), done.stderr


@pytest.mark.full
@pytest.mark.mpi
def test_namesakes_do_no_harm_to_trainings(command: Command, folder: Path) -> None:
    """In such a folder `rankwise train` and a loop of the user's own train on two ranks, and the loop has its
    own files all the same."""
    words = ["--dataset", DATASET, "--model", MODEL, "--epochs", "1", "--ranks", "2"]
    done = command.rankwise("train", *words, "--out", "trained", cwd=folder)
    assert done.code == 0, done
    (folder / "loop.py").write_text(f"{LOOP}\n{PROGRAM}")
    (folder / "patient.py").write_text("def wait(): pass")
    (folder / "torch.py").unlink()  # the loop means the library
    done = command.rankwise("run", "--ranks", "2", "--out", "run", "loop.py", cwd=folder)
    assert done.code == 0, done
    assert done.out.count("went well") == 2


def test_a_script_called_like_a_module_imports_that(tmp_path: Path) -> None:
    """`rankwise run random.py` whose script, or a helper of it, says `import random` gets Python's."""
    (tmp_path / "random.py").write_text('import random, helper; print(random.choice("a"), helper.found)')
    (tmp_path / "helper.py").write_text('import random\nfound = random.choice("b")\n')
    code = "from rankwise.launch.program_process import run_script; run_script(['random.py'])"
    done = python(tmp_path, "-P", "-c", code)
    assert (done.returncode, done.stdout) == (0, "a b\n"), done.stderr


def test_namesakes_are_those_of_python_and_of_what_rankwise_needs(tmp_path: Path) -> None:
    """A package of the user's that another program has installed, too, stays as under plain Python, and so do
    names that no library imports."""
    for name in ("queue", "torch", "yaml", "PIL", "rankwise", "pip", "test", "this", "os", "sys", "mine"):
        (tmp_path / f"{name}.py").write_text("")
    assert set(namesakes(tmp_path)) == {"queue", "torch", "yaml", "PIL", "rankwise"}


def test_a_programs_lines_go_out_whole(tmp_path: Path) -> None:
    """In one piece each, with PYTHONUNBUFFERED, too, or lines of several ranks would mix."""
    (tmp_path / "prog.py").write_text("print('one', 2)\nprint('three', end='', flush=True)\nprint(' four')")
    code = "from rankwise.launch.program_process import run_script; run_script(['prog.py'])"
    read, write = os.pipe2(os.O_DIRECT)  # keeps apart what is written apart
    try:
        words = [sys.executable, "-u", "-P", "-c", code]
        subprocess.run(words, cwd=tmp_path, stdout=write, timeout=60, check=True)
        assert [os.read(read, 4096) for _ in range(3)] == [b"one 2\n", b"three", b" four\n"]
    finally:
        os.close(read)
        os.close(write)


def test_python_m_rankwise_takes_nothing_from_the_folder(folder: Path) -> None:
    """`python -m` looks into the current folder first; rankwise does so last."""
    done = python(folder, "-m", "rankwise", "presets")
    assert done.returncode == 0, done.stderr


def test_mpi_begins_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Open MPI refuses to begin without a home: a folder that is this user's alone stands in. Who has a home
    keeps it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/me")
    assert mpi_environment()["HOME"] == "/home/me"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    home = Path(mpi_environment()["HOME"])
    assert home == tmp_path / f"rankwise-{os.getuid()}"
    assert home.stat().st_mode & 0o777 == 0o700
