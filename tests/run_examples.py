"""The examples of `Run`, and the plain scripts that they were: their diffs in docs/own-loop.md undone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

HOME = Path(__file__).parents[1]
PAGE = HOME / "docs" / "own-loop.md"
FOLDER = HOME / "examples" / "run"


@dataclass(frozen=True)
class Change:
    """One hunk of a diff: what stands there in the plain script, and what in the example."""

    before: str
    after: str
    lines: int


def changes(name: str) -> list[Change]:
    """The hunks of an example's diff, as the page shows them."""
    block = re.search(
        rf"```diff\n[-]{{3}} {name}\n[+]{{3}} examples/run/{name}\n(.*?)```", PAGE.read_text(), re.S
    )
    assert block, f"{PAGE.name} has no diff of {name}"
    return [_change(hunk.splitlines()) for hunk in re.split(r"^@@.*\n", block[1], flags=re.M)[1:]]


def script(name: str) -> str:
    """An example as it stands."""
    return (FOLDER / name).read_text()


def plain(name: str) -> str:
    """The script before it was converted. Raises AssertionError if the page shows what the example does not
    have."""
    source = script(name)
    for change in changes(name):
        assert source.count(change.after) == 1, f"{name} does not have once:\n{change.after}"
        source = source.replace(change.after, change.before)
    return source


def _change(lines: list[str]) -> Change:
    before = [line[1:] for line in lines if not line.startswith("+")]
    after = [line[1:] for line in lines if not line.startswith("-")]
    told = [line for line in lines if line.startswith("+") and line.strip("+ ")]
    return Change("\n".join(before) + "\n", "\n".join(after) + "\n", len(told))
