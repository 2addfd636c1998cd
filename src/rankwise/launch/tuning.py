"""`--tune`: short runs that find out how this machine trains a model fastest, and what they found before."""

from __future__ import annotations

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise import data, models
from rankwise.comm.mpi_environment import started_as_rank
from rankwise.config import TrainConfig
from rankwise.data.selection import select
from rankwise.errors import ConfigError, LaunchError
from rankwise.launch import preflight
from rankwise.launch.order import Order, to_arguments
from rankwise.launch.tournament import Options, Stage, TrialFailed, Tried, choose
from rankwise.plan import RunPlan, make_plan
from rankwise.report.progress_bar import showing_progress
from rankwise.report.words import duration
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.system import machine
from rankwise.system.files import write_atomically

EPOCH_S = 1.5
"""About how long an epoch of a trial is."""

EPOCHS = 3
"""Epochs of a trial; the first pays for warming up, and is counted as that."""

SHORT_S = 300.0
"""Runs this short are not tried compiled: compiling alone would take a good part of them."""

FIRST_STEPS = 8
"""Steps an epoch of the run that finds out how long trials must be."""

LEAST_STEPS = 4
"""Of an epoch of a trial, however long a step takes: a large network is not to be tuned for longer than it
trains."""

OF_ONE_TIME = ("fault", "target_accuracy", "resize", "freeze")
"""Options that trials leave out: what they do at some time of a run would be all or nothing of a trial."""

UNTOLD = (
    "out",
    "seed",
    "data_dir",
    "cache_dir",
    "track",
    "fault",
    "evaluate_every",
    "checkpoint_every",
    "checkpoint_keep",
)
"""Options that say nothing about speed."""


def tuned(order: Order) -> Order:
    """The order with the options that made its run fastest here. Raises UsageError."""
    if order.resume:
        raise ConfigError("--tune and --resume do not go together: a run goes on as it began")
    if started_as_rank():
        raise ConfigError("--tune starts runs of its own: leave it out under mpiexec or srun")
    if order.config.hosts or order.config.hostfile:
        raise ConfigError("--tune measures this machine alone: leave it out with --hosts")
    plan = make_plan(order.config)
    with showing_progress(order.console) as on_progress:
        preflight.prepare(plan, on_progress)
    dataset = data.prepare_of(plan)
    samples = len(select(plan, dataset, workers=plan.workers).train_pool)
    place = _place(order.config, samples)
    choice = _remembered(place)
    if choice is None:
        order.say("tuning: short runs in turn; seconds are those of the whole run without its evaluation")
        splits = _may_split(order.config, dataset)
        found = _Trials(order, plan, samples)
        try:
            choice = choose(_stages(order.config, plan, splits), found.seconds, found.tell)
        except TrialFailed as error:
            raise LaunchError(f"--tune cannot measure the run as it was given: {error}") from None
        write_atomically(place, json.dumps({"choice": choice, "trials": found.told}, indent=1).encode())
    order.say(f"tuned: {_words(choice)} (remembered in {place}; remove it to measure again)")
    options = {**order.config.given(), **choice}
    return replace(order, config=TrainConfig(**options), tune=False)


