"""The records of a study, by trial and seed, and what is read from one record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.runs.record import Epoch, Record
from rankwise.studies.plan import Scale, Trial
from rankwise.studies.statistics import Contrast, Estimate, accuracy_difference, estimate, time_ratio

Measure = Callable[[Record], float]


def best_accuracy(record: Record) -> float:
    """The highest validation accuracy of all epochs (fraction)."""
    return record.best.val_accuracy


def last_accuracy(record: Record) -> float:
    """The validation accuracy after the last epoch (fraction)."""
    return record.evaluated[-1].val_accuracy


def lowest_loss(record: Record) -> float:
    """The lowest validation loss of all epochs."""
    return min(_losses(record))


def last_loss(record: Record) -> float:
    """The validation loss after the last epoch."""
    return _losses(record)[-1]


def _losses(record: Record) -> list[float]:
    return [row.val_loss for row in record.epochs if row.val_loss is not None]


def train_loss(row: Epoch) -> float:
    """The training loss of an epoch, nan if it is not known."""
    return math.nan if row.train_loss is None else row.train_loss


def loss_gap(record: Record) -> float:
    """By how much the validation loss is above the training loss in the last epoch: overfitting."""
    return last_loss(record) - train_loss(record.epochs[-1])


def total_s(record: Record) -> float:
    """Seconds of all epochs, evaluation included and start-up not, as the paper counts."""
    return sum(row.wall_s for row in record.epochs)


def epoch_s(record: Record) -> float:
    """Seconds of the mean epoch."""
    return total_s(record) / len(record.epochs)


def cpu_percent(record: Record) -> float:
    """CPU use of the run, in percent of all cores."""
    return record.cpu_percent


def last_gain(ours: Sequence[Record], others: Sequence[Record], val_samples: int) -> Contrast:
    """By how much `ours` are more accurate after the last epoch, both in the order of the same seeds."""
    return accuracy_difference(
        [last_accuracy(record) for record in ours], [last_accuracy(record) for record in others], val_samples
    )


@dataclass(frozen=True)
class Results:
    """Finished runs: `records` by the trial's name and then by seed.

    `val_samples` is the size of the validation set.
    """

    scale: Scale
    val_samples: int
    records: Mapping[str, Mapping[int, Record]]

    def of(self, trial: Trial) -> list[Record]:
        """The records of a trial in the order of seeds; empty if none is finished."""
        found = self._by_seed(trial)
        return [found[seed] for seed in sorted(found)]

    def estimate(self, trial: Trial, measure: Measure) -> Estimate | None:
        """The measure over the seeds of a trial, None if no run is finished."""
        values = [measure(record) for record in self.of(trial)]
        return estimate(values) if values else None

    def gain(self, ours: Trial, other: Trial) -> Contrast | None:
        """By how much `ours` is more accurate (best epoch, fraction); None without both."""
        one, two = self._paired([ours], [other], best_accuracy)
        return accuracy_difference(one, two, self.val_samples) if one else None

    def slowdown(
        self, ours: Sequence[Trial], others: Sequence[Trial], measure: Measure = epoch_s
    ) -> Contrast | None:
        """How many times as long `ours` take, turn by turn and seed by seed; None without both."""
        one, two = self._paired(ours, others, measure)
        return time_ratio(one, two) if one else None

    def _paired(
        self, ours: Sequence[Trial], others: Sequence[Trial], measure: Measure
    ) -> tuple[list[float], list[float]]:
        pairs = [
            (measure(mine[seed]), measure(theirs[seed]))
            for mine, theirs in zip(map(self._by_seed, ours), map(self._by_seed, others), strict=True)
            for seed in sorted(set(mine) & set(theirs))
        ]
        return [one for one, _ in pairs], [two for _, two in pairs]

    def _by_seed(self, trial: Trial) -> Mapping[int, Record]:
        return self.records.get(trial.name, {})
