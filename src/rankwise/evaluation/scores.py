"""How a network does on images: accuracy, loss, each class, and which is taken for which."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.data.dataset import Report
from rankwise.errors import DataError
from rankwise.evaluation.subjects import Subject
from rankwise.evaluation.trained import TrainedRun
from rankwise.models.evaluation import score
from rankwise.models.precision import autocast

TOP = 5
"""Classes that are told of an image whose class is not known, the likeliest ones."""


@dataclass(frozen=True)
class ClassScores:
    """One class: how many images are of it, and what part of them was found (`recall`); how many were taken
    for it, and what part of those rightly (`precision`). None where there are none."""

    name: str
    samples: int
    taken: int
    recall: float | None
    precision: float | None


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of images whose classes are known. `confusion` [true, taken for] counts them."""

    subject: str
    samples: int
    loss: float
    classes: tuple[str, ...]
    confusion: NDArray[np.int64]

    @property
    def accuracy(self) -> float:
        """The fraction whose class was found."""
        return float(np.trace(self.confusion) / self.samples)

    @property
    def by_class(self) -> list[ClassScores]:
        """Each class, in the network's order."""
        right, of, taken = self.confusion.diagonal(), self.confusion.sum(1), self.confusion.sum(0)
        return [
            ClassScores(
                name,
                int(of[at]),
                int(taken[at]),
                float(right[at] / of[at]) if of[at] else None,
                float(right[at] / taken[at]) if taken[at] else None,
            )
            for at, name in enumerate(self.classes)
        ]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {
            "samples": self.samples,
            "accuracy": self.accuracy,
            "loss": self.loss,
            "classes": [vars(each) for each in self.by_class],
            "confusion": self.confusion.tolist(),
        }


@dataclass(frozen=True)
class Guess:
    """What a network takes an image for: its likeliest classes with their probabilities, the first of them
    first."""

    file: str
    top: tuple[tuple[str, float], ...]

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        name, probability = self.top[0]
        return {"file": self.file, "class": name, "probability": probability, "top": dict(self.top)}


def evaluate(run: TrainedRun, model: nn.Module, subject: Subject, report: Report) -> Evaluation:
    """Of images whose classes are known, with the options that the run was evaluated with (precision, --tta).
    `report` is told how far it is. Raises DataError if the loss is no number."""
    classes = len(run.seen.classes)
    confusion = np.zeros((classes, classes), np.int64)
    loss = 0.0
    for scores, labels in _scores(run, model, subject, report):
        assert labels is not None, "images of known classes"
        loss += F.cross_entropy(scores, labels, reduction="sum").item()
        pairs = labels.numpy() * classes + scores.argmax(1).numpy()
        confusion += np.bincount(pairs, minlength=classes**2).reshape(classes, classes)
    if not np.isfinite(loss):
        raise DataError(f"the network of {run.path} gives scores that are no numbers: evaluate another epoch")
    return Evaluation(subject.name, subject.count, loss / subject.count, run.seen.classes, confusion)


def guess(run: TrainedRun, model: nn.Module, subject: Subject, report: Report) -> list[Guess]:
    """Of images of which nobody has said what they are."""
    found: list[Guess] = []
    for scores, _ in _scores(run, model, subject, report):
        chances = scores.float().softmax(1)
        for row in chances:
            values, places = row.topk(min(TOP, len(row)))
            top = tuple(
                (run.seen.classes[at], value)
                for at, value in zip(places.tolist(), values.tolist(), strict=True)
            )
            found.append(Guess(subject.files[len(found)], top))
    return found


def _scores(
    run: TrainedRun, model: nn.Module, subject: Subject, report: Report
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The scores of each batch, and its classes, if they are known."""
    done = 0
    plan = run.plan
    tta = plan.tta if run.weights.epoch is None or run.weights.epoch >= plan.tta_from_epoch else "none"
    for images, labels in subject.batches():
        report(f"evaluating {subject.name}", done, subject.count)
        with torch.no_grad(), autocast(plan.precision):
            scores = score(model, images, tta, plan.tta_below)
        yield scores, labels
        done += len(images)
        report(f"evaluating {subject.name}", done, subject.count)
