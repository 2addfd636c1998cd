"""Where in a user's code the library was called, and how a loop was left."""

from __future__ import annotations

import dis
import gc
import os
import sys
import sysconfig
from inspect import CO_GENERATOR
from pathlib import Path
from types import FrameType, TracebackType

PACKAGE = str(Path(__file__).parents[1]) + os.sep
NOT_THE_USERS = (PACKAGE, *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "purelib", "platlib")))

DROPS = ("POP_TOP", "POP_ITER")
"""What Python does with an iterator where a loop is left by `break` or `return`; neither raises."""


def place_of(frame: FrameType | None) -> str:
    """The file and line of a user's code at which this frame is, or that called it."""
    while frame is not None and frame.f_code.co_filename.startswith(NOT_THE_USERS):
        frame = frame.f_back
    if frame is None:
        return "the end of the program"
    file, here = Path(frame.f_code.co_filename), Path.cwd()
    return f"{file.relative_to(here) if file.is_relative_to(here) else file}:{frame.f_lineno}"


def here() -> str:
    """The file and line of a user's code that called the library."""
    return place_of(sys._getframe(1))


def left_by(frame: FrameType | None) -> tuple[FrameType | None, bool]:
    """The frame that left a loop, which dropped a generator, and whether an exception left it.

    `frame` is the generator's caller. It may be a generator around it (a progress bar), which is closed in
    turn.
    """
    while frame is not None and _raises(frame):
        if not (frame.f_code.co_flags & CO_GENERATOR and _is_at_yield(frame)):
            return frame, True
        frame = frame.f_back
    return frame, False


def _raises(frame: FrameType) -> bool:
    """Whether an exception is on its way through a frame; Python itself does not tell whom it finalises."""
    if _operation(frame) in DROPS:
        return False  # at once: a look at all objects takes 50 ms
    return any(
        isinstance(its, TracebackType) and its.tb_frame is frame and its.tb_lasti == frame.f_lasti
        for its in gc.get_referrers(frame)
    )


def _is_at_yield(frame: FrameType) -> bool:
    return _operation(frame) in ("YIELD_VALUE", "RESUME", "SEND")


def _operation(frame: FrameType) -> str:
    return dis.opname[frame.f_code.co_code[frame.f_lasti]]
