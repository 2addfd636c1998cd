"""What a run writes down of itself: the record, and what it is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from rankwise.config import TrainConfig
from rankwise.ledger.phases import RECORDED
from rankwise.ledger.regions import RegionTime

if TYPE_CHECKING:
    from rankwise.data import Dataset

SCHEMA_VERSION = 1

Outcome = Literal["running", "completed", "interrupted", "failed"]
Role = Literal["master", "worker", "spare"]


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow")  # later versions may add keys


class Host(_Row):
    """One machine of the run."""

    name: str
    cores: int
    ranks: int
    cpu_model: str


class Environment(_Row):
    """What the run ran on."""

    python: str
    torch: str
    mpi4py: str | None
    mpi: str = Field(description="the MPI library, or the threads that stood in for it")
    git_commit: str | None = Field(description="of the folder where the command was given")
    hosts: list[Host]
    calls_from_c: list[str] = Field(
        default_factory=list, description="libraries of a program that call MPI themselves, which is not seen"
    )


class Epoch(_Row):
    """One pass over the training set; a line of metrics.jsonl."""

    epoch: int = Field(ge=1)
    train_loss: float | None = Field(
        description="mean over the samples that ranks trained which are still there; None if none of them is"
    )
    val_loss: float | None = Field(default=None, description="None: --evaluate-every left this epoch out")
    val_accuracy: float | None = Field(default=None, ge=0, le=1)
    train_samples: int
    steps: int = Field(description="of the worker with the most")
    learning_rate: float
    wall_s: float = Field(description="evaluation and checkpoint included")
    train_s: float = Field(gt=0, description="training and synchronisation alone")
    evaluation_s: float | None = Field(default=None, description="of the rank that took longest")
    since_launch_s: float | None = Field(
        default=None, description="from the launch of the first sitting until this epoch was evaluated"
    )
    metrics: dict[str, float | None] = Field(
        default_factory=dict, description="what a loop of a user's own has logged, by name"
    )

    @property
    def samples_per_s(self) -> float:
        """Samples per second that all ranks together trained, without evaluation and checkpoint."""
        return self.train_samples / self.train_s


class Evaluated(Epoch):
    """One whose accuracy is known."""

    val_accuracy: float = Field(ge=0, le=1)


EpochRow = Evaluated | Epoch


def _all_phases(phases_ns: dict[str, int]) -> dict[str, int]:
    return dict.fromkeys(RECORDED, 0) | phases_ns


class RegionTimes(_Row):
    """What one rank did in the regions of one name that lie in those of the same names. `phases_ns` adds up
    to `wall_ns`; regions inside are included."""

    path: list[str] = Field(description="the name, behind those of the regions around it")
    count: int
    wall_ns: int
    phases_ns: dict[str, int] = Field(description="without phases of which there was nothing")


MOST_WAITED_FOR = 32
"""Ranks for which a record says singly how long a rank, or a line on one, waited for them."""


def longest_waits(wait_on_ns: Mapping[int, int]) -> dict[str, Any]:
    """Waiting by the rank that was waited for, as a record has it: the longest in full, the rest added up, so
    that a record grows with its ranks and not with their pairs."""
    longest = sorted(wait_on_ns, key=lambda rank: wait_on_ns[rank], reverse=True)[:MOST_WAITED_FOR]
    kept = {str(rank): wait_on_ns[rank] for rank in sorted(longest)}
    return {"wait_on_ns": kept, "wait_on_others_ns": sum(wait_on_ns.values()) - sum(kept.values())}


MOST_EARLIER = 1024
"""Rows of ranks of generations that are over which a record keeps."""

MOST_REGIONS = 64
"""Names of regions in a rank's row, those with most time."""


def regions_of(times: Mapping[tuple[str, ...], RegionTime]) -> list[RegionTimes]:
    """The regions of one rank, as a record has them."""
    rows = [
        RegionTimes(
            path=[*path],
            count=its.count,
            wall_ns=sum(its.phases_ns.values()),
            phases_ns={phase: ns for phase, ns in its.phases_ns.items() if ns},
        )
        for path, its in times.items()
    ]
    longest = sorted(rows, key=lambda row: row.wall_ns, reverse=True)[:MOST_REGIONS]
    return [row for row in rows if row in longest] if len(rows) > MOST_REGIONS else rows


