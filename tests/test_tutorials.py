"""The docs as a site, their tutorials, and what to do when something fails: what they tell a reader to type
works."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest

from rankwise.runs.folder import RunFolder

from . import effort
from .conftest import Command, mpiexec_words
from .processes import wait_for

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"

SURVIVAL = (TUTORIALS.parent / "survival.md").read_text()

ANSWERS = (
    *("My job was stopped", "A node died", "I got more nodes, or fewer", "What only one rank has"),
    "The disk was full",
)
"""Sections of the page about survival, each of which tells what to type."""


def commands(text: str) -> list[str]:
    """What a page tells its reader to type."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def section(title: str) -> str:
    """A section of the page about survival."""
    return SURVIVAL.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_each_tutorial_has_commands() -> None:
    """Every page of the tutorials shows something to type, which the test below runs."""
    pages = [*TUTORIALS.glob("*.md")]
    assert pages
    pages = [*TUTORIALS.glob("*.md")]
    assert pages
    assert all(len(commands(page.read_text())) >= 2 for page in pages)
    assert all(commands(section(title)) for title in ANSWERS)


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
    for line in commands(page.read_text()):
        first, *words = shlex.split(line)
        if first == "mpiexec":
            assert words[:3] == ["-n", "2", "rankwise"]
            words = words[3:]
        done = command(*starts[first], *words, timeout=200)
        assert done.code == 0, (line, done)
        assert done.out or done.err or first == "python", (line, done)
        for name in re.findall(r"--out(?:put)? (\S+)", line):
            assert (tmp_path / name).exists(), line


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """While inside, a folder is a disk of its own, which a run fills in a few epochs."""
    folder.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", str(folder)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.cold  # ranks that are killed, and a launcher that is interrupted
@pytest.mark.timeout(900)
@effort.only_in_full
@pytest.mark.parametrize("title", ANSWERS)
def test_commands_of_survival_work(command: Command, tmp_path: Path, title: str) -> None:
    """What a reader types whose job was stopped, who lost a node, got others, or filled a disk, ends well one
    after the other: with Ctrl-C and on a full disk where the page says so, and in the end with each sample
    trained once."""
    beside = []
    with small_disk(tmp_path / "full") if title == ANSWERS[-1] else nullcontext():
        folder = Path()
        for line in commands(section(title)):
            words, remark = shlex.split(line, comments=True), line.partition("#")[2].strip()
            assert words.pop(0) == "rankwise"
            for option in ("--out", "--resume"):
                folder = tmp_path / words[words.index(option) + 1] if option in words else folder
            before = len(RunFolder(folder).read_metrics())
            process = command.start(command.python, "-m", "rankwise", *words)
            if remark == "in the background":  # until another command stops it
                wait_for(partial(has_more_epochs, RunFolder(folder), before))
                beside.append(process)
                continue
            if remark == "Ctrl-C":
                wait_for(partial(has_more_epochs, RunFolder(folder), before))
                process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=400)
            assert process.returncode == {"Ctrl-C": 130, "the disk is full": 1}.get(remark, 0), (line, err)
            if remark == "the disk is full":
                assert "No space left on device" in err
                room = ["mount", "-o", "remount,size=100m", str(tmp_path / "full")]
                subprocess.run(room, check=True)
            elif not remark and words[0] == "train":
                record = RunFolder(folder).read()
                assert record.outcome == "completed", line
                assert (record.samples.lost, record.samples.duplicated) == (0, 0), line
                assert record.samples.trained == record.samples.expected, line
        assert [process.wait(60) for process in beside] == [130] * len(beside)


def has_more_epochs(run: RunFolder, than: int) -> bool:
    return len(run.read_metrics()) > than


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
