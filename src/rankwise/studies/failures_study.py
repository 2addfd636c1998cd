"""The experiment with failures, from its options to its page."""

from __future__ import annotations

from rankwise.studies import failures
from rankwise.studies.failures_page import failures_page
from rankwise.studies.runner import run_all
from rankwise.studies.study import Reproduction, Study, require_all


def meet_failures(study: Study) -> Reproduction:
    """Train with failures by chance, and write page, table and records.

    What is finished is kept. Raises UsageError before anything is run, Interrupted, and TrainingError at
    the end if runs failed.
    """
    trouble = failures.QUICK if study.quick else failures.FULL
    options = {setting.name: trouble.run_options(setting) for setting in trouble.settings()}
    study.require_folder()
    runs = study.runs(options, study.repeats)
    folder = study.open_folder()
    failed = run_all(runs, folder, study.console)
    found = {}
    for setting in trouble.settings():
        if records := folder.all_seeds(setting.name, study.repeats):
            found[setting] = records
    judged = failures.judge(trouble, found, study.val_samples(trouble.options), quick=study.quick)
    failures.failures_grid(trouble, found).write(folder.tables)
    page = folder.path / "failures.html"
    failures_page(trouble, found, judged, study.dataset, study.command, quick=study.quick).write(page)
    require_all(runs, failed, page)
    return Reproduction(judged, page)
