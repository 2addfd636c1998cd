"""Which runs each experiment of the paper needs, with the paper's settings (its sections 4 and 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rankwise.plan import RunPlan

Options = dict[str, Any]

PAPER: Options = {
    "model": "paper-cnn",
    "optimizer": "sgd",
    "lr": 0.001,
    "momentum": 0.9,
    "threads": "auto",
}
"""What all runs share. The paper gives every process every core; that is compared in `timing`."""

AVERAGED: Options = PAPER | {
    "strategy": "parameter-averaging",
    "topology": "master",
    "shards": "fixed",
    "optimizer_state": "reset",
    "batch_size": 16,
}
"""Its data parallelism: fixed shards, a master that averages each epoch, a new optimiser each epoch."""


@dataclass(frozen=True)
class Trial:
    """One setting to train with. Its name follows from its options, so experiments share trials.

    `options` are those of `rankwise train`, without the dataset, the seed and the folder. `turn`
    tells apart measurements of the same options at different times.
    """

    options: Options
    turn: int = 1

    @property
    def name(self) -> str:
        """Unique among the trials of a study, and fit for a file."""
        given = self.options
        strategy = str(given["strategy"]).replace("parameter-averaging", "averaging")
        words = [strategy, f"r{given['ranks']}", f"b{given['batch_size']}", f"e{given['epochs']}"]
        words += ["redealt"] * (given.get("shards") == "redealt")
        words += ["all-threads"] * (given["threads"] == "all")
        words += [f"n{given.get('train_limit')}"] if given.get("train_limit") else []
        words += [f"turn{self.turn}"] * (self.turn > 1)
        return "-".join(words)


@dataclass(frozen=True)
class Scale:
    """How far the experiments go. The defaults are the paper's, and what the questions on it need.

    `quick` marks a short form, whose results tell nothing about accuracy. `limits` are options that
    every run gets.
    """

    quick: bool = False
    limits: Options = field(default_factory=dict)
    baseline_epochs: int = 15
    epochs: int = 25
    processes: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    redealt: tuple[int, ...] = (3, 4, 6, 8)
    as_many_updates: tuple[tuple[int, str], ...] = ((5, "fixed"), (8, "fixed"), (8, "redealt"))
    turns: int = 3
    timing_epochs: int = 3
    stopwatch: tuple[int, ...] = (4, 8)
    threads: tuple[int, ...] = (3, 4, 6, 8)
    threads_epochs: int = 2
    threads_limits: Options = field(default_factory=lambda: {"train_limit": 2500, "val_limit": 500})
    """With all cores for every process a step can take half a second on 2 cores: a part must do."""

    def alone(self) -> Trial:
        """The baseline: one process, batch 4, 15 epochs."""
        options = PAPER | {"strategy": "single", "batch_size": 4, "epochs": self.baseline_epochs}
        return self._trial(1, options)

    def replication(self) -> Trial:
        """Three workers that each train on all samples, 15 epochs."""
        options = AVERAGED | {"strategy": "replication", "epochs": self.baseline_epochs}
        return self._trial(4, options)

    def averaging(self, ranks: int, *, batch_size: int = 16, shards: str = "fixed") -> Trial:
        """Data parallelism as in Tables 1 and 2, 25 epochs."""
        options = AVERAGED | {"batch_size": batch_size, "shards": shards, "epochs": self.epochs}
        return self._trial(ranks, options)

    def with_as_many_updates(self, ranks: int, shards: str) -> Trial:
        """As many epochs as it takes for each worker to make as many steps as one of 3 processes in the
        paper's 25.

        A worker of N processes has 1 / (N - 1) of the samples, so an epoch has 2 / (N - 1) of the steps.
        """
        epochs = math.ceil(self.epochs * (ranks - 1) / 2)
        return self._trial(ranks, AVERAGED | {"shards": shards, "epochs": epochs})

    def timed_turns(self, ranks: int) -> list[Trial]:
        """A few epochs for their time alone, once a turn; one rank is the single process at batch 16."""
        options = AVERAGED if ranks > 1 else PAPER | {"strategy": "single", "batch_size": 16}
        return self._turns(ranks, options | {"epochs": self.timing_epochs})

    def threads_turns(self, ranks: int, threads: str) -> list[Trial]:
        """A part of the samples with the cores shared out (auto), or all cores for every process (all)."""
        options = AVERAGED | {"epochs": self.threads_epochs, "threads": threads}
        return self._turns(ranks, options | self.threads_limits)

    def stopwatch_run(self, ranks: int) -> Trial:
        """The author's own exchange, with his stopwatches where he had them."""
        options = AVERAGED | {"strategy": "paper-stopwatch", "epochs": self.timing_epochs}
        return self._trial(ranks, options)

    def _turns(self, ranks: int, options: Options) -> list[Trial]:
        return [self._trial(ranks, options, turn) for turn in range(1, self.turns + 1)]

    def _trial(self, ranks: int, options: Options, turn: int = 1) -> Trial:
        return Trial(self.limits | options | {"ranks": ranks}, turn)


