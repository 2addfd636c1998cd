"""Numbers as they stand on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cyclopts import Parameter, Token


def _whole_number(_type: object, tokens: Sequence[Token]) -> int:
    (word,) = (token.value for token in tokens)
    if not re.fullmatch(r"[-+]?\d+", word):
        raise ValueError(f"{word!r} was given, expected a whole number")
    return int(word)


WHOLE = Parameter(converter=_whole_number)
"""Marks an option that is a whole number; cyclopts by itself would round 1.6 to 2."""
