"""What it costs to log a call, on this machine now."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rankwise.ledger.call_log import Kind
from rankwise.program.log import CallLog
from rankwise.program.wrappers import Seen, logged

CALLS = 200

MANY = "def many(call, comm, count):\n    for _ in range(count):\n        call(comm)\n"


def measure_cost() -> int:
    """ns that the logging of one cheap call takes: the least of several trials, a call that does nothing
    logged and not."""

    def nothing(comm: Any) -> None:
        """Barrier(self) -> None"""

    with tempfile.TemporaryDirectory() as folder:
        log = CallLog(Path(folder), 0)
        seen = Seen(log)
        comm: Any = SimpleNamespace(handle=1)
        seen.comms[1] = 0
        call = logged(seen, nothing, "Barrier", Kind.COLLECTIVE)
        content: dict[str, Any] = {}
        # Under a name of its own, or it would be taken for a call of rankwise's.
        exec(compile(MANY, "<cost>", "exec"), content)
        took = {nothing: 10**12, call: 10**12}
        for _ in range(5):
            for what in took:
                began_ns = time.monotonic_ns()
                content["many"](what, comm, CALLS)
                took[what] = min(took[what], (time.monotonic_ns() - began_ns) // CALLS)
        log.close()
    return max(0, took[call] - took[nothing])