class Rank(_Row):
    """One rank's time and traffic. The phases add up to `wall_ns` exactly."""

    rank: int
    role: Role
    host: str
    threads: int
    wall_ns: int
    phases_ns: Annotated[dict[str, int], AfterValidator(_all_phases)]
    wait_on_ns: dict[str, int]
    wait_on_others_ns: int = Field(
        default=0, description="waiting for ranks that are not in `wait_on_ns`, which holds the longest waits"
    )
    hidden_ns: int
    cpu_s: float
    cpu_percent: float
    bytes_sent: int
    bytes_received: int
    messages_sent: int
    messages_received: int | None = None
    max_rss_bytes: int
    pss_bytes: int | None = Field(
        default=None, description="memory at the end that is its own, and its share of what is used together"
    )
    died_at_s: float | None
    off_cpu_ns: dict[str, int] = Field(
        default_factory=dict,
        description="part of each phase outside exchanges in which the main thread was not on a CPU",
    )
    ideal_ns: int = Field(
        default=0, description="time after start-up if exchanges took no time, and were only waited for"
    )
    barrier_wait_ns: int | None = Field(
        default=None, description="waiting by the stopwatch of --cross-check, beside that of the logs"
    )
    measured: dict[str, float] = Field(default_factory=dict, description="what the strategy measured")
    regions: list[RegionTimes] = Field(
        default_factory=list, description="of those that the program named, in the order in which they ended"
    )


class Generation(_Row):
    """The ranks of one start of a run: of its first, of one that went on, or of those that took over while it
    ran."""

    number: int = Field(description="from 0")
    started_at: str = Field(description="UTC: when its time begins")
    pause_s: float | None = Field(
        default=None,
        description="from the last word of the ranks before to its first step; None of the first",
    )
    ranks: list[Rank] = Field(description="their rows as they were written last")


class Seen(_Row):
    """The images that a network was trained on: what it takes, and what its answers mean."""

    image_shape: tuple[int, int, int] = Field(description="channels, height, width")
    classes: tuple[str, ...] = Field(description="in the order of the network's scores")

    @classmethod
    def of(cls, dataset: Dataset) -> Seen:
        """Those of a dataset."""
        return cls(image_shape=dataset.image_shape, classes=dataset.classes)


class CallSite(_Row):
    """A line of a program that calls MPI, and what it cost one rank."""

    rank: int
    file: str
    line: int
    function: str
    call: str
    count: int
    bytes: int
    wait_ns: int
    transfer_ns: int
    pack_ns: int = 0
    wait_on_ns: dict[str, int]
    wait_on_others_ns: int = 0
    late_at: dict[str, int] = Field(
        description="where the ranks that were waited for were meanwhile, `rank N: ...`"
    )

    @property
    def place(self) -> str:
        """File and line."""
        return f"{self.file}:{self.line}"


class Clock(_Row):
    """How well the hosts' clocks agree. One host has one clock."""

    error_bound_ns: int
    violations: int


LOSSES = ("lost_work", "detection", "repair", "pauses", "fewer_ranks")
"""What faults and stops cost a run."""


class Efficiency(_Row):
    """POP efficiencies as fractions, and what faults cost; None where this run cannot tell."""

    parallel: float | None = None
    load_balance: float | None = None
    serialization: float | None = None
    transfer: float | None = None
    goodput: float | None = Field(
        default=None, description="share of the time of the ranks asked for that no fault and no stop cost"
    )
    goodput_lost: dict[str, float] = Field(
        default_factory=dict, description="the rest of that time, {cause: share}"
    )
    paid_rank_s: float = Field(
        default=0.0, description="that time: seconds since the first step times ranks asked for"
    )
    mean_recovery_s: float | None = Field(
        default=None,
        description="mean over the ranks that were lost, from their last sign of life until a round was "
        "committed again",
    )


class Samples(_Row):
    """Whether every sample was trained once per epoch. Replication counts a sample once per worker."""

    expected: int
    trained: int
    duplicated: int
    lost: int


class Fault(_Row):
    """A rank that was lost, or a fault that was injected, and what became of it."""

    rank: int = Field(description="-1 if it is not known")
    kind: str = Field(description="what was injected; lost for what was not")
    found_at: str | None = Field(default=None, description="UTC, ISO 8601")
    epoch: int
    step: int | None = None
    detected_after_s: float | None = Field(
        default=None, description="from the injection, or from the last sign of life"
    )
    recovered_after_s: float | None = Field(
        default=None, description="from the same moment until a round was committed again"
    )
    action: str = Field(description="what was done about it: continue, restart, dropped, none")


class Target(_Row):
    """Whether and when the accuracy was reached that a run was to stop at. Times are None where it was not,
    and include evaluation and, after a resume, the time between sittings."""

    accuracy: float
    reached: bool
    epoch: int | None = Field(default=None, description="the first that reached it")
    from_launch_s: float | None = Field(
        default=None, description="from the launch of the first sitting until that epoch was evaluated"
    )
    from_first_step_s: float | None = None
    evaluation_s: float | None = Field(default=None, description="part of both that went to evaluations")

    @classmethod
    def of(cls, accuracy: float | None, epochs: Sequence[Epoch], first_step_s: float | None) -> Target | None:
        """What the epochs so far say about an accuracy, None if none was asked for; `first_step_s` is from
        launch to first step."""
        if accuracy is None:
            return None
        for place, row in enumerate(epochs, start=1):
            if row.val_accuracy is not None and row.val_accuracy >= accuracy:
                told = [one.evaluation_s for one in epochs[:place]]
                launch_s = row.since_launch_s
                return cls(
                    accuracy=accuracy,
                    reached=True,
                    epoch=row.epoch,
                    from_launch_s=launch_s,
                    from_first_step_s=None
                    if launch_s is None or first_step_s is None
                    else launch_s - first_step_s,
                    evaluation_s=None if None in told else sum(s for s in told if s is not None),
                )
        return cls(accuracy=accuracy, reached=False)


