"""Text to learn a language from: a user's file, or what comes with every Python."""

from __future__ import annotations

from pathlib import Path

from rankwise.errors import DataError, one_line

FEWEST = 20_000
"""Characters of the shortest text: a part of it is held out, and all ranks need some of that."""


def read_text(path: Path | None = None) -> str:
    """The text in a file, in UTF-8; without one the topics of Python's own help, half a megabyte of English.

    Raises DataError, one line, for a file that cannot be read or is too short.
    """
    if path is None:
        return _topics()
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or one_line(error)}") from None
    if len(text) < FEWEST:
        raise DataError(f"{path} has {len(text):,} characters, expected {FEWEST:,} or more")
    return text


def _topics() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            "this Python came without the text of its help: give a text file, --text FILE"
        ) from None
    return "\n\n".join(topics[name] for name in sorted(topics))
