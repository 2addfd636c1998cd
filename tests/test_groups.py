"""The groups in which `python -m tests` runs the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .groups import PLACE

REPOSITORY = Path(__file__).parents[1]
MARKS = "[tool.pytest.ini_options]\nmarkers = ['mpi', 'alone', 'full']\ntestpaths = ['tests']\n"
FILES = {
    "test_computes.py": "def test_sum(): told('threads')\n",
    "test_ranks.py": """
@pytest.mark.mpi
def test_ranks(): told('mpi')

@pytest.mark.mpi
@pytest.mark.alone
def test_busy_ranks(): told('alone')

@pytest.mark.mpi
@pytest.mark.full
def test_more_ranks(): told('full')

def test_no_rank(): told('threads')
""",
    "deep/test_clock.py": "@pytest.mark.alone\ndef test_clock(): told('alone')\n",
}
FEW_PLUGINS = {"PYTHONPATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}
HEAD = """
import os, pytest

def told(group):
    with open(os.environ["TOLD"], "a") as file:
        file.write(group + "\\n")

"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository with a few tests, which run as ours do."""
    for name, text in FILES.items():
        path = tmp_path / "tests" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(HEAD + text)
    (tmp_path / "pyproject.toml").write_text(MARKS)
    for name in ("__init__.py", "__main__.py", "groups.py"):
        (tmp_path / "tests" / name).write_bytes((REPOSITORY / "tests" / name).read_bytes())
    return tmp_path


def python(tree: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python's modules on the tree."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=os.environ | FEW_PLUGINS | environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def test_each_test_runs_in_one_group(tree: Path) -> None:
    """The daily tests of all files run, each once, by their marks; those of `full` do not. Bytecode is kept,
    whatever Python is told: ranks would compile all of it each time."""
    done = python(tree, "-m", "tests", TOLD=str(tree / "told"), PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 0, done.stdout
    assert sorted((tree / "told").read_text().split()) == ["alone", "alone", "mpi", "threads", "threads"]
    assert done.stdout.splitlines()[-1] == "5 passed, 0 failed, 0 skipped"
    assert list((tree / "tests" / "__pycache__").glob("test_ranks.*.pyc"))


@pytest.mark.parametrize("broken", [False, True])
def test_files_are_told_only_if_all_are_known(tree: Path, broken: bool) -> None:
    """The files with tests of a mark are told, with those that are left out; but none, if one of the files
    could not be imported: then each group looks at all of them."""
    place = tree / "by-mark.json"
    if broken:
        (tree / "tests" / "test_broken.py").write_text("import nothing_of_this_name\n")
    collect = ("-m", "pytest", "--collect-only", "-m", "not mpi and not alone", "-p", "tests.groups")
    done = python(tree, *collect, **{PLACE: str(place)})
    assert (done.returncode != 0) == broken, done.stdout
    assert place.exists() != broken
    if not broken:
        told = {
            mark: [Path(path).name for path in its] for mark, its in json.loads(place.read_text()).items()
        }
        assert told["mpi"] == ["test_ranks.py"]
        assert sorted(told["alone"]) == ["test_clock.py", "test_ranks.py"]
