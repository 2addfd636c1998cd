"""How large each worker's batches are, so that fast workers do not wait for slow ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rankwise.comm import World
from rankwise.data.partition import apportion
from rankwise.plan import RunPlan

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

ALIKE = 1.1
"""Where no worker is faster than another by this factor, all get equal batches: the difference is noise."""


def choose_batch_sizes(
    plan: RunPlan,
    replica: Replica,
    world: World,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    say: Callable[[str], None],
) -> tuple[int, ...]:
    """Samples in a step of each worker, measured if the plan leaves them open; all ranks call it.

    All workers measure a step on blank images at the same time, so that those that share a memory or a
    processor are as slow as in training. The replica stays as it is. One that cannot train on a single sample
    gets batches of two or more, unless equal ones are of one.
    """
    least = 2 if replica.needs_pairs else 1
    if plan.balance != "measured" or plan.batch_size < least:
        return plan.batch_sizes
    first = int(plan.has_master)
    works = first <= world.rank < plan.ranks
    world.barrier()
    mine_s = _step_s(plan, replica, image_shape, classes) if works else 0.0
    times_s: list[float] = world.allgather_object(mine_s)[first : plan.ranks]
    sizes = sizes_by_speed(plan.batch_size, times_s, least=least)
    fastest_ms, slowest_ms = 1000 * min(times_s), 1000 * max(times_s)
    say(
        f"a step of {plan.batch_size} samples takes {fastest_ms:.3g} to {slowest_ms:.3g} ms: batches of "
        + ", ".join(map(str, sizes))
    )
    return tuple(sizes)


def sizes_by_speed(batch_size: int, step_s: Sequence[float], *, least: int = 1) -> list[int]:
    """Batch sizes in proportion to the speed of workers, whose steps took `step_s` seconds with the same
    batch, but none of fewer samples than `least`; the sum is that of equal batches."""
    if max(step_s) <= ALIKE * min(step_s):
        return [batch_size] * len(step_s)
    speeds = [1 / seconds for seconds in step_s]
    return [int(size) for size in apportion(batch_size * len(step_s), speeds, least=least)]


def _step_s(plan: RunPlan, replica: Replica, image_shape: tuple[int, int, int], classes: int) -> float:
    """The seconds that a step of this rank takes; the replica is as before."""
    from rankwise.models.blank import blank_batch, median_step_s

    before = replica.snapshot()
    batch = blank_batch(image_shape, classes, plan.batch_size)
    took_s = median_step_s(replica.module, replica.optimizer, batch, plan.precision)
    before.restore()
    replica.optimizer.zero_grad()
    return took_s
