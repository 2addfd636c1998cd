"""The network of a run, with its trained weights, on one process and without MPI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise import data, models
from rankwise.errors import ConfigError, ModelError, ResumeError
from rankwise.plan import RunPlan, recorded_plan
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record, Seen
from rankwise.runs.weights import Weights, Which, find_weights

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TrainedRun:
    """A run as far as its network is concerned: the plan it was trained by, the images it has seen, and the
    weights that are asked for."""

    path: Path
    plan: RunPlan
    seen: Seen
    weights: Weights

    def module(self) -> nn.Module:
        """The network with the weights, in evaluation mode. Raises ModelError if it cannot be built here, or
        they do not fit it."""
        channels, height, width = self.seen.image_shape
        try:
            model = models.build(self.plan.model, (channels, height, width), len(self.seen.classes))
        except ModelError as error:
            if self.plan.model in models.MODELS:
                raise
            raise ModelError(
                f"{error}; the run in {self.path} trained it: go to the folder in which that was started"
            ) from error
        self.weights.load_into(model, self.plan.model)
        return model.eval()


def trained_run(path: Path, which: Which = "newest") -> TrainedRun:
    """The run in a folder. Raises UsageError, one line, for what is no run of a network of images, or has no
    weights."""
    record = RunFolder(path).read()
    require_network(record, path)
    weights = find_weights(path, which)
    plan = recorded_plan(record.config)
    seen = record.seen or _seen_again(plan, path)
    return TrainedRun(path, plan, seen, weights)


def require_network(record: Record, path: Path) -> None:
    """Raises ResumeError for a program's run, whose networks are its own."""
    if record.is_of_calls:
        raise ResumeError(f"{path} holds a program that made no rankwise.Run, so it has trained no network")
    if record.config.get("program"):
        raise ResumeError(
            f"{path} holds the run of a program, {record.config['model']}, which makes its network itself: "
            "build it as the program does, and give it the weights by rankwise.load(RUN, model=network)"
        )


def load(path: Path | str, *, checkpoint: Which = "newest", model: nn.Module | None = None) -> nn.Module:
    """The network of a run with its trained weights: a plain torch module in evaluation mode, without MPI.

    `path` is the run's folder. `checkpoint` is ``"newest"``, ``"best"`` (by validation accuracy; train with
    `--keep best`) or the number of an epoch. Weights are those that the run evaluated: with
    `--averaged-weights` their average. A network of your own, `module:callable`, is imported from the current
    folder, as in `rankwise train`; that of a program of `rankwise run` is `model`, as the program builds it.
    Images are float32 [samples, channels, height, width], scaled to [-1, 1]: ``pixels / 127.5 - 1``. Raises
    UsageError, one line, if there are no weights, or they do not fit.
    """
    path = Path(path)
    if model is None:
        return trained_run(path, checkpoint).module()
    weights = find_weights(path, checkpoint)
    weights.load_into(model, type(model).__name__, part=_part_of(weights, model))
    return model.eval()


def _part_of(weights: Weights, model: nn.Module) -> str:
    """What the names of this model's tensors begin with: a program's checkpoint holds all its models."""
    tensors, _ = weights.read()
    names = [name for name in model.state_dict() if name not in tensors]
    if not names:
        return ""
    parts = dict.fromkeys(f"{name.partition('.')[0]}." for name in tensors)
    fitting = [part for part in parts if all(part + name in tensors for name in names)]
    return fitting[0] if len(fitting) == 1 else ""


def _seen_again(plan: RunPlan, path: Path) -> Seen:
    """What a run of a version that did not write it down has seen."""
    try:
        dataset = data.prepare_of(plan)
    except ConfigError as error:
        raise ResumeError(f"{path} was trained by a version that did not note its images: {error}") from error
    return Seen.of(dataset)
