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
    from rankwise.config import TrainConfig as TrainConfig
    from rankwise.record import Record as Record
    from rankwise.record import RunFolder as RunFolder
    from rankwise.strategies.assembly import synchronise as synchronise
    from rankwise.strategies.synchroniser import Synchroniser as Synchroniser
    from rankwise.world import World as World
    from rankwise.world import run_in_threads as run_in_threads
    from rankwise.world.join import join as join

_HOMES = {
    "Record": "rankwise.record",
    "RunFolder": "rankwise.record",
    "Synchroniser": "rankwise.strategies.synchroniser",
    "TrainConfig": "rankwise.config",
    "World": "rankwise.world",
    "join": "rankwise.world.join",
    "run_in_threads": "rankwise.world",
    "synchronise": "rankwise.strategies.assembly",
    "train": "rankwise.api",
}

__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    # Each name is loaded when it is first used, so that the command line starts at once.
    if name not in _HOMES:
        raise AttributeError(f"module 'rankwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
