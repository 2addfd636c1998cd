"""Where in a program a call of MPI is made: the innermost line that is the user's own."""

from __future__ import annotations

from pathlib import Path
from types import CodeType, FrameType

from rankwise.program.log import CallLog
from rankwise.system.call_sites import NOT_THE_USERS, PACKAGE

OURS = -2
"""In place of a site: rankwise's own code calls."""


class Places:
    """The sites of one method's calls."""

    def __init__(self, log: CallLog, numbers: list[int], call: str) -> None:
        self._log = log
        self._numbers = numbers  # of all methods: one more for each site
        self._call = call
        self._kept: list[CodeType] = []  # so that no other code gets the id of one
        self._known: dict[tuple[int, int], int] = {}
        self._sites: dict[tuple[int, int], int] = {}

    def find(self, frame: FrameType | None) -> int:
        """The site of a call from this frame, or OURS."""
        first = frame
        if frame is not None:  # one that called before
            site = self._known.get((id(frame.f_code), frame.f_lasti))
            if site is not None:
                return site
        while frame is not None:
            code = frame.f_code
            if code.co_filename.startswith(PACKAGE) and "/launch/" not in code.co_filename:
                return OURS
            if not code.co_filename.startswith((*NOT_THE_USERS, "<frozen", PACKAGE)):
                break
            frame = frame.f_back
        found = frame or first
        if found is None:
            return -1
        code, line = found.f_code, found.f_lineno
        site = self._sites.get((id(code), line))
        if site is None:
            site = self._sites[id(code), line] = len(self._numbers)
            self._numbers.append(site)
            self._kept.append(code)
            here, file = Path.cwd(), Path(code.co_filename)
            shown = file.relative_to(here) if file.is_relative_to(here) else file
            self._log.say("site", file=str(shown), line=line, function=code.co_qualname, call=self._call)
        if found is first:
            self._known[id(code), found.f_lasti] = site
        return site
