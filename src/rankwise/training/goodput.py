"""What faults and stops cost a run, of the time of the ranks that were asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from statistics import fmean

from rankwise.runs.record import LOSSES, Efficiency, Fault, Record
from rankwise.training.observer import Recovered


@dataclass
class Goodput:
    """Rank-seconds of a run, from the first step of its first sitting on.

    `asked` ranks were asked for, of which there are `size` since the second `since_s` of this sitting, up to
    which `paid_s` rank-seconds were paid for; of these `lost_s`, by their causes, were lost.
    """

    asked: int
    size: int
    since_s: float = 0.0
    paid_s: float = 0.0
    lost_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(LOSSES, 0.0))
    begun: bool = False

    @classmethod
    def after(cls, before: Record | None, asked: int, saved_at: str | None, *, began_at: str) -> Goodput:
        """As a sitting begins at the moment `began_at`, after the one that `before` is the record of, from a
        checkpoint that was `saved_at` another."""
        found = cls(asked, asked)
        if before is None or before.efficiency.goodput is None:
            return found
        its = before.efficiency
        found.paid_s = its.paid_rank_s
        found.lost_s |= {cause: share * its.paid_rank_s for cause, share in its.goodput_lost.items()}
        found.begun = True
        counted = _moment(before.written_at or before.started_at)
        ended = max([counted, *_ends(before)])
        found._pay(before.config["ranks"] * (ended - counted).total_seconds())
        if saved_at is not None:
            undone_s = max(0.0, (ended - _moment(saved_at)).total_seconds())
            found.lost_s["lost_work"] += before.config["ranks"] * undone_s
        pause_s = asked * max(0.0, (_moment(began_at) - ended).total_seconds())
        found._pay(pause_s)
        found.lost_s["pauses"] += pause_s
        return found

    def training_begins(self, now_s: float) -> None:
        """The first step of the sitting is next, `now_s` after its processes were started."""
        if self.begun:
            self.paid_s += self.asked * now_s
            self.lost_s["pauses"] += self.asked * now_s
        self.begun, self.since_s = True, now_s

    def recovered(self, event: Recovered, now_s: float) -> None:
        """Ranks were lost, without which the others go on now."""
        if not self.begun:  # a rank that comes in just now
            return
        self._close(now_s)
        lost = len(event.lost)
        self.lost_s["detection"] += self.size * event.waited_s
        self.lost_s["repair"] += self.size * event.seconds
        self.lost_s["lost_work"] += (self.size if event.drops else lost) * event.undone_s
        self.size += len(event.new) - lost

    def efficiency(self, now_s: float, faults: Sequence[Fault]) -> dict[str, object]:
        """The fields of a record's efficiencies that say what faults cost; none before training has begun."""
        if not self.begun:
            return {}
        self._close(now_s)
        if self.paid_s <= 0:
            return {}
        lost = {cause: seconds / self.paid_s for cause, seconds in self.lost_s.items()}
        recoveries = [fault.recovered_after_s for fault in faults if fault.recovered_after_s is not None]
        return {
            "goodput": max(0.0, 1 - sum(lost.values())),
            "goodput_lost": lost,
            "paid_rank_s": self.paid_s,
            "mean_recovery_s": fmean(recoveries) if recoveries else None,
        }

    def _close(self, now_s: float) -> None:
        """Count what passed since the last event."""
        passed_s, self.since_s = max(0.0, now_s - self.since_s), now_s
        self._pay(self.asked * passed_s)
        self.lost_s["fewer_ranks"] += (self.asked - self.size) * passed_s

    def _pay(self, rank_s: float) -> None:
        self.paid_s += rank_s


def _ends(before: Record) -> list[datetime]:
    """When a sitting ended by the loss of ranks, as far as that is known, without the time until it was found
    out."""
    return [
        _moment(fault.found_at) - timedelta(seconds=fault.detected_after_s or 0.0)
        for fault in before.faults
        if fault.action == "restart" and fault.found_at is not None
    ]


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def add_goodput(found: Efficiency, goodput: Goodput, now_s: float, faults: Sequence[Fault]) -> Efficiency:
    """These efficiencies, with what faults cost."""
    return found.model_copy(update=goodput.efficiency(now_s, faults))
