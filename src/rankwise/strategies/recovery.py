"""What the ranks of a strategy do when one of them is lost, and where they stand when the run is to stop."""

from __future__ import annotations

from enum import Enum


class Recovery(Enum):
    """How the other ranks go on when one is lost. A round is what ranks train between two exchanges."""

    FAIL_STOP = "fail-stop"
    """They cannot."""

    KEEP_LOCAL_WORK = "keep local work"
    """What each has trained in the round is in its weights and stays there."""

    DROP_ROUND = "drop the round"
    """What each has trained in the round waits to be sent, gradients for example. It is dropped, and trained
    again; the weights have not changed since the round began."""

    ROLL_BACK = "roll back"
    """Ranks exchange in each step, so that all make every step of a round, with an empty batch if they have
    no samples left. All go back to the weights with which the round began, and train it again."""

    ASYNCHRONOUS = "asynchronous"
    """A rank may end a round before all have come to its end. Ranks are rounds apart, and each goes on from
    where it is."""

    @property
    def survives(self) -> bool:
        """Whether the ranks can go on without one."""
        return self is not Recovery.FAIL_STOP

    @property
    def keeps_local_work(self) -> bool:
        """Whether what a rank has trained in a round is still in its replica when the round's exchange has
        failed; otherwise it is trained again."""
        return self not in (Recovery.DROP_ROUND, Recovery.ROLL_BACK)

    @property
    def synchronous(self) -> bool:
        """Whether no rank ends a round before all have come to its end."""
        return self is not Recovery.ASYNCHRONOUS

    @property
    def syncs_every_step(self) -> bool:
        """Whether `Strategy.train` exchanges too."""
        return self is Recovery.ROLL_BACK


class Stop(Enum):
    """Where ranks stop. All learn of it in the same exchange; what they have by then is saved."""

    IN_ROUND = "in the round"
    """What each has trained of the round is in its own weights. One that is asked to stop goes straight to
    the exchange, and the round goes on from there when the run does."""

    AFTER_ROUND = "after the round"
    """What each has trained of the round is in no weights yet: the round is trained to its end, and
    committed."""

    LATER = "later"
    """Ranks agree on a round to come, and train as if nothing were until then. What each has trained of that
    round is in its own weights."""