def _stages(given: TrainConfig, plan: RunPlan, splits: bool) -> list[Stage]:
    """What is tried in turn; options that the user gave are left alone."""
    named = given.model_fields_set
    cores = machine.usable_cores()

    def placements(champion: Tried) -> list[Options]:
        share = max(1, cores // plan.workers)
        halves = [share >> shift for shift in range(1, share.bit_length())]
        found: list[Options] = [] if "threads" in named else [{"threads": n} for n in halves]
        if splits and "threads" not in named:
            found += [
                {
                    "ranks": n,
                    "threads": cores // n,
                    "batch_size": plan.batch_size // n,
                    "strategy": "allreduce",
                }
                for n in (2**power for power in range(1, cores.bit_length()))
                if n <= cores and plan.batch_size % n == 0
            ]
        return found

    def layouts(champion: Tried) -> list[Options]:
        plain = {**champion.options, "memory_format": "contiguous"}
        return [] if named & {"memory_format", "onednn"} else [plain, {**plain, "onednn": False}]

    def precisions(champion: Tried) -> list[Options]:
        return [{**champion.options, "precision": "fp32"}] if plan.precision == "bf16" else []

    def compiled(champion: Tried) -> list[Options]:
        short = not champion.seconds or champion.median_s < SHORT_S
        return [] if "compile" in named or short else [{**champion.options, "compile": "on"}]

    return [placements, layouts, precisions, compiled]


def _may_split(given: TrainConfig, dataset: data.Dataset) -> bool:
    """Whether one rank and several with the same batch together do the same: not where the user said how many
    ranks or how they work, nor where each rank would normalise its own part of the batch."""
    from torch.nn.modules.batchnorm import _BatchNorm

    if given.model_fields_set & {"ranks", "strategy", "topology", "spares"} or given.lr_scaling != "none":
        return False
    model = models.trial_of(
        given.model, dataset.image_shape, len(dataset.classes), memory_format=given.memory_format
    ).model
    return not any(isinstance(module, _BatchNorm) for module in model.modules())


class _Trials:
    """Runs of the command line, and what they say about the run that is asked for."""

    def __init__(self, order: Order, plan: RunPlan, samples: int) -> None:
        self._order = order
        self._epochs = plan.epochs
        self._samples = samples
        self._batch = plan.workers * plan.batch_size
        self._size = 0
        self.told: list[dict[str, Any]] = []

    def seconds(self, options: Options) -> float:
        """What the whole run would take with these options: start, warming up, and all its epochs."""
        if not self._size:
            rate_s = _pace(self._run({}, FIRST_STEPS * self._batch))[1]
            steps = max(LEAST_STEPS, round(EPOCH_S / rate_s / self._batch))
            self._size = steps * self._batch
        start_s, rate_s = _pace(self._run(options, self._size))
        return start_s + rate_s * self._samples * self._epochs

    def _run(self, options: Options, samples: int) -> Record:
        with tempfile.TemporaryDirectory(prefix="rankwise-tune-") as scratch:
            place = Path(scratch) / "run"
            config = self.config_of(options, samples, place)
            words = [sys.executable, "-m", "rankwise", "train", *to_arguments(config)]
            ended = subprocess.run(words, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise TrialFailed((ended.stderr.strip().splitlines() or ["it ended without a word"])[-1])
            return RunFolder(place).read()

    def config_of(self, options: Options, samples: int, out: Path) -> TrainConfig:
        """Of a trial: what was given, but short."""
        given = {k: v for k, v in self._order.config.given().items() if k not in OF_ONE_TIME}
        short = {
            "epochs": EPOCHS,
            "train_limit": min(samples, self._samples),
            "val_limit": 100,
            "track": "none",
            "checkpoint_every": EPOCHS,
        }
        return TrainConfig(**{**given, **options, **short, "out": out})

    def tell(self, tried: list[Tried], winner: Tried) -> None:
        """Say how contenders did, and keep it."""
        for one in tried:
            spread = f" ({duration(min(one.seconds))} to {duration(max(one.seconds))})" if one.seconds else ""
            told = f"{duration(one.median_s)}{spread}" if one.seconds else ""
            kept = "  <- kept" if one is winner else ""
            remark = f"  {one.failed}" if one.failed else ""
            self._order.say(f"  {_words(one.options)}: {told}{remark}{kept}")
        self.told += [{**vars(one), "kept": one is winner} for one in tried]


def _pace(record: Record) -> tuple[float, float]:
    """Seconds until a run is warm, and then for each sample."""
    rows = record.epochs
    rate_s = statistics.median(row.train_s / row.train_samples for row in rows[1:])
    warming_s = max(0.0, rows[0].train_s - rate_s * rows[0].train_samples)
    return (record.first_step_s or 0.0) + warming_s, rate_s


def _words(options: Options) -> str:
    texts = []
    for name, value in options.items():
        option = name.replace("_", "-")
        texts.append(f"--no-{option}" if value is False else f"--{option} {value}")
    return " ".join(texts) or "as given"


def _place(config: TrainConfig, samples: int) -> Path:
    """Where what was found for this run on this machine is kept."""
    folder = data.writable_folder(config.cache_dir) / "tuning"
    folder.mkdir(exist_ok=True)
    key = {
        "machine": [machine.cpu_model(), machine.usable_cores()],
        "versions": [machine.version_of("rankwise"), machine.version_of("torch")],
        "options": config.model_dump(mode="json", exclude=set(UNTOLD)),
        "given": sorted(config.model_fields_set - set(UNTOLD)),
        "samples": samples,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{digest}.json"


def _remembered(place: Path) -> Options | None:
    """What was found before; None if nothing was, or it cannot be read: then it is found out again."""
    try:
        choice = dict(json.loads(place.read_bytes())["choice"])
        TrainConfig(**choice)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
    return choice
