"""The records of a study, by trial and seed, and what is read from one record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.record import Record
from rankwise.studies.plan import Scale, Trial
from rankwise.studies.statistics import Contrast, Estimate, accuracy_difference, estimate, time_ratio

Measure = Callable[[Record], float]


def best_accuracy(record: Record) -> float:
    """The highest validation accuracy of all epochs (fraction)."""
    return max(row.val_accuracy for row in record.epochs)


def last_accuracy(record: Record) -> float:
    """The validation accuracy after the last epoch (fraction)."""
    return record.epochs[-1].val_accuracy


def lowest_loss(record: Record) -> float:
    """The lowest validation loss of all epochs."""
    return min(row.val_loss for row in record.epochs)


def loss_gap(record: Record) -> float:
    """By how much the validation loss is above the training loss in the last epoch: overfitting."""
    return record.epochs[-1].val_loss - record.epochs[-1].train_loss


def total_s(record: Record) -> float:
    """Seconds of all epochs, evaluation included and start-up not, as the paper counts."""
    return sum(row.wall_s for row in record.epochs)


def epoch_s(record: Record) -> float:
    """Seconds of the mean epoch."""
    return total_s(record) / len(record.epochs)


def cpu_percent(record: Record) -> float:
    """CPU use of the run, in percent of all cores."""
    return record.cpu_percent


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
        found = self.records.get(trial.name, {})
        return [found[seed] for seed in sorted(found)]

    def by_seed(self, trials: Sequence[Trial], measure: Measure) -> dict[int, float]:
        """For each seed that all `trials` have finished: the mean of the measure over them."""
        found = [self.records.get(trial.name, {}) for trial in trials]
        seeds = set.intersection(*(set(records) for records in found)) if found else set()
        return {seed: sum(measure(records[seed]) for records in found) / len(found) for seed in sorted(seeds)}

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
        """How many times as long `ours` take (means over several turns); None without both."""
        one, two = self._paired(ours, others, measure)
        return time_ratio(one, two) if one else None

    def _paired(
        self, ours: Sequence[Trial], others: Sequence[Trial], measure: Measure
    ) -> tuple[list[float], list[float]]:
        one, two = self.by_seed(ours, measure), self.by_seed(others, measure)
        seeds = sorted(set(one) & set(two))
        return [one[seed] for seed in seeds], [two[seed] for seed in seeds]
