"""The experiment that the paper left out: ranks that fail by chance, asleep for a while or for good."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rankwise.ledger.phases import TRAINING
from rankwise.runs.record import Record
from rankwise.studies.grids import Cell, Grid
from rankwise.studies.plan import AVERAGED, Options
from rankwise.studies.results import last_accuracy, last_gain
from rankwise.studies.statistics import Contrast, estimate
from rankwise.studies.verdicts import Verdict, answer_of, points

KINDS = {"sleep": "asleep for {seconds:g} s", "kill": "killed"}

PARTS: Mapping[str, tuple[str, ...]] = {
    "start-up": ("startup",),
    "computing": TRAINING,
    "waiting": ("wait",),
    "exchange": ("pack", "transfer"),
    "recovery": ("recovery",),
    "rest": ("evaluation", "checkpoint", "instrument", "other"),
}
"""Phases of the ledger as the study's tables show them."""

BEFORE = "before the last start"


@dataclass(frozen=True)
class Setting:
    """A number of processes, each of which fails in each epoch with a probability."""

    processes: int
    kind: str
    probability: float

    @property
    def name(self) -> str:
        """Unique in the study, and fit for a file."""
        return f"faults-r{self.processes}-" + (
            f"{self.kind}-p{self.probability:g}" if self.probability else "none"
        )


@dataclass(frozen=True)
class Trouble:
    """How far the experiment goes. The defaults are the paper's settings, with fewer epochs."""

    processes: tuple[int, ...] = (4, 8)
    probabilities: tuple[float, ...] = (0.05, 0.1, 0.2)
    seconds: float = 5.0
    options: Options = field(default_factory=lambda: AVERAGED | {"epochs": 10})

    def settings(self) -> list[Setting]:
        """All of them, for each number of processes that without failures first."""
        return [
            setting
            for processes in self.processes
            for setting in [
                Setting(processes, "none", 0.0),
                *(Setting(processes, kind, p) for kind in KINDS for p in self.probabilities),
            ]
        ]

    def run_options(self, setting: Setting) -> Options:
        """What `rankwise train` is given, but for dataset and seed: a master without workers begins again."""
        options = self.options | {"ranks": setting.processes, "min_ranks": 2, "max_restarts": 20}
        if not setting.probability:
            return options
        seconds = f",seconds={self.seconds:g}" if setting.kind == "sleep" else ""
        return options | {"fault": (f"{setting.kind}:p={setting.probability:g}{seconds}",)}

    def words(self, setting: Setting) -> str:
        """A setting as people read it."""
        if not setting.probability:
            return "no failures"
        return f"{KINDS[setting.kind].format(seconds=self.seconds)}, p = {setting.probability:g}"


FULL = Trouble()

QUICK = Trouble(
    processes=(4,),
    probabilities=(0.2,),
    seconds=0.5,
    options=AVERAGED | {"model": "mlp", "epochs": 3, "train_limit": 600, "val_limit": 200},
)

Found = Mapping[Setting, Sequence[Record]]
"""The finished runs of each setting, a record a seed."""


def parts_s(record: Record) -> dict[str, float]:
    """Where the seconds from the first start to the end went, for the mean rank that lived to see it; they
    add up. Of ranks that were started again only the last time is known by phase."""
    live = [row for row in record.ranks if row.died_at_s is None]
    parts = {
        name: sum(row.phases_ns[phase] for row in live for phase in phases) / len(live) / 1e9
        for name, phases in PARTS.items()
    }
    return parts | {BEFORE: max(record.elapsed_s - sum(parts.values()), 0.0)}


def failures_grid(trouble: Trouble, found: Found) -> Grid:
    """A row a setting: failures, accuracy, time, and where it went."""
    rows: list[tuple[Cell, ...]] = []
    for setting, records in found.items():
        parts = [parts_s(record) for record in records]
        rows.append(
            (
                setting.processes,
                trouble.words(setting),
                estimate([len(record.faults) for record in records]),
                estimate([sum(f.action == "restart" for f in record.faults) for record in records]),
                estimate([100 * last_accuracy(record) for record in records]),
                sum(record.samples.lost + record.samples.duplicated for record in records),
                estimate([record.elapsed_s for record in records]),
                *(estimate([its[name] for its in parts]) for name in (*PARTS, BEFORE)),
            )
        )
    columns = ("processes", "failures", "failures met", "starts anew", "accuracy (%)",
               "samples lost or trained twice", "from start to end (s)",
               *(f"{name} (s)" for name in (*PARTS, BEFORE)))  # fmt: skip
    return Grid("failures", "Failures by chance", columns, tuple(rows))


def judge(trouble: Trouble, found: Found, val_samples: int, *, quick: bool) -> list[Verdict]:
    """What the experiment says of each kind of failure, at its highest probability."""
    worst = max(trouble.probabilities)
    judged = [_nothing_is_lost(found)]
    for kind, words in {"sleep": "Ranks that sleep", "kill": "Ranks that are killed"}.items():
        gains = {
            n: gain
            for n in trouble.processes
            if (gain := _gain(found, Setting(n, kind, worst), Setting(n, "none", 0.0), val_samples))
        }
        evidence = "; ".join(
            f"with {n} processes accuracy changes by {points(g, True)}" for n, g in gains.items()
        )
        answer = answer_of(
            holds=bool(gains) and all(g.low > -0.02 and not g.below(0) for g in gains.values()),
            fails=any(g.below(-0.01) for g in gains.values()),
        )
        judged.append(
            Verdict(
                f"{words} with p = {worst:g} an epoch cost no accuracy",
                "left open by the paper",
                "undecided" if quick else answer,
                f"{evidence[:1].upper()}{evidence[1:]}." if evidence else "Not run.",
                "Holds if 2 points or more are not lost for sure, does not if more than 1 is for sure.",
            )
        )
    return judged


def _nothing_is_lost(found: Found) -> Verdict:
    records = [record for records in found.values() for record in records]
    wrong = sum(record.samples.lost + record.samples.duplicated for record in records)
    struck = sum(len(record.faults) for record in records)
    return Verdict(
        "No sample is lost or trained twice, whoever fails",
        "rankwise",
        answer_of(holds=bool(records) and not wrong, fails=wrong > 0),
        f"{wrong} samples in {len(records)} runs with {struck} failures.",
        "Counted in every run.",
    )


def _gain(found: Found, ours: Setting, other: Setting, val_samples: int) -> Contrast | None:
    if ours not in found or other not in found:
        return None
    return last_gain(found[ours], found[other], val_samples)
