"""Data-parallel training over MPI, on CPUs first, that accounts for every second of every rank.

    import rankwise
    record = rankwise.train(rankwise.TrainConfig(dataset="digits", ranks=3, lr=0.02, epochs=10))

does what ``rankwise train --dataset digits --ranks 3 --lr 0.02 --epochs 10`` does. A loop of your own
is put in step with `join` and `synchronise`. Importing this package starts no MPI and loads no torch.
"""

from __future__ import annotations

import sys

if sys.argv[:1] == ["-m"] and sys.orig_argv[1:3] == ["-m", "rankwise"] and not sys.flags.safe_path:
    # `python -m rankwise` looks for modules in the current folder first, where a random.py of the user's
    # would be taken for Python's.
    sys.path.append(sys.path.pop(0))

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.api import Run as Run
    from rankwise.api import train as train
    from rankwise.comm import World as World
    from rankwise.comm import run_in_threads as run_in_threads
    from rankwise.comm.join import join as join
    from rankwise.config import TrainConfig as TrainConfig
    from rankwise.evaluation.trained import load as load
    from rankwise.ledger.regions import region as region
    from rankwise.runs.folder import RunFolder as RunFolder
    from rankwise.runs.record import Record as Record
    from rankwise.training.build import synchronise as synchronise
    from rankwise.training.synchroniser import Synchroniser as Synchroniser

_HOMES = {
    "Record": "rankwise.runs.record",
    "Run": "rankwise.api",
    "RunFolder": "rankwise.runs.folder",
    "Synchroniser": "rankwise.training.synchroniser",
    "TrainConfig": "rankwise.config",
    "World": "rankwise.comm",
    "join": "rankwise.comm.join",
    "load": "rankwise.evaluation.trained",
    "region": "rankwise.ledger.regions",
    "run_in_threads": "rankwise.comm",
    "synchronise": "rankwise.training.build",
    "train": "rankwise.api",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    # Each name is loaded when it is first used, so that the command line starts at once.
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
