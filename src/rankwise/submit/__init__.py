"""Handing a run to a batch system: what it needs as a file, and giving it that file."""

from rankwise.submit.kubernetes import Kubernetes
from rankwise.submit.sending import hand_over
from rankwise.submit.slurm import Slurm
from rankwise.submit.work import Work, work_of

__all__ = ["Kubernetes", "Slurm", "Work", "hand_over", "work_of"]