FULL = Scale()

QUICK = Scale(
    quick=True,
    limits={"train_limit": 2000, "val_limit": 500},
    baseline_epochs=2,
    epochs=2,
    processes=(3, 4, 8),
    batch_sizes=(8, 16, 64),
    redealt=(8,),
    as_many_updates=((8, "fixed"),),
    turns=1,
    timing_epochs=2,
    stopwatch=(4,),
    threads=(3, 8),
    threads_limits={"train_limit": 400, "val_limit": 100},
)
"""A few minutes, to see what the study does; too short to judge the paper by."""


def _baseline(scale: Scale) -> list[Trial]:
    return [scale.alone()]


def _replication(scale: Scale) -> list[Trial]:
    return [scale.alone(), scale.replication()]


def _processes(scale: Scale) -> list[Trial]:
    same_epochs = [scale.averaging(ranks) for ranks in scale.processes]
    dealt_anew = [scale.averaging(ranks, shards="redealt") for ranks in scale.redealt]
    same_updates = [scale.with_as_many_updates(*setting) for setting in scale.as_many_updates]
    return [scale.alone(), *same_epochs, *dealt_anew, *same_updates]


def _batch_size(scale: Scale) -> list[Trial]:
    return [scale.averaging(4, batch_size=size) for size in scale.batch_sizes]


def _timing(scale: Scale) -> list[Trial]:
    # What is compared stands side by side, and all of it again in the next turn: drift hits both alike.
    settings = [scale.timed_turns(1), scale.timed_turns(3)]
    for ranks in scale.threads:
        settings += [scale.threads_turns(ranks, threads) for threads in ("auto", "all")]
    turns = zip(*settings, strict=True)
    watched = [scale.stopwatch_run(ranks) for ranks in scale.stopwatch]
    return watched + [trial for trials in turns for trial in trials]


_PARTS: dict[str, Callable[[Scale], list[Trial]]] = {
    "baseline": _baseline,
    "replication": _replication,
    "processes": _processes,
    "batch-size": _batch_size,
    "timing": _timing,
}

EXPERIMENTS = (*_PARTS, "all")


def trials(experiment: str, scale: Scale) -> list[Trial]:
    """The trials of an experiment, each once, in the order in which they are run."""
    parts = _PARTS.values() if experiment == "all" else [_PARTS[experiment]]
    found = {trial.name: trial for part in parts for trial in part(scale)}
    return list(found.values())


_SAMPLE_S = {"paper-cnn": 140e-6, "mlp": 50e-6, "resnet9": 15e-3, "resnet18": 30e-3}


def expected_s(plan: RunPlan, samples_per_epoch: int, cores: int) -> float:
    """Seconds that a run of the paper's network takes, roughly: a weight for the study's progress.

    Measured on a server of 2024: 4 s of start-up and 2 s of a core for each rank, then 140 microseconds
    of a core for each sample of paper-cnn and 660 for each step. Where several processes each computed
    on all of 2 cores, a step of each took up to 0.4 s.
    """
    steps = plan.epochs * samples_per_epoch / plan.workers / plan.batch_size
    sample_s = _SAMPLE_S.get(plan.model, _SAMPLE_S["paper-cnn"])
    step_s = (sample_s * plan.batch_size + 660e-6) * max(1, plan.workers / cores)
    if plan.threads == "all" and plan.workers > 1:
        step_s = 0.4
    return 4 + 2 * plan.ranks / cores + steps * step_s
