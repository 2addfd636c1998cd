"""How a run that goes on is asked for other ranks, and tells how far that is: a file in its folder.

Whoever asks writes it first. The launcher and rank 0 of the next generation then take turns, so that each
state has one writer: `starting` and `handing over` are the launcher's, `ready` and `done` that rank's.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from rankwise.errors import StorageError, UsageError
from rankwise.system.files import write_atomically, write_first

State = Literal["asked", "starting", "ready", "handing over", "done", "refused", "failed"]
OVER: tuple[State, ...] = ("done", "refused", "failed")


@dataclass(frozen=True)
class Resize:
    """A change of a run's ranks: the options that are to be in force, and how far it is.

    `mark` names the start of the generation that is to take over. `message` says why it did not.
    """

    state: State
    given: dict[str, Any] = field(default_factory=dict)
    mark: str = ""
    message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.state in OVER


def read_resize(path: Path) -> Resize | None:
    """The change that was asked for last; None if there is none, or its file is damaged."""
    try:
        return Resize(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def ask(path: Path, given: dict[str, Any]) -> None:
    """Ask for other ranks. Raises UsageError while another change is under way."""
    before = read_resize(path)
    if before is None or before.is_over:
        path.unlink(missing_ok=True)
    try:
        write_first(path, json.dumps(asdict(Resize("asked", given))).encode())
    except FileExistsError:
        other = read_resize(path)
        words = ", ".join(f"--{name} {value}" for name, value in (other.given if other else {}).items())
        raise UsageError(
            f"{path.parent} is being resized already ({words}): wait until that is over"
        ) from None
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None


def tell(path: Path, state: State, **more: Any) -> bool:
    """Say how far the change is; returns whether it could be written, if anybody has asked. A change of which
    nobody can be told that it is over is taken away, so that nobody waits for it."""
    now = read_resize(path)
    if now is None:
        return True
    try:
        write_atomically(path, json.dumps(asdict(replace(now, state=state, **more))).encode())
    except StorageError:
        if state in OVER:
            with suppress(OSError):
                path.unlink(missing_ok=True)
        return False
    return True
