"""torch.compile for the model in training: tried first, and left out where it fails or does not pay."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from rankwise.comm import World
from rankwise.errors import one_line
from rankwise.models.blank import blank_batch, make_gradients, median_step_s
from rankwise.models.replica import Replica
from rankwise.plan import RunPlan

SHORT_S = 300.0
"""Training shorter than this is compiled only if asked for: compiling takes half a minute, and saves little
of each step."""

PAYS = 0.95
"""`auto` keeps the compiled model if its step takes less than this part of a plain one."""


@dataclass(frozen=True)
class _Trial:
    """Seconds per step as it is and compiled, and of compiling; or why it could not be compiled."""

    plain_s: float
    compiled_s: float = 0.0
    compiling_s: float = 0.0
    error: str = ""


def choose_compile(
    plan: RunPlan,
    replica: Replica,
    world: World,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    samples: int,
    say: Callable[[str], None],
) -> bool:
    """Decide whether the loop calls a compiled model from here on; all ranks together, with one answer.

    ``on`` compiles if that works here, ``auto`` if training on `samples` per epoch takes long and a compiled
    step turns out to be faster on each rank. Both are tried on blank images, and leave the replica as it was.
    """
    if plan.compile == "off":
        return False
    # Ranks that are threads share torch's generator: none draws from it before all have their weights.
    world.barrier()
    trains = not (plan.has_master and world.rank == 0)
    before, snapshot = replica.module, replica.snapshot()
    sizes = [plan.batch_size, *([plan.batch_size - 1] if plan.batch_size > 2 else [])]
    batches = [blank_batch(image_shape, classes, size) for size in sizes]

    def step_s() -> float:
        return median_step_s(replica.module, replica.optimizer, batches[0], plan.precision)

    mine = _Trial(step_s() if trains else 0.0)
    plain_s = max(trial.plain_s for trial in world.allgather_object(mine))
    training_s = plain_s * plan.epochs * samples / (plan.workers * plan.batch_size)
    short = plan.compile == "auto" and training_s < SHORT_S
    if trains and not short:
        start_s = time.perf_counter()
        try:
            replica.module = torch.compile(replica.model)  # type: ignore[assignment]  # a module gives a module
            for batch in batches:  # the second compiles for all sizes, which last batches need
                make_gradients(replica.module, replica.optimizer, batch, plan.precision)
            compiling_s = time.perf_counter() - start_s
            mine = _Trial(mine.plain_s, step_s(), compiling_s)
        except Exception as error:  # whatever it is: the model itself has just worked
            mine = _Trial(mine.plain_s, error=f"{type(error).__name__}: {one_line(error)[:200]}")
    snapshot.restore()
    replica.optimizer.zero_grad()
    keeps, why = (
        (False, f"training takes about {training_s:.0f} s, too short for it")
        if short
        else _judge(world.allgather_object(mine), auto=plan.compile == "auto")
    )
    if not keeps:
        replica.module = before
    say(f"--compile {plan.compile}: {why}")
    return keeps


def _judge(trials: list[_Trial], *, auto: bool) -> tuple[bool, str]:
    """Whether compiled models are kept, and why, from the trials of all ranks."""
    errors = [trial.error for trial in trials if trial.error]
    if errors:
        return False, f"the model cannot be compiled here, and trains as it is ({errors[0]})"
    slowest = max(trials, key=lambda trial: trial.compiled_s)
    times = (
        f"a step takes {1e3 * slowest.compiled_s:.2f} ms compiled, {1e3 * slowest.plain_s:.2f} ms as it is; "
        f"compiling took {max(trial.compiling_s for trial in trials):.0f} s"
    )
    pays = all(trial.compiled_s < PAYS * trial.plain_s for trial in trials if trial.plain_s)
    if auto and not pays:
        return False, f"does not pay: {times}"
    return True, times
