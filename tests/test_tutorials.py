"""The docs as a site, and their tutorials: what they tell a reader to type works."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from . import effort
from .conftest import Command, mpiexec_words

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def commands(page: Path) -> list[str]:
    """What a page tells its reader to type."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_each_tutorial_has_commands() -> None:
    """Every page of the tutorials shows something to type, which the test below runs."""
    pages = [*TUTORIALS.glob("*.md")]
    assert pages
    pages = [*TUTORIALS.glob("*.md")]
    assert pages
    assert all(len(commands(page)) >= 2 for page in pages)


@pytest.mark.mpi
@pytest.mark.cold  # a program's own MPI ends where Python does
@pytest.mark.timeout(240)
@effort.only_in_full
@pytest.mark.parametrize("page", sorted(TUTORIALS.glob("*.md")), ids=lambda page: page.stem)
def test_commands_of_a_tutorial_work(command: Command, tmp_path: Path, page: Path) -> None:
    """In an empty folder beside the programs that a page shows, each of its commands ends well and says
    something."""
    for program in (TUTORIALS / "programs").glob("*.py"):
        shutil.copy(program, tmp_path)
    starts = {
        "rankwise": [command.python, "-m", "rankwise"],
        "python": [command.python],
        "mpiexec": [*mpiexec_words(2), command.python, "-m", "rankwise"],
    }
    for line in commands(page):
        first, *words = shlex.split(line)
        if first == "mpiexec":
            assert words[:3] == ["-n", "2", "rankwise"]
            words = words[3:]
        done = command(*starts[first], *words, timeout=200)
        assert done.code == 0, (line, done)
        assert done.out or done.err or first == "python", (line, done)
        for name in re.findall(r"--out(?:put)? (\S+)", line):
            assert (tmp_path / name).exists(), line


@effort.only_in_full
def test_the_site_is_whole_and_asks_no_server(command: Command, tmp_path: Path) -> None:
    """The site is built without a warning, so no link of its own leads nowhere; keys and options
    stand in it, and no page loads anything from elsewhere."""
    docs = TUTORIALS.parent
    done = command(sys.executable, "-m", "sphinx", "-b", "html", "-W", "-q", str(docs), "site")
    assert done.code == 0, done
    pages = [*(tmp_path / "site").rglob("*.html")]
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|img|iframe)[^>]*\bsrc="(?:https?:)?//', text), page
        assert not re.findall(r'<link[^>]*\bhref="(?:https?:)?//', text), page
    assert "wait_on_ns" in (tmp_path / "site/generated/record.html").read_text()
    assert "--on-shrink" in (tmp_path / "site/generated/options.html").read_text()
