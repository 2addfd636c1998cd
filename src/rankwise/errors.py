"""Everything that can go wrong, as one tree.

::

    RankwiseError                 exit code 1
    ├── UsageError                exit code 2: wrong use or bad input, found before training
    │   ├── ConfigError           an option, or two options that do not fit together
    │   ├── DataError             a dataset that is unknown, missing, damaged or unfit
    │   ├── ModelError            a model that is unknown or does not fit the images
    │   ├── ResumeError           a run folder that cannot be resumed
    │   ├── TimelineError         a timeline that cannot be read
    │   └── LaunchError           ranks that cannot be started
    ├── TrainingError             exit code 1: a failure after training began
    │   ├── DivergedError         a loss that is no number
    │   ├── ProgramError          an error that ends one rank after the other
    │   ├── ProgramEnded          a program that has ended itself, with an exit code of its own
    │   ├── StorageError          a record or checkpoint that cannot be written
    │   │   └── SupersededError   a run that was started again without this rank
    │   └── RankLost              another rank has ended while this one waited for it
    └── Interrupted               exit code 130: somebody asked the run to stop

Each message is one line: what was given, what was expected, what to do. Errors of libraries are
translated into these where the library is called, so no other code needs to know them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RankwiseError(Exception):
    """The root: whatever rankwise raises on purpose."""

    exit_code = 1


class UsageError(RankwiseError):
    """Wrong use or bad input, found before training."""

    exit_code = 2


class ConfigError(UsageError):
    """An option is out of range, or two options do not fit together."""


class DataError(UsageError):
    """A dataset is unknown, missing, damaged, or does not fit the model."""


class ModelError(UsageError):
    """A model is unknown, or cannot take these images."""


class ResumeError(UsageError):
    """A run folder cannot be resumed."""


class TimelineError(UsageError):
    """A rank's timeline is missing or damaged."""


class LaunchError(UsageError):
    """Ranks cannot be started: no MPI, or one that does not fit."""


class TrainingError(RankwiseError):
    """A failure after training began."""


class OutOfStepError(TrainingError):
    """Ranks no longer compute what one process would: their weights differ, or their gradients cannot be
    added up."""


class DivergedError(TrainingError):
    """The loss is no number any more."""


class ProgramError(TrainingError):
    """An error of the program's own has ended two ranks in one epoch, and would end one after the other."""


class ProgramEnded(TrainingError):
    """A program has ended itself with an exit code that is not 0, or with words for the user."""

    def __init__(self, code: object) -> None:
        self.exit_code = code if isinstance(code, int) else 1
        super().__init__(f"the program ended with exit code {code}" if isinstance(code, int) else str(code))


class StorageError(TrainingError):
    """A record or a checkpoint could not be written."""


class SupersededError(StorageError):
    """The run was started again without this rank, and its folder is no longer for this one to write."""


class RankLost(TrainingError):
    """Another rank has ended while this one waited for it."""


class Interrupted(RankwiseError):
    """Somebody asked the run to stop; what was committed is kept."""

    exit_code = 130


def unknown_name(kind: str, given: str, known: Iterable[str]) -> str:
    """One line for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {given!r}: {hint}known are {', '.join(names)}"


def one_line(error: BaseException) -> str:
    """Any error's message as one line, for a person who did not ask for a traceback."""
    text = " ".join(str(error).split())
    return text or type(error).__name__
