"""A study from its options to its page."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from rankwise.config import TrainConfig
from rankwise.errors import LaunchError, TrainingError, UsageError, unknown_name
from rankwise.launch import preflight, showing_progress
from rankwise.studies import plan
from rankwise.studies.folder import StudyFolder
from rankwise.studies.runner import Run, run_all
from rankwise.world.surroundings import find_mpiexec, started_as_rank


@dataclass(frozen=True)
class Study:
    """What to reproduce, on which dataset, with how many seeds, and the folder for all of it.

    Raises UsageError, one line, for an unknown experiment or no seeds.
    """

    experiment: str
    output: Path = Path("reproduction")
    dataset: str = "cifar10"
    data_dir: Path | None = None
    cache_dir: Path | None = None
    repeats: int = 1
    quick: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))

    def __post_init__(self) -> None:
        if self.experiment not in plan.EXPERIMENTS:
            raise UsageError(unknown_name("experiment", self.experiment, plan.EXPERIMENTS))
        if self.repeats < 1:
            raise UsageError(f"--repeats {self.repeats} was given, expected a number of seeds from 1 on")

    @property
    def scale(self) -> plan.Scale:
        """How far it goes."""
        return plan.QUICK if self.quick else plan.FULL

    def runs(self) -> list[Run]:
        """Its runs, all of one seed before the next, so that one seed is complete as early as can be.

        Checks all of them, and decodes the dataset if need be. Raises UsageError.
        """
        places = {"dataset": self.dataset, "data_dir": self.data_dir, "cache_dir": self.cache_dir}
        given = {name: value for name, value in places.items() if value is not None}
        trials = plan.trials(self.experiment, self.scale)
        configs = [TrainConfig(**trial.options, **given) for trial in trials]
        checked = [preflight.check(config) for config in configs]
        if any(config.ranks > 1 for config in configs):
            find_mpiexec()
        with showing_progress(self.console) as on_progress:
            flights = [preflight.prepare(config, on_progress) for config in checked]
        return [
            Run(
                f"{trial.name}-seed{seed}",
                TrainConfig(**config.given(), seed=seed),
                flight.samples_per_epoch,
            )
            for seed in range(self.repeats)
            for trial, config, flight in zip(trials, configs, flights, strict=True)
        ]


def reproduce(study: Study) -> Path:
    """Run what is not finished yet, and write the page; returns its path.

    Raises UsageError before anything is run, Interrupted, and TrainingError at the end if runs failed.
    """
    if started_as_rank():
        raise LaunchError("reproduce starts its ranks itself: call it without mpiexec or srun")
    folder = StudyFolder(study.output)
    settings: dict[str, object] = {"dataset": study.dataset, "quick": study.quick}
    folder.require(settings)
    runs = study.runs()
    folder.create(settings)
    failed = run_all(runs, folder, study.console)
    if failed:
        name, words = next(iter(failed.items()))
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed, first {name} ({words}); "
            "the same command tries them again"
        )
    return folder.page
