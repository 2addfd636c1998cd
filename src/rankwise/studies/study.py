"""A study from its options to its page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from rankwise import data
from rankwise.comm.mpi_environment import find_mpiexec
from rankwise.config import TrainConfig
from rankwise.data.selection import select
from rankwise.errors import TrainingError, UsageError, unknown_name
from rankwise.launch import preflight
from rankwise.plan import make_plan
from rankwise.report.progress_bar import showing_progress
from rankwise.studies import plan
from rankwise.studies.folder import StudyFolder
from rankwise.studies.grids import Grid, all_grids
from rankwise.studies.page import study_page
from rankwise.studies.results import Results
from rankwise.studies.runner import Run, run_all
from rankwise.studies.verdicts import Verdict, judge

CONTEST = "strategies"
"""An experiment that is not the paper's: all strategies against each other."""

TASKS = ("images", "language")
"""What strategies are compared on."""

FEWEST_TOKENS = 10_000
MOST_RANKS = 16

FAILURES = "faults"
"""The one that the paper left out: ranks that fail by chance."""


@dataclass(frozen=True)
class Study:
    """What to reproduce, on which dataset, with how many seeds, and the folder for all of it.

    Strategies are compared on images, or by `task` on language: there `text`, `ranks`, `tokens`, `width` and
    `lr` say what is trained in place of `dataset`. Raises UsageError, one line, for an unknown experiment, no
    seeds, or what does not fit together.
    """

    experiment: str
    output: Path = Path("reproduction")
    dataset: str = "cifar10"
    data_dir: Path | None = None
    cache_dir: Path | None = None
    repeats: int = 1
    quick: bool = False
    console: Console = field(default_factory=lambda: Console(stderr=True))
    task: str = "images"
    text: Path | None = None
    ranks: int | None = None
    tokens: int | None = None
    width: int | None = None
    lr: float | None = None

    def __post_init__(self) -> None:
        known = (*plan.EXPERIMENTS, CONTEST, FAILURES)
        if self.experiment not in known:
            raise UsageError(unknown_name("experiment", self.experiment, known))
        if self.repeats < 1:
            raise UsageError(f"--repeats {self.repeats} was given, expected a number of seeds from 1 on")
        if self.task not in TASKS:
            raise UsageError(unknown_name("task", self.task, TASKS))
        if self.task == "language":
            self._require_language()
        else:
            self._require_images()

    def _require_images(self) -> None:
        for name in ("text", "ranks", "tokens", "width", "lr"):
            if (value := getattr(self, name)) is not None:
                raise UsageError(
                    f"--{name} {value} was given, which is for language alone: give strategies --task "
                    "language too"
                )

    def _require_language(self) -> None:
        if self.experiment != CONTEST:
            raise UsageError(
                f"--task language was given with {self.experiment}, expected rankwise reproduce {CONTEST}"
            )
        places = {"data-dir": self.data_dir, "cache-dir": self.cache_dir}
        if self.dataset != "cifar10":
            places["dataset"] = Path(self.dataset)
        for name, value in places.items():
            if value is not None:
                raise UsageError(
                    f"--{name} {value} was given, which is for images: leave it out, or give a text, "
                    "--text FILE"
                )
        if self.ranks is not None and not 2 <= self.ranks <= MOST_RANKS:
            raise UsageError(
                f"--ranks {self.ranks} was given, expected 2 to {MOST_RANKS}: a step has as many windows "
                "of text"
            )
        if self.tokens is not None and self.tokens < FEWEST_TOKENS:
            raise UsageError(f"--tokens {self.tokens} was given, expected {FEWEST_TOKENS} or more")
        if self.width is not None and (self.width < 8 or self.width % 8):
            raise UsageError(f"--width {self.width} was given, expected a multiple of 8")
        if self.lr is not None and not 0 < self.lr < 1:
            raise UsageError(f"--lr {self.lr:g} was given, expected a learning rate between 0 and 1")

    @property
    def scale(self) -> plan.Scale:
        """How far it goes."""
        return plan.QUICK if self.quick else plan.FULL

    def config(self, options: plan.Options, seed: int) -> TrainConfig:
        """What one run is given, and no more."""
        places = {"dataset": self.dataset, "data_dir": self.data_dir, "cache_dir": self.cache_dir}
        given = {name: value for name, value in places.items() if value is not None}
        return TrainConfig(**options, **given, seed=seed)

    def runs(self, named: Mapping[str, plan.Options], seeds: int) -> list[Run]:
        """Runs by what they are given and their names, but for the seed; all of one seed before the next, so
        that one seed is complete as early as can be.

        Checks all of them, and decodes the dataset if need be. Raises UsageError.
        """
        plans = [make_plan(self.config(options, 0)) for options in named.values()]
        if any(its.ranks > 1 for its in plans):
            find_mpiexec()
        with showing_progress(self.console) as on_progress:
            prepared = [preflight.prepare(its, on_progress) for its in plans]
        return [
            Run(f"{name}-seed{seed}", self.config(options, seed), its.samples_per_epoch)
            for seed in range(seeds)
            for (name, options), its in zip(named.items(), prepared, strict=True)
        ]

    def require_folder(self) -> None:
        """Raises UsageError if its folder holds something else."""
        StudyFolder(self.output).require(self.settings)

    def open_folder(self) -> StudyFolder:
        """Its folder, which is made if it is not there. Raises UsageError if it holds another study."""
        self.require_folder()
        folder = StudyFolder(self.output)
        folder.create(self.settings)
        return folder

    @property
    def settings(self) -> dict[str, object]:
        """What all runs in one folder have in common."""
        return {"dataset": self.dataset, "quick": self.quick}

    def results(self, folder: StudyFolder) -> Results:
        """All that is finished in the folder, by this command and by earlier ones."""
        records = {}
        for trial in plan.trials("all", self.scale):
            found = {
                seed: folder.finished(name, self.config(trial.options, seed))
                for name, seed in folder.seeds(trial.name).items()
            }
            records[trial.name] = {seed: record for seed, record in found.items() if record}
        return Results(self.scale, self.val_samples(self.scale.alone().options), records)

    def val_samples(self, options: plan.Options) -> int:
        """How many samples a run with these options is evaluated on."""
        dataset = data.prepare(self.dataset, data_dir=self.data_dir, cache_dir=self.cache_dir)
        return len(select(self.config(options, 0), dataset).val_pool)

    @property
    def command(self) -> str:
        """What anybody types to run the same."""
        words = ["rankwise", "reproduce", self.experiment]
        words += ["--task", self.task] if self.task != "images" else []
        words += ["--text", self.text.name] if self.text else []
        for name in ("ranks", "tokens", "width", "lr"):
            words += [f"--{name}", str(value)] if (value := getattr(self, name)) is not None else []
        words += ["--dataset", self.dataset] if self.dataset != "cifar10" else []
        words += ["--repeats", str(self.repeats)] if self.repeats > 1 else []
        words += ["--quick"] if self.quick else []
        return shlex.join(words)


