"""Several runs that answer a question: the paper's experiments."""

from rankwise.studies.plan import EXPERIMENTS
from rankwise.studies.study import Study, reproduce

__all__ = ["EXPERIMENTS", "Study", "reproduce"]
