"""A rank's rows on their way to its file: memory that the kernel writes, whatever becomes of the process."""

from __future__ import annotations

import json
import mmap
import os
import struct
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from rankwise.ledger.call_log import CALL, UNKNOWN, Kind, paths_of, regions_path

SIZE = CALL.itemsize
ROWS = 8192
"""Of one piece of the file, of which one is in memory."""

BEFORE = ROWS + 1
"""What to take from a piece's end and a place in it for a row's number: the first row of a file has none."""

_EMPTY = struct.pack(f"={SIZE // 8}q", *(UNKNOWN.get(name, 0) for name in CALL.names or ())) * ROWS

PUT, PUT_MESSAGE, PUT_ALL = (struct.Struct(f"={columns}q").pack_into for columns in (5, 10, SIZE // 8))
"""Write a row, as far as a call knows it: to `left_ns`, to `got_tag`, or all of it. Each number that is
written costs a call some tens of nanoseconds."""

ENTERED_AT, SITE_AT = ((CALL.names or ()).index(name) for name in ("entered_ns", "site"))
"""Where in a file's first row stands what is known of the call that was entered last."""


_PART = int(Kind.PART)


class Polls(NamedTuple):
    """Polls that have found nothing so far: where, their row, and what they took together."""

    site: int
    at: int
    buffer: mmap.mmap
    entered_ns: int
    inside_ns: int
    cpu_ns: int
    polls: int


class ThreadLog:
    """The rows of one thread. `busy` while it is inside a call: of calls inside calls the outermost counts.

    `last` is the first row of the file. `dumps_ns`, `loads_ns` and `bytes` are the pickling of the call that
    is open, `loaded` those of the bytes that it has unpickled; `polled` are polls of which the last found
    nothing, so that another one of the same site goes on in it.
    """

    __slots__ = (
        "_file",
        "at",
        "buffer",
        "busy",
        "bytes",
        "dumps_ns",
        "end",
        "last",
        "loaded",
        "loads_ns",
        "polled",
        "status",
        "taken",
    )

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self.busy = False
        self.at = self.end = 0
        self.dumps_ns = self.loads_ns = self.bytes = self.loaded = 0
        self.polled: Polls | None = None
        self.status: Any = None
        self.taken = 0
        self.buffer: mmap.mmap
        self.grow()
        self.last = memoryview(self.buffer).cast("q")
        self.at = SIZE

    def grow(self) -> int:
        """Go on in the next piece of the file; returns where its first row is to be. Raises OSError on a full
        disk."""
        began_ns = time.monotonic_ns()
        offset = self.taken * SIZE
        os.posix_fallocate(self._file, offset, ROWS * SIZE)
        # Pieces begin at a page, as the kernel asks for.
        assert offset % mmap.ALLOCATIONGRANULARITY == 0
        self.buffer = mmap.mmap(self._file, ROWS * SIZE, offset=offset)
        # All pages are made now: one by one, at their first rows, they would cost the calls more.
        self.buffer[:] = _EMPTY
        self.at, self.end = 0, ROWS * SIZE
        self.taken += ROWS
        if self.taken > ROWS:
            self.note(Kind.INSTRUMENT, -1, began_ns, time.monotonic_ns())
        return self.at

    def note(self, kind: int, site: int, entered_ns: int, left_ns: int) -> None:
        """A row of something that is over."""
        at = self.at if self.at < self.end else self.grow()
        self.at = at + SIZE
        PUT(self.buffer, at, kind, site, -1, entered_ns, left_ns)

    def part(self, begun: int, left_ns: int, source: int = -1, tag: int = -1) -> None:
        """What row `begun` began has come to its end in the wait of the row before."""
        at = self.at if self.at < self.end else self.grow()
        self.at = at + SIZE
        message = -1, -1, 0, source, tag
        PUT_ALL(self.buffer, at, _PART, -1, -1, left_ns, left_ns, *message, 0, 0, 0, begun, 0)

    @property
    def count(self) -> int:
        """How many rows there are: the number of the next one."""
        return self.taken + self.at // SIZE - BEFORE

    def close(self) -> None:
        """Give back what was not used."""
        os.ftruncate(self._file, (self.taken - ROWS) * SIZE + self.at)


class CallLog:
    """The log of this process: a ThreadLog for each thread that calls MPI, and what is said beside."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._rows, beside = paths_of(folder, rank)
        self._beside = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        self.thread = threading.get_ident()
        """The one that the program's time is that of."""
        self.main = ThreadLog(self._rows)
        self.threads: dict[int, ThreadLog] = {self.thread: self.main}
        self._made = 1
        self._is_over = False
        self._comms = 0
        self._regions_path = regions_path(folder, rank)
        self._regions: ThreadLog | None = None
        self._region_numbers: dict[tuple[str, ...], int] = {}
        self._open_regions: list[tuple[tuple[str, ...], int]] = []

    def say(self, what: str, **content: Any) -> None:
        """Write a line beside the rows; at once, so that it is there whatever follows."""
        os.write(self._beside, json.dumps({"what": what, **content}).encode() + b"\n")

    def add_comm(self, members: list[int], peers: list[int], number: int) -> int:
        """Tell of a communicator; returns its number on this rank."""
        self.say("comm", members=members, peers=peers, number=number)
        self._comms += 1
        return self._comms - 1

    def of_thread(self) -> ThreadLog:
        """The log of the running thread, a new one if it had none."""
        mine = threading.get_ident()
        if mine not in self.threads:
            path = self._rows.with_name(f"{self._rows.stem}-thread-{self._made}.rows")
            self._made += 1
            self.threads[mine] = ThreadLog(path)
        return self.threads[mine]

    def discard(self) -> None:
        """Nothing was logged."""
        self._is_over = True
        for path in self._rows.parent.glob(f"{self._rows.stem}*"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """The rank logs nothing more."""
        self._is_over = True
        for log in [*self.threads.values(), *([self._regions] if self._regions else [])]:
            log.close()

    def begin(self, name: str) -> None:
        """A region of the program's own begins, inside those that are open."""
        path = (*(self._open_regions[-1][0] if self._open_regions else ()), name)
        self._open_regions.append((path, time.monotonic_ns()))

    def end(self) -> None:
        """The innermost one ends."""
        path, began_ns = self._open_regions.pop()
        if self._is_over:
            return
        number = self._region_numbers.get(path)
        if number is None:
            number = self._region_numbers[path] = len(self._region_numbers)
            self.say("region", path=path)
        if self._regions is None:
            self._regions = ThreadLog(self._regions_path)
        self._regions.note(Kind.REGION, number, began_ns, time.monotonic_ns())
