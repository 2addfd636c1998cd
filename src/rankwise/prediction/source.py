"""What a prediction starts from: steps, messages and fixed costs of finished runs."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rankwise.errors import ConfigError, UsageError, one_line
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline, read_timeline
from rankwise.plan import RunPlan, recorded_plan
from rankwise.prediction.messages import MessageCosts, fit_messages
from rankwise.prediction.slowest import Seconds
from rankwise.prediction.step_phases import spent_in_steps
from rankwise.prediction.traffic import traffic
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.strategies.traffic import Barrier, ModelSize

LEAST_STEPS = 16
"""Full steps without which nothing can be said of their distribution."""

_SAVED_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Compute:
    """Steps of a rank, without exchanges, at one batch size and number of threads, in one run or several.

    `meets` is whether there was an exchange after each, which empties the caches that the next step then
    fills again. `steps_s` [n] are their times; in the mean `per_sample_s` of each sample (forward and
    backward), `backward_s` of it the backward pass, and `optimizer_s` the optimiser's step. `evaluation_s` is
    what one rank would take to evaluate all validation samples. `epochs_s` are mean steps of each epoch, and
    `runs_s` those of each run if there are several; `busy` is how many cores of the host worked at once.
    """

    threads: int
    batch: int
    meets: bool
    steps_s: Seconds
    per_sample_s: float
    backward_s: float
    optimizer_s: float
    evaluation_s: float
    epochs_s: tuple[float, ...]
    busy: int = 1
    runs_s: tuple[float, ...] = ()

    @property
    def by_run_s(self) -> tuple[float, ...]:
        """The mean step of each run."""
        return self.runs_s or (self.mean_s,)

    @property
    def runs(self) -> int:
        """How many there are."""
        return len(self.by_run_s)

    @property
    def mean_s(self) -> float:
        """Of a step."""
        return float(self.steps_s.mean())

    def of_the_kind(self, other: Compute) -> bool:
        """Whether another run tells of the same steps."""
        mine, its = ((one.threads, one.batch, one.meets, one.busy) for one in (self, other))
        return mine == its

    def beside(self, other: Compute) -> Compute:
        """What this and another run of the same kind tell together."""

        def mean(mine: float, its: float) -> float:
            return (self.runs * mine + other.runs * its) / (self.runs + other.runs)

        steps_s = np.concatenate([self.steps_s, other.steps_s])
        return replace(
            self,
            steps_s=steps_s * (mean(self.mean_s, other.mean_s) / steps_s.mean()),
            per_sample_s=mean(self.per_sample_s, other.per_sample_s),
            backward_s=mean(self.backward_s, other.backward_s),
            optimizer_s=mean(self.optimizer_s, other.optimizer_s),
            evaluation_s=mean(self.evaluation_s, other.evaluation_s),
            epochs_s=self.epochs_s + other.epochs_s,
            runs_s=self.by_run_s + other.by_run_s,
        )


@dataclass(frozen=True)
class OversubscribedRun:
    """A run with `per_core` threads of working ranks for each core: its options, samples, and seconds of an
    epoch's training. What it took longer than its work is what ranks waited for a core."""

    per_core: float
    config: RunPlan
    samples: int
    train_s: float


@dataclass(frozen=True)
class Source:
    """Everything that a prediction knows. `samples` are those of an epoch, `epoch_s` what an epoch costs
    besides steps, exchanges, evaluation and checkpoint. `crowds` are runs whose ranks shared cores, and
    `remarks` say what was assumed."""

    name: str
    config: RunPlan
    model: ModelSize
    samples: int
    cores: int
    compute: tuple[Compute, ...]
    messages: MessageCosts
    checkpoint_s: float
    epoch_s: float
    startup_s: float
    rss_bytes: int
    crowds: tuple[OversubscribedRun, ...] = ()
    remarks: tuple[str, ...] = ()

    def with_compute_of(self, other: Source) -> Source:
        """This source, with the steps that another has at other batch sizes or threads, or with exchanges
        where this one has none or the other way, and what it knows of exchanges if this one does not. A run
        like one that is there already is one more of it, unless its ranks shared cores."""
        compute = list(self.compute)
        for its in other.compute:
            place = next((i for i, mine in enumerate(compute) if mine.of_the_kind(its)), None)
            if place is None:
                compute.append(its)
            elif not other.crowds:
                compute[place] = compute[place].beside(its)
        return replace(
            self,
            compute=tuple(compute),
            messages=self.messages.or_else(other.messages),
            crowds=self.crowds + other.crowds,
            remarks=tuple(dict.fromkeys((*self.remarks, *other.remarks))),
        )


