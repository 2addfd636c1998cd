"""The study on language, from its options to its page."""

from __future__ import annotations

import hashlib
from dataclasses import replace

from rankwise.comm.mpi_environment import find_mpiexec
from rankwise.config import TrainConfig
from rankwise.data.text import read_text
from rankwise.program_plan import program_plan
from rankwise.runs.record import Record
from rankwise.studies import language
from rankwise.studies.folder import StudyFolder
from rankwise.studies.language import EPOCHS, TUNING_EPOCHS, Task
from rankwise.studies.language_page import curve_grid, judge, language_page, score_grid
from rankwise.studies.runner import Run, run_all
from rankwise.studies.strategy_comparison import Entrant
from rankwise.studies.study import Reproduction, Study, require_all


def learn_language(study: Study) -> Reproduction:
    """Choose a learning rate for each strategy, train with it, and write page, tables and records.

    What is finished is kept. Raises UsageError before anything is run, Interrupted, and TrainingError at
    the end if final runs failed.
    """
    task = task_of(study)
    settings: dict[str, object] = {
        "task": study.task,
        "quick": study.quick,
        "ranks": task.ranks,
        "tokens": task.tokens,
        "width": task.width,
        "text": _digest(read_text(task.text).encode()),
        "program": _digest(language.PROGRAM.read_bytes()),
    }
    folder = StudyFolder(study.output)
    folder.require(settings)
    _check(task)
    folder.create(settings)
    rates = dict.fromkeys((one.name for one in task.entrants), task.rates[0])
    lost: dict[str, str] = {}
    tuning: list[Run] = []
    if len(task.rates) > 1:
        tuning = [_run(task, one, rate, final=False) for one in task.entrants for rate in task.rates]
        # A run that diverges has failed, and its rate is not the best one; that is no failure of the study,
        # unless all of an entrant's did.
        failed_tuning = run_all(tuning, folder, study.console)
        rates = _choose(task, folder)
        without = {
            _run(task, one, rate, final=False).name
            for one in task.entrants
            if one.name not in rates
            for rate in task.rates
        }
        lost = {name: words for name, words in failed_tuning.items() if name in without}
    runs = [
        _run(task, one, rates[one.name], seed=seed)
        for seed in range(study.repeats)
        for one in task.entrants
        if one.name in rates
    ]
    failed = run_all(runs, folder, study.console)
    finals, linked = {}, {}
    for one in task.entrants:
        if one.name not in rates:
            continue
        name = task.name(one, rates[one.name], final=True)
        if records := folder.all_seeds(name, study.repeats):
            finals[one.name] = rates[one.name], records
        if link := folder.record_of(link_name(one)):
            linked[one.name] = link
    scores = language.scores(task, finals, linked)
    judged = judge(scores, quick=study.quick)
    grids = [score_grid(task, scores), curve_grid(scores)]
    for grid in grids:
        grid.write(folder.tables)
    page = folder.path / "language.html"
    language_page(task, scores, judged, study.command, quick=study.quick).write(page)
    require_all([*runs, *(run for run in tuning if run.name in lost)], {**lost, **failed}, page)
    return Reproduction(judged, page, grids)


def task_of(study: Study) -> Task:
    """What is trained, by the options that were given."""
    task = language.QUICK if study.quick else Task()
    return replace(
        task,
        ranks=study.ranks or task.ranks,
        tokens=study.tokens or task.tokens,
        width=study.width or task.width,
        text=study.text,
        rates=(study.lr,) if study.lr else task.rates,
    )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def link_name(entrant: Entrant) -> str:
    """The name of its short run over the slow link."""
    return f"language-{entrant.slug}-link"


def _check(task: Task) -> None:
    """Raises UsageError if a run cannot be started."""
    find_mpiexec()
    for one in task.entrants:
        run = _run(task, one, task.rates[0])
        program_plan(run.config, run.program)


def _run(task: Task, entrant: Entrant, rate: float, seed: int = 0, *, final: bool = True) -> Run:
    epochs = EPOCHS if final else TUNING_EPOCHS
    return Run(
        f"{task.name(entrant, rate, final=final)}-seed{seed}",
        TrainConfig(**task.run_options(entrant, epochs=epochs), seed=seed),
        task.windows,
        program=tuple(task.program(rate, seed, epochs=epochs, tuning=not final)),
    )


def _choose(task: Task, folder: StudyFolder) -> dict[str, float]:
    """The best rate by the entrant's name, of those that have one."""
    rates = {}
    for one in task.entrants:
        tuned: dict[float, Record] = {
            rate: record
            for rate in task.rates
            if (record := folder.record_of(f"{task.name(one, rate, final=False)}-seed0"))
        }
        if tuned:
            rates[one.name] = language.best_rate(tuned)
    return rates
