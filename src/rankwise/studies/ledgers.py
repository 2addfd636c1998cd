"""What the ledgers of a run say about its time: where an epoch goes, and what makes it longer.

An epoch is as long for every rank, so the mean worker's phases tell what it consists of. Between two
runs over the same samples each part grows or shrinks, and these changes add up to that of the epoch.
Computing changes for two reasons, which are told apart like this: if the cores that the workers' threads
can keep busy were used as well as before, it would change in proportion to their number; what it
changes beyond that is oversubscription: more threads than cores take turns, and wait for each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np

from rankwise.ledger.phases import PHASES
from rankwise.runs.record import Rank, Record, Role
from rankwise.studies import paper

_COMPUTING = ("data", "forward", "backward", "optimizer", "other")
_EXCHANGE = ("pack", "transfer")
_REST = tuple(name for name in PHASES if name not in ("startup", "wait", *_COMPUTING, *_EXCHANGE))
_MASTER_WORKS = ("evaluation", "checkpoint", "optimizer", "pack", "other", "data", "instrument")


@dataclass(frozen=True)
class Breakdown:
    """An epoch of the mean worker, in seconds. What PARTS names adds up to it.

    Waiting for the master is shared out by what the master does when it does not wait itself.
    """

    data_s: float
    training_s: float
    worker_wait_s: float
    evaluation_wait_s: float
    master_wait_s: float
    exchange_s: float
    rest_s: float
    off_cpu_s: float
    """The part of data and training in which the main thread was not on a CPU: in line for a core."""
    busy_cores: float
    """Cores that workers can keep busy: as many as they have threads, or all there are."""

    @property
    def computing_s(self) -> float:
        """Data and training together."""
        return self.data_s + self.training_s

    @property
    def epoch_s(self) -> float:
        """The whole of it."""
        return float(sum(getattr(self, name) for name in PARTS))


PARTS = (
    "data_s",
    "training_s",
    "worker_wait_s",
    "evaluation_wait_s",
    "master_wait_s",
    "exchange_s",
    "rest_s",
)


def breakdown(record: Record) -> Breakdown:
    """The epoch of one run (of its last sitting, if it was resumed)."""
    epochs = len(record.epochs) - (record.resumed_from_epoch or 0)
    masters = [row for row in record.ranks if row.role == "master"]
    workers = [row for row in record.ranks if row.role == "worker"]
    evaluating = _evaluating(masters)
    cores = sum(host.cores for host in record.environment.hosts)

    def mean(ns: Sequence[int]) -> float:
        return sum(ns) / len(workers) / epochs / 1e9

    computing = mean([_sum(row, _COMPUTING) for row in workers])
    data = mean([row.phases_ns["data"] for row in workers])
    for_master = mean([sum(row.wait_on_ns.get(str(m.rank), 0) for m in masters) for row in workers])
    exchange = mean([_sum(row, _EXCHANGE) for row in workers])
    waiting = mean([row.phases_ns["wait"] for row in workers])
    return Breakdown(
        data_s=data,
        training_s=computing - data,
        worker_wait_s=waiting - for_master,
        evaluation_wait_s=for_master * evaluating,
        master_wait_s=for_master * (1 - evaluating),
        exchange_s=exchange,
        rest_s=mean([_sum(row, _REST) for row in workers]),
        off_cpu_s=mean([sum(row.off_cpu_ns.get(phase, 0) for phase in _COMPUTING) for row in workers]),
        busy_cores=min(sum(row.threads for row in workers), cores),
    )


def mean_breakdown(records: Sequence[Record]) -> Breakdown:
    """The mean over several runs of the same setting."""
    rows = [asdict(breakdown(record)) for record in records]
    return Breakdown(**{name: float(np.mean([row[name] for row in rows])) for name in rows[0]})


def _evaluating(masters: Sequence[Rank]) -> float:
    """The share of evaluation in what masters do outside exchanges."""
    works = sum(_sum(row, _MASTER_WORKS) for row in masters)
    return sum(row.phases_ns["evaluation"] for row in masters) / works if works else 0.0


def _sum(row: Rank, phases: Sequence[str]) -> int:
    return sum(row.phases_ns[phase] for phase in phases)


@dataclass(frozen=True)
class Growth:
    """What makes an epoch longer (negative: shorter) from one setting to another, in seconds."""

    more_cores_s: float
    oversubscription_s: float
    worker_wait_s: float
    evaluation_wait_s: float
    master_wait_s: float
    exchange_s: float
    rest_s: float

    @property
    def total_s(self) -> float:
        """The whole change."""
        return float(sum(astuple(self)))

    @property
    def one_sided(self) -> bool:
        """Whether it is a growth that shares say something about: most of it is not undone by other parts."""
        return bool(self.total_s > sum(abs(part) for part in astuple(self)) / 2)


def growth(before: Breakdown, after: Breakdown) -> Growth:
    """Share out the change of the epoch's time; the parts add up to it."""
    in_proportion = before.computing_s * before.busy_cores / after.busy_cores
    return Growth(
        more_cores_s=in_proportion - before.computing_s,
        oversubscription_s=after.computing_s - in_proportion,
        worker_wait_s=after.worker_wait_s - before.worker_wait_s,
        evaluation_wait_s=after.evaluation_wait_s - before.evaluation_wait_s,
        master_wait_s=after.master_wait_s - before.master_wait_s,
        exchange_s=after.exchange_s - before.exchange_s,
        rest_s=after.rest_s - before.rest_s,
    )


@dataclass(frozen=True)
class Communication:
    """What the mean rank of a role spends on communication in the paper's 25 epochs, in seconds: by the
    author's stopwatch, and by the ledger of the same run."""

    stopwatch_s: float
    transfer_s: float
    wait_s: float


def communication(records: Sequence[Record], role: Role) -> Communication:
    """The mean over the ranks of a role in runs of the strategy `paper-stopwatch`."""

    def mean(seconds: Callable[[Rank], float]) -> float:
        values = [
            seconds(row) / len(record.epochs)
            for record in records
            for row in record.ranks
            if row.role == role
        ]
        return paper.EPOCHS * sum(values) / len(values)

    return Communication(
        stopwatch_s=mean(lambda row: row.measured["author_communication_s"]),
        transfer_s=mean(lambda row: row.phases_ns["transfer"] / 1e9),
        wait_s=mean(lambda row: row.phases_ns["wait"] / 1e9),
    )