def read_source(folders: Sequence[Path]) -> Source:
    """The source that some runs of one network make; its options are the first one's. Raises UsageError, one
    line."""
    if not folders:
        raise UsageError("nothing to predict from: give a finished run with --from, or --measure")
    first, *others = [_read(folder) for folder in folders]
    for other in others:
        if (other.model, other.config.dataset) != (first.model, first.config.dataset):
            raise UsageError(
                f"{other.name} trained another network or dataset than {first.name}: "
                "predict from one at a time"
            )
        first = first.with_compute_of(other)
    return first


def _read(path: Path) -> Source:
    folder = RunFolder(path)
    record = folder.read()
    if record.outcome != "completed":
        raise UsageError(f"{path} is {record.outcome}: predict from a run that is completed")
    config = recorded_plan(record.config)
    model = _model(folder)
    try:
        meeting = traffic(config, model, [config.ranks]).said.meeting
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    lines = [read_timeline(folder.timeline_of(row.rank)) for row in record.ranks if row.role != "spare"]
    steps = _steps(record, lines, config.batch_size)
    if len(steps) < LEAST_STEPS:
        raise UsageError(
            f"{path} is too short to predict from: {len(steps)} steps of a full batch were kept, expected "
            f"{LEAST_STEPS} or more; train more samples or epochs"
        )
    outside_s = _outside_steps(lines, float(steps.mean()))
    epochs_s, parts = _mean_steps(lines, config.batch_size, outside_s)
    steps = steps * (median(epochs_s) / steps.mean())
    hosts = record.environment.hosts
    on_hosts = Counter(row.host for row in record.ranks if row.role != "spare")
    messages = fit_messages(config, model, lines, list(on_hosts.values()))
    workers = [row for row in record.ranks if row.role == "worker"]
    copies = len(workers) if config.entry.replicates else 1
    remarks: tuple[str, ...] = ()
    cores = max(host.cores for host in hosts)
    later = record.epochs[1:] or record.epochs
    train_s = np.array([row.train_s for row in later])
    samples = later[0].train_samples // copies
    per_core = sum(row.threads for row in workers) / sum(host.cores for host in hosts)
    crowds: tuple[OversubscribedRun, ...] = ()
    if per_core > 1:
        if len(hosts) == 1 and isinstance(meeting, Barrier):
            crowds = (OversubscribedRun(per_core, config, samples, float(np.median(train_s))),)
        off = sum(sum(row.off_cpu_ns.get(p, 0) for p in ("forward", "backward")) for row in workers)
        on = sum(sum(row.phases_ns[p] for p in ("forward", "backward")) for row in workers)
        steps = steps * (1 - off / max(on, 1))
        remarks += (f"{path} had more threads than cores: its steps are taken without the time off them",)
    if config.resizing.stages or config.freezing.parts:
        remarks += (f"{path} had epochs of smaller images or frozen parameters: its mean step is taken",)
    if len(hosts) > 1:
        remarks += (f"{path} ran on {len(hosts)} hosts: its messages stand for those inside a host too",)
    compute = Compute(
        threads=workers[0].threads,
        batch=config.batch_size,
        meets=meets_in_each_step(config),
        steps_s=steps,
        per_sample_s=(parts["forward"] + parts["backward"]) / config.batch_size,
        backward_s=parts["backward"],
        optimizer_s=parts["optimizer"],
        evaluation_s=_of_epochs(lines, "evaluation", sum, config.evaluate_every),
        epochs_s=epochs_s,
        busy=min(cores, max(1, round(per_core * cores))),
    )
    checkpoint_s = _of_epochs(lines, "checkpoint", max, config.checkpoints.epochs)
    return Source(
        name=path.name,
        config=config,
        model=model,
        samples=samples,
        cores=cores,
        compute=(compute,),
        messages=messages,
        checkpoint_s=checkpoint_s,
        epoch_s=outside_s,
        startup_s=max(row.phases_ns["startup"] for row in record.ranks) / 1e9,
        rss_bytes=max(row.max_rss_bytes for row in workers),
        crowds=crowds,
        remarks=remarks,
    )


def meets_in_each_step(config: RunPlan) -> bool:
    """Whether ranks exchange something after each step, in a resolved configuration."""
    recovery = config.entry.strategy.recovery
    return config.ranks > 1 and (config.sync_every == 1 or recovery.syncs_every_step)


