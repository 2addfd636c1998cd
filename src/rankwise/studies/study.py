"""A study from its options to its page."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from rankwise import data
from rankwise.config import TrainConfig
from rankwise.data.selection import select
from rankwise.errors import LaunchError, TrainingError, UsageError, unknown_name
from rankwise.launch import preflight, showing_progress
from rankwise.storage import write_atomically
from rankwise.studies import plan
from rankwise.studies.folder import StudyFolder
from rankwise.studies.grids import all_grids
from rankwise.studies.page import study_page
from rankwise.studies.results import Results
from rankwise.studies.runner import Run, run_all
from rankwise.studies.verdicts import Verdict, judge
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

    def config(self, trial: plan.Trial, seed: int) -> TrainConfig:
        """The options of one run, and no more than are given."""
        places = {"dataset": self.dataset, "data_dir": self.data_dir, "cache_dir": self.cache_dir}
        given = {name: value for name, value in places.items() if value is not None}
        return TrainConfig(**trial.options, **given, seed=seed)

    def runs(self) -> list[Run]:
        """Its runs, all of one seed before the next, so that one seed is complete as early as can be.

        Checks all of them, and decodes the dataset if need be. Raises UsageError.
        """
        trials = plan.trials(self.experiment, self.scale)
        checked = [preflight.check(self.config(trial, 0)) for trial in trials]
        if any(config.ranks > 1 for config in checked):
            find_mpiexec()
        with showing_progress(self.console) as on_progress:
            flights = [preflight.prepare(config, on_progress) for config in checked]
        return [
            Run(f"{trial.name}-seed{seed}", self.config(trial, seed), flight.samples_per_epoch)
            for seed in range(self.repeats)
            for trial, flight in zip(trials, flights, strict=True)
        ]

    def results(self, folder: StudyFolder) -> Results:
        """All that is finished in the folder, by this command and by earlier ones."""
        config = self.config(self.scale.alone(), 0)
        dataset = data.prepare(self.dataset, data_dir=self.data_dir, cache_dir=self.cache_dir)
        records = {}
        for trial in plan.trials("all", self.scale):
            found = {
                seed: folder.finished(name, self.config(trial, seed))
                for name, seed in folder.seeds(trial.name).items()
            }
            records[trial.name] = {seed: record for seed, record in found.items() if record}
        return Results(self.scale, len(select(config, dataset).val_pool), records)

    @property
    def command(self) -> str:
        """What anybody types to run the same."""
        words = ["rankwise", "reproduce", self.experiment]
        words += ["--dataset", self.dataset] if self.dataset != "cifar10" else []
        words += ["--repeats", str(self.repeats)] if self.repeats > 1 else []
        words += ["--quick"] if self.quick else []
        return shlex.join(words)


@dataclass(frozen=True)
class Reproduction:
    """What came of a study: its verdicts, and the page that shows everything."""

    verdicts: list[Verdict]
    page: Path


def reproduce(study: Study) -> Reproduction:
    """Run what is not finished yet, and write page, tables and records.

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
    results = study.results(folder)
    judged = judge(results)
    for grid in all_grids(results, judged):
        write_atomically(folder.tables / f"{grid.name}.csv", grid.to_csv().encode())
    study_page(results, judged, study.dataset, study.command).write(folder.page)
    if failed:
        name, words = next(iter(failed.items()))
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed, first {name} ({words}); {folder.page} shows the "
            "others, and the same command tries again"
        )
    return Reproduction(judged, folder.page)
