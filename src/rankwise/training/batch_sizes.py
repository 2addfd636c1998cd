"""How large each worker's batches are, so that fast workers do not wait for slow ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rankwise.comm import World
from rankwise.config import TrainConfig
from rankwise.data.partition import apportion
from rankwise.errors import ConfigError
from rankwise.strategies import entry_of

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

ALIKE = 1.1
"""Where no worker is faster than another by this factor, all get equal batches: the difference is noise."""


def check(config: TrainConfig) -> None:
    """Raises ConfigError, one line, if `--balance` does not fit the resolved configuration."""
    if config.balance == "none":
        return
    what = f"--balance {config.balance} was given, but"
    entry = entry_of(str(config.strategy))
    if entry.replicates:
        raise ConfigError(f"{what} with --strategy {config.strategy} every worker trains on all samples")
    if not entry.strategy.weighs_samples:
        raise ConfigError(f"{what} the mean of --strategy {config.strategy} counts every rank alike")
    if config.shards.startswith("dirichlet"):
        raise ConfigError(f"{what} the shards of --shards {config.shards} are uneven by themselves")
    if config.balance == "measured":
        return
    words = config.balance.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{what} expected none, measured, or the batch of each worker, e.g. 24,8")
    if len(words) != config.workers:
        raise ConfigError(f"{what} there are {config.workers} workers, and it names {len(words)} batches")


def batch_sizes(config: TrainConfig) -> list[int]:
    """Samples per step of each worker, for a resolved configuration whose balance is no longer to be
    measured."""
    if config.balance in ("none", "measured"):
        return [config.batch_size] * config.workers
    return [int(word) for word in config.balance.split(",")]


def choose_batch_sizes(
    config: TrainConfig,
    replica: Replica,
    world: World,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    say: Callable[[str], None],
) -> TrainConfig:
    """The configuration with the batches of `--balance measured` filled in; all ranks together.

    All workers measure a step on blank images at the same time, so that those that share a memory or a
    processor are as slow as in training. The replica stays as it is.
    """
    if config.balance != "measured":
        return config
    first = int(config.has_master)
    works = first <= world.rank < config.ranks
    world.barrier()
    mine_s = _step_s(config, replica, image_shape, classes) if works else 0.0
    times_s: list[float] = world.allgather_object(mine_s)[first : config.ranks]
    sizes = sizes_by_speed(config.batch_size, times_s)
    fastest_ms, slowest_ms = 1000 * min(times_s), 1000 * max(times_s)
    say(
        f"a step of {config.batch_size} samples takes {fastest_ms:.3g} to {slowest_ms:.3g} ms: batches of "
        + ", ".join(map(str, sizes))
    )
    return config.model_copy(update={"balance": ",".join(map(str, sizes))})


def sizes_by_speed(batch_size: int, step_s: Sequence[float]) -> list[int]:
    """Batch sizes in proportion to the speed of workers, whose steps took `step_s` seconds with the same
    batch; the sum is that of equal batches."""
    if max(step_s) <= ALIKE * min(step_s):
        return [batch_size] * len(step_s)
    speeds = [1 / seconds for seconds in step_s]
    return [int(size) for size in apportion(batch_size * len(step_s), speeds, least=1)]


def _step_s(config: TrainConfig, replica: Replica, image_shape: tuple[int, int, int], classes: int) -> float:
    """The seconds that a step of this rank takes; the replica is as before."""
    from rankwise.models.blank import blank_batch, median_step_s

    before = replica.snapshot()
    batch = blank_batch(image_shape, classes, config.batch_size)
    took_s = median_step_s(replica.module, replica.optimizer, batch, config.precision)
    before.restore()
    replica.optimizer.zero_grad()
    return took_s
