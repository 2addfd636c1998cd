"""Strategies and compressions against each other, each at its own learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rankwise.runs.record import Record
from rankwise.studies.plan import Options
from rankwise.studies.results import last_accuracy
from rankwise.studies.statistics import Estimate, estimate

WORKERS = 4
RATES = (0.003, 0.01, 0.03, 0.1)

REFERENCE = "allreduce"
"""What the others are compared with: synchronous SGD without compression."""


@dataclass(frozen=True)
class Entrant:
    """A way to keep step, by what `rankwise train` is given."""

    name: str
    options: Options

    @property
    def slug(self) -> str:
        """Its name in a file's name."""
        return self.name.replace(" ", "-").replace(":", "")


def _entrant(strategy: str, *, master: bool = False, name: str = "", **options: Any) -> Entrant:
    ranks = WORKERS + master
    return Entrant(name or strategy, {"strategy": strategy, "ranks": ranks, **options})


ENTRANTS = (
    _entrant("allreduce"),
    *(
        _entrant("allreduce", compress=form, name=f"allreduce {form}")
        for form in ("fp16", "bf16", "int8", "topk:0.01", "sign", "powersgd:2")
    ),
    _entrant("gradient-server", master=True),
    _entrant("parameter-averaging", master=True),
    _entrant("local-sgd"),
    _entrant("local-sgd", compress="int8", name="local-sgd int8"),
    _entrant("post-local-sgd"),
    _entrant("slowmo"),
    _entrant("diloco"),
    _entrant("diloco", sync_every=500, name="diloco 500"),
    _entrant("easgd", master=True),
    _entrant("downpour", master=True),
    _entrant("gossip", topology="ring", name="gossip ring"),
    _entrant("gossip", topology="exponential", name="gossip exponential"),
    _entrant("ddp"),
)


@dataclass(frozen=True, eq=False)  # a key of dicts, though its options are none
class Course:
    """A network, how it is trained, and who takes part.

    `options` hold for all runs. Learning rates are chosen by short runs with `tuning`, on samples held
    out of the training set; the test set is for the final runs alone. Where runs take long, `most_seeds`
    limits how often each is repeated.
    """

    model: str
    options: Options
    tuning: Options
    rates: tuple[float, ...] = RATES
    most_seeds: int | None = None
    entrants: tuple[Entrant, ...] = ENTRANTS

    def name(self, entrant: Entrant, rate: float, *, final: bool) -> str:
        """The name of a run, but for its seed."""
        return f"{self.model}-{entrant.slug}-lr{rate:g}{'' if final else '-tuning'}"

    def seeds(self, repeats: int) -> int:
        """How many seeds its final runs have, by the number that is asked for."""
        return min(repeats, self.most_seeds or repeats)

    def run_options(self, entrant: Entrant, rate: float, *, final: bool) -> Options:
        """What `rankwise train` is given for a run, but for dataset and seed."""
        shared = {"model": self.model, "schedule": "cosine", **self.options}
        return shared | ({} if final else self.tuning) | entrant.options | {"lr": rate}


def _only(*names: str) -> tuple[Entrant, ...]:
    return tuple(entrant for entrant in ENTRANTS if entrant.name in names)


COURSES = (
    Course(
        "paper-cnn",
        {"batch_size": 16, "epochs": 5},
        {"epochs": 2, "validation_split": 0.1},
    ),
    Course(
        "resnet9",
        {"batch_size": 16, "epochs": 1, "train_limit": 6_000, "val_limit": 2_000},
        {"epochs": 1, "train_limit": 3_000, "validation_split": 0.1, "val_limit": 1_000},
        rates=(0.01, 0.05),
        most_seeds=1,
        entrants=_only(
            "allreduce",
            "allreduce topk:0.01",
            "allreduce powersgd:2",
            "local-sgd",
            "diloco",
            "easgd",
            "downpour",
            "gossip exponential",
            "ddp",
        ),
    ),
)

QUICK_COURSES = (
    Course(
        "mlp",
        {"batch_size": 16, "epochs": 2, "train_limit": 600, "val_limit": 200},
        {"epochs": 1, "train_limit": 300, "validation_split": 0.2},
        rates=(0.01, 0.05),
        entrants=_only("allreduce", "allreduce powersgd:2", "easgd"),
    ),
)
"""A few minutes, to see what the study does."""


def best_rate(tuned: Mapping[float, Record]) -> float:
    """The rate whose short run was the most accurate in the end."""
    return max(tuned, key=lambda rate: last_accuracy(tuned[rate]))


@dataclass(frozen=True)
class Score:
    """What an entrant came to on a course, over its seeds.

    `accuracy` is that after all epochs, `in_time` the best that was reached before the fastest entrant was
    through, None if that was before its first epoch was over. `bytes_sent` counts what all ranks sent in a
    whole run, None for ddp, whose bytes go past the ledger; `epoch_s` is the median epoch.
    """

    entrant: Entrant
    rate: float
    records: Sequence[Record]
    accuracy: Estimate
    in_time: Estimate | None
    bytes_sent: float | None
    epoch_s: float
    linked_epoch_s: float | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


def scores(
    course: Course,
    finals: Mapping[str, tuple[float, Sequence[Record]]],
    linked: Mapping[str, Record],
) -> list[Score]:
    """The scores of all entrants that came to their end; `finals` holds rate and records by entrant's name,
    `linked` a short run over the slow link."""
    times_s = [_epochs_s(record) for _, records in finals.values() for record in records]
    limit_s = min((seconds[-1] for seconds in times_s), default=0.0)
    found = []
    for entrant in course.entrants:
        if entrant.name not in finals:
            continue
        rate, records = finals[entrant.name]
        first = records[0]
        link = linked.get(entrant.name)
        found.append(
            Score(
                entrant,
                rate,
                records,
                accuracy=estimate([last_accuracy(record) for record in records]),
                in_time=_estimate([_accuracy_after(record, limit_s) for record in records]),
                bytes_sent=_bytes_sent(entrant, first),
                epoch_s=first.median_epoch_s,
                linked_epoch_s=_scaled_epoch_s(link, first) if link else None,
                measured=first.ranks[0].measured,
            )
        )
    return found


def _epochs_s(record: Record) -> list[float]:
    return list(accumulate(row.wall_s for row in record.epochs))


def _bytes_sent(entrant: Entrant, record: Record) -> float | None:
    past_the_ledger = entrant.options["strategy"] == "ddp"
    return None if past_the_ledger else sum(row.bytes_sent for row in record.ranks)


def _estimate(values: Sequence[float | None]) -> Estimate | None:
    known = [value for value in values if value is not None]
    return estimate(known) if len(known) == len(values) else None


def _accuracy_after(record: Record, limit_s: float) -> float | None:
    """The best accuracy of the epochs that were over after this many seconds, if any was."""
    done = zip(record.epochs, _epochs_s(record), strict=True)
    in_time = [row for row, seconds in done if seconds <= limit_s * (1 + 1e-9)]
    return max((row.val_accuracy for row in in_time if row.val_accuracy is not None), default=None)


def _scaled_epoch_s(link: Record, full: Record) -> float:
    """An epoch over the slow link: its training time a sample, for as many samples, and the rest of an epoch
    as it was without the link."""
    rows = link.epochs[1:] or link.epochs
    a_sample_s = sum(row.train_s for row in rows) / sum(row.train_samples for row in rows)
    rest_s = full.median_epoch_s - sorted(row.train_s for row in full.epochs)[len(full.epochs) // 2]
    return a_sample_s * full.epochs[0].train_samples + max(rest_s, 0.0)
