"""One rank of many small trainings, of each strategy and compression; rank 0 says ok if all was well."""

from __future__ import annotations

import numpy as np
import torch

from rankwise.comm import World, join
from rankwise.config import TrainConfig
from rankwise.plan import resolve
from rankwise.strategies import STRATEGIES

from .loops import SAMPLES, train
from .test_contract import COMPRESSIONS, few


def check(world: World, name: str, **options: str) -> None:
    """Raise AssertionError unless a training came to its end as it should."""
    result = train(world, 2, strategy=name, **options)
    config = resolve(TrainConfig(ranks=world.size, strategy=name))
    told = world.allgather_object((result.ranks.state.committed, result.weights))
    copies = config.workers if STRATEGIES[name].replicates else 1
    assert sum(committed for committed, _ in told) == 2 * SAMPLES * copies, name
    if name not in ("easgd", "downpour"):
        assert all(np.array_equal(weights, told[0][1]) for _, weights in told), (name, options)


def main() -> None:
    world = join()
    torch.set_num_threads(1)
    for name, entry in STRATEGIES.items():
        if world.size < few(name) or (name == "single" and world.size > 1):
            continue
        check(world, name)
        for compress in COMPRESSIONS if entry.takes("compress") else ():
            check(world, name, compress=compress)
    world.reconcile()
    totals = world.ledger.close()
    assert sum(totals.phases_ns.values()) == totals.wall_ns
    assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
    if world.rank == 0:
        print("ok", flush=True)


if __name__ == "__main__":
    main()
