"""A plugin of pytest's: which files hold tests of each mark, so that one group looks at all, not each.

To look at all files takes a process a quarter of a minute, and each group has several.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

PLACE = "RANKWISE_TESTS_BY_MARK"
"""The variable that names the file for it."""


@pytest.hookimpl(tryfirst=True)  # before any are deselected
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Of several processes that find the same, the first tells; none, if a file could not be imported."""
    if not session.testsfailed and getattr(config, "workerinput", {}).get("workerid", "gw0") == "gw0":
        found: dict[str, dict[str, None]] = {}
        for item in items:
            for mark in item.iter_markers():
                found.setdefault(mark.name, {})[str(item.path)] = None
        whole = Path(os.environ[PLACE])
        part = whole.with_suffix(".part")
        part.write_text(json.dumps({mark: list(paths) for mark, paths in found.items()}))
        part.replace(whole)
