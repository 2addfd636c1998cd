"""Several runs that answer a question: the paper's experiments, and strategies against each other."""

from rankwise.errors import LaunchError
from rankwise.studies.contest_study import hold_contest
from rankwise.studies.study import CONTEST, Reproduction, Study, reproduce_paper
from rankwise.studies.summary import summary, to_json
from rankwise.world.surroundings import started_as_rank


def reproduce(study: Study) -> Reproduction:
    """Run what is not finished yet, and write page, tables and records.

    Raises UsageError before anything is run, Interrupted, and TrainingError at the end if runs failed.
    """
    if started_as_rank():
        raise LaunchError("reproduce starts its ranks itself: call it without mpiexec or srun")
    return hold_contest(study) if study.experiment == CONTEST else reproduce_paper(study)


__all__ = ["Reproduction", "Study", "reproduce", "summary", "to_json"]
