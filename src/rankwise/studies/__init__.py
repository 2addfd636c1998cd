"""Several runs that answer a question: the paper's experiments."""

from rankwise.studies.study import Reproduction, Study, reproduce
from rankwise.studies.summary import summary, to_json

__all__ = ["Reproduction", "Study", "reproduce", "summary", "to_json"]
