"""What a program's ranks print: shown with the rank, and kept in the run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from rankwise.launch.supervision import Line
from rankwise.runs.folder import RunFolder


class Output:
    """Shows each line with the number of its rank, if there are several, on the stream on which it came, and
    adds it to that rank's file. On a terminal it goes by `say`, above the live bar. With `keeps_stdout` all
    goes to stderr."""

    def __init__(
        self, folder: RunFolder, say: Callable[[str], None], ranks: int, *, keeps_stdout: bool = False
    ) -> None:
        self._keeps_stdout = keeps_stdout
        self._folder = folder
        self._say = say
        self._ranks = ranks

    def __call__(self, line: Line) -> None:
        rank = 0 if line.rank is None else line.rank
        with suppress(OSError):  # a full disk: it is shown all the same
            path = self._folder.output_of(rank)
            path.parent.mkdir(exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line.text + "\n")
        text = line.text if self._ranks == 1 or line.rank is None else f"[{rank}] {line.text}"
        stream = sys.stderr if line.is_error or self._keeps_stdout else sys.stdout
        if stream.isatty():
            self._say(text)
        else:
            print(text, file=stream, flush=True)


def plain(say: Callable[[str], None]) -> Callable[[Line], None]:
    """Shows lines as they are."""
    return lambda line: say(line.text)
