"""The contest between strategies, from its options to its page."""

from __future__ import annotations

from rankwise.runs.record import Record
from rankwise.studies import strategy_comparison
from rankwise.studies.folder import StudyFolder
from rankwise.studies.plan import Options
from rankwise.studies.runner import Run, run_all
from rankwise.studies.strategy_comparison import Course, Entrant, Score
from rankwise.studies.strategy_comparison_page import contest_page, judge, score_grid
from rankwise.studies.study import Reproduction, Study, require_all


def hold_contest(study: Study) -> Reproduction:
    """Choose a learning rate for each strategy, train with it, and write page, tables and records.

    What is finished is kept. Raises UsageError before anything is run, Interrupted, and TrainingError at
    the end if final runs failed.
    """
    courses = strategy_comparison.QUICK_COURSES if study.quick else strategy_comparison.COURSES
    study.require_folder()
    short = {
        course.name(entrant, rate, final=False): course.run_options(entrant, rate, final=False)
        for course, entrant in _all(courses)
        for rate in course.rates
    }
    tuning = study.runs(short, 1)
    folder = study.open_folder()
    # A run that diverges has failed, and its rate is not the best one; that is no failure of the study,
    # unless all of an entrant's did.
    failed_tuning = run_all(tuning, folder, study.console)
    rates = _choose(courses, folder)
    without = {
        f"{course.name(entrant, rate, final=False)}-seed0"
        for course, entrant in _all(courses)
        if (course.model, entrant.name) not in rates
        for rate in course.rates
    }
    lost = {name: words for name, words in failed_tuning.items() if name in without}
    runs = [run for course in courses for run in _finals(study, course, rates)]
    failed = run_all(runs, folder, study.console)
    found = {course: _scores(course, rates, folder, course.seeds(study.repeats)) for course in courses}
    judged = judge(found[courses[0]], study.val_samples(courses[0].options))
    for course, scores in found.items():
        score_grid(course, scores).write(folder.tables)
    page = folder.path / "strategies.html"
    contest_page(found, judged, study.dataset, study.command, study.quick).write(page)
    require_all([*runs, *(run for run in tuning if run.name in lost)], {**lost, **failed}, page)
    return Reproduction(judged, page)


def _finals(study: Study, course: Course, rates: dict[tuple[str, str], float]) -> list[Run]:
    """The final runs of a course, each entrant at its own rate."""
    options: dict[str, Options] = {
        course.name(entrant, rate, final=True): course.run_options(entrant, rate, final=True)
        for entrant in course.entrants
        if (rate := rates.get((course.model, entrant.name)))
    }
    return study.runs(options, course.seeds(study.repeats))


def _all(courses: tuple[Course, ...]) -> list[tuple[Course, Entrant]]:
    return [(course, entrant) for course in courses for entrant in course.entrants]


def _choose(courses: tuple[Course, ...], folder: StudyFolder) -> dict[tuple[str, str], float]:
    """The best rate by the model's and the entrant's name, of those that have one."""
    rates = {}
    for course, entrant in _all(courses):
        tuned: dict[float, Record] = {
            rate: record
            for rate in course.rates
            if (record := folder.record_of(f"{course.name(entrant, rate, final=False)}-seed0"))
        }
        if tuned:
            rates[course.model, entrant.name] = strategy_comparison.best_rate(tuned)
    return rates


def _scores(
    course: Course, rates: dict[tuple[str, str], float], folder: StudyFolder, repeats: int
) -> list[Score]:
    finals, linked = {}, {}
    for entrant in course.entrants:
        rate = rates.get((course.model, entrant.name))
        if rate is None:
            continue
        if records := folder.all_seeds(course.name(entrant, rate, final=True), repeats):
            finals[entrant.name] = rate, records
        if link := folder.record_of(f"{course.model}-{entrant.slug}-link"):
            linked[entrant.name] = link
    return strategy_comparison.scores(course, finals, linked)
