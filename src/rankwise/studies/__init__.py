"""Several runs that answer a question: the paper's experiments, and strategies against each other."""

from rankwise.comm.mpi_environment import started_as_rank
from rankwise.errors import LaunchError
from rankwise.studies.failures_study import meet_failures
from rankwise.studies.language_study import learn_language
from rankwise.studies.strategy_comparison_study import hold_contest
from rankwise.studies.study import CONTEST, FAILURES, Reproduction, Study, reproduce_paper
from rankwise.studies.summary import summary, to_json


def reproduce(study: Study) -> Reproduction:
    """Run what is not finished yet, and write page, tables and records.

    Raises UsageError before anything is run, Interrupted, and TrainingError at the end if runs failed.
    """
    if started_as_rank():
        raise LaunchError("reproduce starts its ranks itself: call it without mpiexec or srun")
    if study.task == "language":
        return learn_language(study)
    return _BESIDE_THE_PAPER.get(study.experiment, reproduce_paper)(study)


_BESIDE_THE_PAPER = {CONTEST: hold_contest, FAILURES: meet_failures}


__all__ = ["Reproduction", "Study", "reproduce", "summary", "to_json"]
