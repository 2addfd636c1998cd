"""Data-parallel training over MPI, on CPUs first, that accounts for every second of every rank.

    import rankwise
    record = rankwise.train(rankwise.TrainConfig(dataset="digits", ranks=3, lr=0.02, epochs=10))

does what ``rankwise train --dataset digits --ranks 3 --lr 0.02 --epochs 10`` does. A loop of your own
is put in step with `join` and `synchronise`. Importing this package starts no MPI and loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.api import train as train
    from rankwise.comm import World as World
    from rankwise.comm import run_in_threads as run_in_threads
    from rankwise.comm.join import join as join
    from rankwise.config import TrainConfig as TrainConfig
    from rankwise.runs.folder import RunFolder as RunFolder
    from rankwise.runs.record import Record as Record
    from rankwise.training.build import synchronise as synchronise
    from rankwise.training.synchroniser import Synchroniser as Synchroniser

_HOMES = {
    "Record": "rankwise.runs.record",
    "RunFolder": "rankwise.runs.folder",
    "Synchroniser": "rankwise.training.synchroniser",
    "TrainConfig": "rankwise.config",
    "World": "rankwise.comm",
    "join": "rankwise.comm.join",
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
