"""Users' own code by ``module:attribute``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from rankwise.errors import UsageError, one_line


def import_from(path: str, what: str, error: type[UsageError]) -> Any:
    """The attribute of the module, which may stand in the current folder, behind all that is installed.

    Raises `error`, one line that says `what` it was to be.
    """
    module, _, attribute = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as reason:
        raise error(f"{what} {path} cannot be imported: {one_line(reason)}") from reason
