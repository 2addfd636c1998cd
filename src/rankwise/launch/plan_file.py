"""``plan.json``: what a run was asked for, and what of that is in force."""

from __future__ import annotations

import json
from typing import Any

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, ResumeError, one_line
from rankwise.plan import RunPlan
from rankwise.runs.folder import RunFolder
from rankwise.system.files import write_atomically


def write_plan(folder: RunFolder, asked: TrainConfig, plan: RunPlan, *, is_next: bool = False) -> None:
    """Write down the plan for the ranks, and beside it what was asked for, for a run that goes on later.
    With `is_next` it is that of ranks that have still to take over.

    On hosts it is what they had room for that was asked for: they may have been read from a file. Raises
    StorageError.
    """
    on_hosts = ("hosts", "ranks", "spares") if plan.hosts else ()
    given = {**_json(asked, asked.model_fields_set - {"hostfile"}), **_json(plan, on_hosts)}
    content = {"asked": given, "plan": plan.model_dump(mode="json"), "program": plan.program}
    path = folder.next_plan if is_next else folder.plan
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


def read_plan(folder: RunFolder, *, is_next: bool = False) -> RunPlan:
    """The plan of a run that is about to start, or of ranks that are to take over. Raises ResumeError, one
    line, if it is missing or damaged."""
    path = folder.next_plan if is_next else folder.plan
    try:
        content = json.loads(path.read_bytes())
        return RunPlan(**content["plan"], program=content.get("program", ()))
    except (OSError, ValueError, TypeError, LookupError, RecursionError, ConfigError) as error:
        raise ResumeError(f"{path} cannot be read: {one_line(error)[:200]}") from None


def read_asked(folder: RunFolder) -> dict[str, Any] | None:
    """What the run was asked for, by name; None for a run of a version that wrote down no plan.

    Raises ResumeError, one line, if it is damaged.
    """
    try:
        return dict(json.loads(folder.plan.read_bytes())["asked"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise ResumeError(f"{folder.plan} cannot be read: {one_line(error)[:200]}") from None


def _json(config: TrainConfig, names: Any) -> dict[str, Any]:
    return config.model_dump(mode="json", include=set(names))
