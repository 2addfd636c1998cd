"""Which libraries in this process are linked with another one, as the kernel and their files tell."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_LOAD, _DYNAMIC = 1, 2
_NEEDED, _STRINGS = 1, 5


def linked_with(name: str) -> list[Path]:
    """The libraries of this process that ask for one whose name begins so, of 64-bit Linux; others tell
    none."""
    with suppress(OSError):
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        places = sorted({line[line.index("/") :] for line in lines if ".so" in line and "/" in line})
        return [Path(place) for place in places if any(its.startswith(name) for its in _needed(place))]
    return []


def _needed(place: str) -> Iterator[str]:
    """The names of what a file is linked with; none of one that is gone, or no library."""
    with (
        suppress(OSError, ValueError, struct.error, IndexError),
        open(place, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if content[:6] != b"\x7fELF\x02\x01":
            return
        (table,) = struct.unpack_from("<Q", content, 32)
        size, count = struct.unpack_from("<HH", content, 54)
        segments = [struct.unpack_from("<IIQQQQ", content, table + size * at) for at in range(count)]
        loaded = [
            (address, offset, length) for kind, _, offset, address, _, length in segments if kind == _LOAD
        ]
        entries = [
            entry
            for kind, _, offset, _, _, length in segments
            if kind == _DYNAMIC
            for entry in struct.iter_unpack("<qQ", content[offset : offset + length])
        ]
        strings = next(value for tag, value in entries if tag == _STRINGS)
        at = next(
            strings - address + offset
            for address, offset, length in loaded
            if address <= strings < address + length
        )
        for tag, value in entries:
            if tag == _NEEDED:
                yield content[at + value : content.find(b"\0", at + value)].decode()