@dataclass(frozen=True)
class Reproduction:
    """What came of a study: its verdicts, the page that shows everything, and tables for programs too."""

    verdicts: list[Verdict]
    page: Path
    tables: Sequence[Grid] = ()


def reproduce_paper(study: Study) -> Reproduction:
    """Run what is not finished yet of the paper's experiments, and write page, tables and records.

    Raises UsageError before anything is run, Interrupted, and TrainingError at the end if runs failed.
    """
    study.require_folder()
    trials = plan.trials(study.experiment, study.scale)
    runs = study.runs({trial.name: trial.options for trial in trials}, study.repeats)
    folder = study.open_folder()
    failed = run_all(runs, folder, study.console)
    results = study.results(folder)
    judged = judge(results)
    for grid in all_grids(results, judged):
        grid.write(folder.tables)
    study_page(results, judged, study.dataset, study.command).write(folder.page)
    require_all(runs, failed, folder.page)
    return Reproduction(judged, folder.page)


def require_all(runs: Sequence[Run], failed: Mapping[str, str], page: Path) -> None:
    """Raises TrainingError if runs failed."""
    if failed:
        name, words = next(iter(failed.items()))
        raise TrainingError(
            f"{len(failed)} of {len(runs)} runs failed, first {name} ({words}); {page} shows the others, "
            "and the same command tries again"
        )