def _model(folder: RunFolder) -> ModelSize:
    """The shapes in the newest checkpoint, by the header of its file."""
    saved = sorted(folder.checkpoints.glob("epoch-*/model.safetensors"))
    if not saved:
        raise UsageError(f"{folder.path} holds no checkpoint, from which the size of the network is read")
    try:
        with saved[-1].open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, Any] = json.loads(file.read(length))
        tensors = {name: tuple(its["shape"]) for name, its in header.items() if name != "__metadata__"}
        kinds = {name: header[name]["dtype"] for name in tensors}
    except (OSError, ValueError, KeyError, struct.error) as error:
        raise UsageError(f"{saved[-1]} is damaged: {one_line(error)[:200]}") from None
    saved_buffers = {name for name in tensors if name.rpartition(".")[2] in _SAVED_BUFFERS}
    integers = {name for name in saved_buffers if not kinds[name].startswith(("F", "BF"))}
    return ModelSize(
        tuple(shape for name, shape in tensors.items() if name not in saved_buffers),
        _numbers(tensors[name] for name in saved_buffers - integers),
        _numbers(tensors[name] for name in integers),
        len(saved_buffers - integers),
    )


def _numbers(shapes: Any) -> int:
    return sum(int(np.prod(shape)) for shape in shapes)


_BETWEEN_RANKS = [PHASES.index(phase) for phase in ("transfer", "wait", "pack", "recovery")]


def _steps(record: Record, lines: list[RankTimeline], batch: int) -> Seconds:
    """The times of the full steps that were kept, without exchanges and packing, of all workers.

    The first step of an epoch deals shards too, and the first epoch warms up where there are others.
    """
    first = 2 if len(record.epochs) > 1 else 1
    times = []
    for line in lines:
        full = (line.steps["step"] > 1) & (line.steps["samples"] == batch) & (line.steps["epoch"] >= first)
        if line.role != "worker" or not full.any():
            continue
        away = spent_in_steps(line)[full][:, _BETWEEN_RANKS].sum(1)
        times.append((line.steps["end_ns"] - line.steps["start_ns"])[full] - away)
    return np.concatenate(times) / 1e9 if times else np.empty(0)


_IN_STEPS = [
    phase
    for number, phase in enumerate(PHASES)
    if number not in _BETWEEN_RANKS and phase not in ("startup", "evaluation", "checkpoint")
]


def _mean_steps(
    lines: list[RankTimeline], batch: int, outside_s: float
) -> tuple[tuple[float, ...], dict[str, float]]:
    """The mean step of each epoch but the first, where there are others, and the mean of each phase in a
    step, in seconds. Of an epoch's own phases `outside_s` is in no step.

    An epoch's phases hold all its steps, of which a timeline keeps few, half of them from the run's end.
    """
    workers = [line for line in lines if line.role == "worker"]
    count = max(len(line.epochs) for line in workers)
    tables = np.array([line.epochs for line in workers if len(line.epochs) == count])
    tables = tables[:, 1:] if count > 1 else tables
    steps = tables["samples"] / batch
    own_s = sum(tables[phase] for phase in _IN_STEPS) / 1e9
    means_s = (np.maximum(own_s - outside_s, 0.5 * own_s) / steps).mean(axis=0)
    parts = {phase: float(np.median((tables[phase] / steps).mean(axis=0))) / 1e9 for phase in PHASES}
    return tuple(means_s.tolist()), parts


def _of_epochs(lines: list[RankTimeline], phase: str, over_ranks: Any, every: int) -> float:
    """Seconds of a phase in one of `every` epochs, of which the last one is one: the median over them without
    the first epoch, where there are any."""
    table = np.array([line.epochs[phase] for line in lines if len(line.epochs) == len(lines[0].epochs)])
    epochs = lines[0].epochs["epoch"]
    due = (epochs % every == 0) | (epochs == epochs[-1])
    later = table[:, due & (epochs > epochs[0])] if len(epochs) > 1 else table
    return float(median(over_ranks(column) for column in later.T.tolist())) / 1e9


def _outside_steps(lines: list[RankTimeline], step_s: float) -> float:
    """Seconds of an epoch of a worker that are neither steps nor exchanges, evaluation or checkpoint: what
    comes after its last step, and what its first step has more than others."""
    away = [PHASES.index(phase) for phase in ("transfer", "wait", "evaluation", "checkpoint")]
    tails, heads = [], []
    for line in lines:
        if line.role != "worker":
            continue
        own = line.steps["end_ns"] - line.steps["start_ns"] - spent_in_steps(line)[:, away].sum(1)
        tails += own[line.steps["step"] == 0].tolist()
        heads += own[(line.steps["step"] == 1) & (line.steps["epoch"] > 1)].tolist()
    head_s = median(heads) / 1e9 - step_s if heads else 0.0
    return float(median(tails or [0])) / 1e9 + max(float(head_s), 0.0)
