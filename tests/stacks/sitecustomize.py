"""Tests put this folder on the path of the Python processes that they start: on SIGUSR2 such a process writes
where each of its threads stands, into a file of its own that stands in the test's folder.

Python imports this at its start, so it must be quick: `signal` would load `enum` for a number.
"""

import faulthandler
import os
import sys
from _signal import SIGUSR2


def tell_where(folder: str) -> None:
    """Have this process do so."""
    rank = os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ.get("PMI_RANK") or ""
    # The job stands there too: what is left of it has a name that can be told from the job's.
    name = f"{rank},{os.environ.get('PMIX_NAMESPACE', '')},{os.getpid()}"
    try:
        where = os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
        faulthandler.register(SIGUSR2, where)
    except OSError:
        pass  # the test is over, and its folder gone


def tell_where_as_a_rank(event: str, _: object) -> None:
    """In a fork of the server of ranks, once it has the environment of its rank and goes into its folder."""
    if event == "os.chdir" and not _told:
        _told.append(event)
        tell_where(os.environ["RANKWISE_TEST"])


_told: list[str] = []

if folder := os.environ.get("RANKWISE_TEST"):
    tell_where(folder)
    if "rankwise.launch.fork_server" in sys.orig_argv:
        os.register_at_fork(after_in_child=lambda: sys.addaudithook(tell_where_as_a_rank))
