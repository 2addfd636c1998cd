"""What of a plan depends on the dataset, looked at before a rank is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankwise import data
from rankwise.data.selection import select
from rankwise.errors import ConfigError
from rankwise.plan import RunPlan


@dataclass(frozen=True)
class PreparedRun:
    """A run that can start: its plan, and how many samples an epoch trains."""

    plan: RunPlan
    samples_per_epoch: int


def prepare(plan: RunPlan, on_progress: Callable[[str, int, int], None] | None = None) -> PreparedRun:
    """Decode the dataset if it is not yet in the cache, and check the plan against it.

    Raises UsageError, one line, for a dataset that is missing or damaged, too small for the workers, or not
    what the options expect.
    """
    dataset = data.prepare(
        plan.dataset, data_dir=plan.data_dir, cache_dir=plan.cache_dir, on_progress=on_progress
    )
    if plan.classes not in (None, len(dataset.classes)):
        raise ConfigError(
            f"--classes {plan.classes} was given, by the recipe or by you, but {plan.dataset} has "
            f"{len(dataset.classes)}: use another recipe, or --classes {len(dataset.classes)} to try this one"
        )
    height = dataset.image_shape[1]
    if any(smaller >= height for smaller, _ in plan.resizing.stages):
        raise ConfigError(
            f"--resize {plan.resize} was given, but images of {plan.dataset} have a height of "
            f"{height} pixels: expected fewer"
        )
    samples = len(select(plan, dataset, workers=plan.workers).train_pool)
    return PreparedRun(plan, samples * (plan.workers if plan.entry.replicates else 1))
