"""What of a plan depends on the dataset, looked at before a rank is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankwise import data
from rankwise.data.selection import select
from rankwise.errors import ConfigError
from rankwise.plan import RunPlan
from rankwise.system import limits


@dataclass(frozen=True)
class PreparedRun:
    """A run that can start: its plan, and how many epochs there are and samples in each; 0 if a program
    says that itself."""

    plan: RunPlan
    epochs: int
    samples_per_epoch: int


def prepare(plan: RunPlan, on_progress: Callable[[str, int, int], None] | None = None) -> PreparedRun:
    """Decode the dataset if it is not yet in the cache, and check the plan against it.

    Raises UsageError, one line, for a dataset that is missing or damaged, too small for the workers, or not
    what the options expect.
    """
    dataset = data.prepare_of(plan, on_progress)
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
    return PreparedRun(plan, plan.epochs, samples * (plan.workers if plan.entry.replicates else 1))


def remarks(plan: RunPlan) -> list[str]:
    """What may go wrong on this machine, a line each."""
    line = limits.shared_memory_short(plan.processes) if plan.processes > 1 and plan.hosts is None else None
    return [line] if line else []
