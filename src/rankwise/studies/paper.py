"""What the paper measured: "Enhancing CNN Training on CIFAR-10 Through MPI Parallelization".

One 8-core i7-9800X; 25 epochs where nothing else is said. Accuracies are fractions, times seconds, CPU
use percent of all cores.
"""

from __future__ import annotations

from dataclasses import dataclass

CORES = 8
"""Of its machine."""

EPOCHS = 25
"""Of all its experiments but the baseline and replication."""


@dataclass(frozen=True)
class Result:
    """A row of its tables."""

    accuracy: float
    val_loss: float
    time_s: float
    cpu_percent: float


TABLE_1 = {
    3: Result(0.644, 1.04, 375, 55.4),
    4: Result(0.6305, 1.05, 794, 77.8),
    5: Result(0.6093, 1.10, 1127, 89.4),
    6: Result(0.5941, 1.16, 1386, 96.9),
    7: Result(0.5795, 1.18, 1528, 99.5),
    8: Result(0.5528, 1.25, 1642, 99.9),
}
"""By the number of processes, at batch 16 (the default of its code)."""

TABLE_2 = {
    1: Result(0.5654, 1.30, 1332, 69.3),
    2: Result(0.613, 1.18, 734, 72.8),
    4: Result(0.6348, 1.10, 578, 73.5),
    8: Result(0.6519, 1.03, 591, 77.6),
    16: Result(0.6359, 1.04, 761, 77.7),
    32: Result(0.5768, 1.19, 1034, 75.5),
    64: Result(0.5086, 1.35, 1129, 71.8),
}
"""By the batch size, with 4 processes. Batch 16 is the setting of 4 processes in Table 1, run once more."""

BASELINE = Result(0.636, 1.07, 12 * 60, 97.6)
"""Section 5.1: one process, batch 4, 15 epochs; "around 12 minutes"; loss and accuracy "at epoch 6"."""

BASELINE_BEST_EPOCH = 6
BASELINE_EPOCHS = 15

REPLICATION = Result(0.6606, 0.99, 23 * 60, 79.0)
"""Section 5.2: 4 processes, 15 epochs; "under 23 minutes"."""


@dataclass(frozen=True)
class Stopwatches:
    """What its code's stopwatches showed at the end of a run, in seconds: a row of Figure 2.

    Training and its loading are one worker's, evaluation and its loading the master's.
    """

    train_loading_s: float
    training_s: float
    worker_communication_s: float
    test_loading_s: float
    evaluation_s: float
    master_communication_s: float


FIGURE_2 = {
    3: Stopwatches(4.3, 316.5, 0.16, 1.9, 56.5, 0.18),
    4: Stopwatches(6.2, 734.6, 0.23, 2.6, 56.7, 0.26),
    5: Stopwatches(8.5, 1063.1, 0.32, 3.3, 57.3, 0.36),
    6: Stopwatches(11.9, 1322.0, 0.38, 4.6, 57.8, 0.51),
    7: Stopwatches(15.2, 1455.1, 0.71, 5.9, 57.1, 0.59),
    8: Stopwatches(18.5, 1566.3, 0.69, 7.8, 58.0, 0.78),
}
"""By the number of processes; from the log files that were published with its code."""