def _options(config: dict[str, Any]) -> dict[str, Any]:
    """The options of a run, checked, with those that its version did not know yet at their defaults. A
    program has only some of them."""
    if config.get("program"):
        return {**dict.fromkeys(TrainConfig.model_fields), **config}
    checked = TrainConfig.model_validate({k: v for k, v in config.items() if k in TrainConfig.model_fields})
    return {**checked.model_dump(mode="json"), **config}


class Record(_Row):
    """record.json."""

    schema_version: int
    rankwise_version: str
    started_at: str = Field(description="UTC, ISO 8601")
    launched_at: str | None = Field(
        default=None,
        description="UTC: when the command of the first sitting was given, before any rank began",
    )
    first_step_s: float | None = Field(
        default=None, description="from then to the first step of the first sitting"
    )
    wall_s: float = Field(description="of the last sitting, from the start of rank 0's process")
    elapsed_s: float = Field(
        default=0.0, description="from the start of the first sitting, with the time between sittings"
    )
    written_at: str | None = Field(default=None, description="UTC: when a rank wrote this last")
    outcome: Outcome
    message: str | None = Field(description="why the run did not complete, one line")
    resumed_from_epoch: int | None = Field(description="the epoch after which this sitting went on")
    config: Annotated[dict[str, Any], AfterValidator(_options)]
    environment: Environment
    seen: Seen | None = Field(default=None, description="None of a program that makes its network itself")
    epochs: list[EpochRow]
    target: Target | None = Field(default=None, description="None without --target-accuracy")
    ranks: list[Rank] = Field(description="of the last generation")
    generation: int = Field(default=0, description="its number: how often others were started before it")
    pause_s: float | None = Field(
        default=None, description="from the last word of the ranks before them to their first step"
    )
    earlier: list[Generation] = Field(
        default_factory=list, description="generations that are over; of very many rows the last"
    )
    clock: Clock
    cpu_percent: float = Field(default=0.0, description="CPU time of all ranks, of all cores of their hosts")
    efficiency: Efficiency
    samples: Samples
    faults: list[Fault]
    call_sites: list[CallSite] = Field(
        default_factory=list, description="of a program that makes no Run: what costs most comes first"
    )

    @property
    def is_of_calls(self) -> bool:
        """Whether it is of a program that made no `Run`: what it did in MPI is known, and no training."""
        return bool(self.config.get("program")) and bool(self.config.get("calls_logged"))

    def elapsed_before_s(self, moment: str) -> float:
        """Seconds from the start of its first sitting to a moment that `utc_before` gave."""
        sitting_s = (datetime.fromisoformat(moment) - datetime.fromisoformat(self.started_at)).total_seconds()
        return sitting_s + max(self.elapsed_s - self.wall_s, 0.0)

    def as_earlier(self) -> list[Generation]:
        """The generations that are over when others begin after this record: those before, and its own."""
        mine = Generation(
            number=self.generation, started_at=self.started_at, pause_s=self.pause_s, ranks=self.ranks
        )
        kept = [*self.earlier, mine]
        while len(kept) > 1 and sum(len(each.ranks) for each in kept) > MOST_EARLIER:
            del kept[0]
        return kept

    @property
    def evaluated(self) -> list[Evaluated]:
        """The epochs after which the network was evaluated."""
        return [row for row in self.epochs if isinstance(row, Evaluated)]

    @property
    def trained(self) -> str:
        """What was trained, in words: a model on a dataset, or a program's own."""
        model = self.config["model"]
        return str(model) if self.config.get("program") else f"{model} on {self.config['dataset']}"

    @property
    def best(self) -> Evaluated:
        """The epoch with the highest validation accuracy, the first of them. Raises ValueError without
        evaluated epochs, as the two below do without epochs."""
        return max(self.evaluated, key=lambda row: row.val_accuracy)

    @property
    def median_epoch_s(self) -> float:
        """Median wall time of an epoch, evaluation and checkpoint included, in seconds."""
        return median(row.wall_s for row in self.epochs)

    @property
    def losses(self) -> list[Fault]:
        """Ranks that were lost, without which the run went on or was started again."""
        return [fault for fault in self.faults if fault.action in ("continue", "restart")]

    @property
    def median_samples_per_s(self) -> float:
        """Median over the epochs of the samples per second that all ranks together trained."""
        return median(row.samples_per_s for row in self.epochs)


def utc_before(seconds: float, timespec: str = "seconds") -> str:
    """The moment `seconds` ago, as the record writes it."""
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat(timespec=timespec)


def seconds_since(moment: str) -> float:
    """How long ago a moment was that `utc_before` gave."""
    return (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
