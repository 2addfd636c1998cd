"""Users as they come: with files called like Python's own, and without a name or a home."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.comm.mpi_environment import mpi_environment

PROGRAM = """
import random, tempfile
from statistics import mine
assert random.mine == mine == "yours"
import helper
assert helper.mine == "yours"
assert tempfile._Random is not None   # Python's own, which takes Python's random
import importlib
assert importlib.import_module("fractions").Fraction(1, 2) == 0.5
print("went well")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a user has files that Python has, too, and a program that means its own."""
    for name in ("statistics", "random", "fractions", "tokenize"):
        (tmp_path / f"{name}.py").write_text('mine = "yours"\n')
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
