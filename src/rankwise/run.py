"""One run on one rank: builds all parts from the configuration, trains, keeps the record."""

from __future__ import annotations

import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
import torch

from rankwise import checkpoint, data, machine, models, placement, strategies
from rankwise.checkpoint import Checkpoint
from rankwise.config import TrainConfig
from rankwise.data.dataset import Dataset
from rankwise.data.selection import select
from rankwise.errors import ConfigError, Interrupted
from rankwise.ledger import USEFUL
from rankwise.models.replica import Replica
from rankwise.progress import Progress
from rankwise.record import (
    SCHEMA_VERSION,
    Clock,
    Efficiency,
    Environment,
    Epoch,
    Host,
    Outcome,
    Rank,
    Record,
    RunFolder,
    Samples,
    utc_now,
)
from rankwise.strategies.synchroniser import Synchroniser, make_sampler
from rankwise.training import EpochResult, Job, train
from rankwise.world import World

Say = Callable[[str], None]

_SEEDING = threading.Lock()
"""Ranks that are threads share torch's generator: each seeds it and draws its weights in one go."""


def run(
    config: TrainConfig, world: World, folder: RunFolder, *, say: Say, start: Checkpoint | None = None
) -> Record:
    """Train as `config` (resolved) says, as one rank of `world`; all ranks call it together.

    With `start` the run goes on after that checkpoint. `say` gets remarks for the user, on rank 0
    only. Returns the final record. Raises UsageError before training; after it began Interrupted, on
    all ranks at once and with the record written, or the error of the rank on which it happened.
    """
    ledger = world.ledger
    say = say if world.rank == 0 else _silent
    _agree_on_options(config, world)
    ledger.enter("data")
    dataset = data.prepare(config.dataset, data_dir=config.data_dir, cache_dir=config.cache_dir)
    ledger.enter("startup")
    threads, hosts = _take_seats(config, world, say)
    with _SEEDING:
        torch.manual_seed(config.seed)
        model = models.build(config.model, dataset.image_shape, len(dataset.classes))
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    job = _make_job(config, dataset, model, world, folder)
    keeper = _Keeper(config, world, folder, job, threads, hosts, start)
    if start is None:
        keeper.save_checkpoint(0)
    else:
        start.restore(job.synchroniser.replica, job.worker)
    keeper.write("running")
    ledger.enter("other")
    try:
        train(job, start.epoch + 1 if start else 1, keeper.after_epoch)
    except Interrupted as stop:
        message = f"{stop}; go on with: rankwise train --resume {folder.path}"
        keeper.write("interrupted", message)
        raise Interrupted(message) from None
    return keeper.write("completed")


def _silent(_: str) -> None:
    """Ranks other than 0 keep their remarks to themselves."""


def _agree_on_options(config: TrainConfig, world: World) -> None:
    mine = config.model_dump(mode="json", exclude={"out"})
    for rank, theirs in enumerate(world.allgather_object(mine)):
        for name in mine:
            if theirs[name] != mine[name]:
                raise ConfigError(
                    f"ranks were given different options: --{name.replace('_', '-')} is {mine[name]} on rank "
                    f"{world.rank} and {theirs[name]} on rank {rank}; start all ranks with the same command"
                )


def _take_seats(config: TrainConfig, world: World, say: Say) -> tuple[int, list[Host]]:
    """Set this rank's arithmetic threads; returns them, and the hosts of the world in rank order."""
    mine = placement.here(trains=not (config.has_master and world.rank == 0))
    seats: list[placement.Seat] = world.allgather_object(mine)
    threads = placement.share_threads(seats, config.threads)
    for warning in placement.oversubscribed(seats, threads):
        say(warning)
    torch.set_num_threads(threads[world.rank])
    models_of = {seat.host: seat.cpu_model for seat in seats}
    hosts = [
        Host(
            name=name, cores=cores, ranks=sum(seat.host == name for seat in seats), cpu_model=models_of[name]
        )
        for name, cores in placement.cores_of_hosts(seats).items()
    ]
    return threads[world.rank], hosts


def _make_job(
    config: TrainConfig, dataset: Dataset, model: torch.nn.Module, world: World, folder: RunFolder
) -> Job:
    assert config.strategy is not None
    chosen = select(config, dataset)
    first_worker = 1 if config.has_master else 0
    evaluators = 1 if config.has_master else world.size
    shares = np.array_split(chosen.val_pool, evaluators)
    replica = Replica(
        model, make_optimizer(config, model), share_optimizer_state=config.optimizer_state == "average"
    )
    strategy = strategies.STRATEGIES[config.strategy].build(config)
    sampler = make_sampler(config, chosen.train_pool, dataset.train.labels[chosen.train_pool], world.rank)
    expected = np.zeros(len(dataset.train.labels), np.int64)
    expected[chosen.train_pool] = config.workers if strategy.replicates else 1
    return Job(
        config=config,
        synchroniser=Synchroniser(replica, strategy, sampler, world),
        train=dataset.train,
        validation=chosen.validation,
        val_pool=shares[world.rank] if world.rank < evaluators else chosen.val_pool[:0],
        worker=world.rank - first_worker if world.rank >= first_worker else None,
        expected=expected,
        progress=Progress(folder.progress, world.rank, world.size),
    )


def make_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimiser that the options describe, in torch's fused form: one kernel for all parameters."""
    parameters = list(model.parameters())
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
            fused=True,
        )
    adam = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return adam(parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True)


@dataclass
class _Tally:
    """Sample counts over all epochs so far."""

    expected: int = 0
    trained: int = 0
    duplicated: int = 0
    lost: int = 0


class _Keeper:
    """Keeps record, metrics and checkpoints while a run goes on."""

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        folder: RunFolder,
        job: Job,
        threads: int,
        hosts: list[Host],
        start: Checkpoint | None,
    ) -> None:
        self._config = config
        self._world = world
        self._folder = folder
        self._job = job
        self._threads = threads
        self._start = start
        self._environment = _environment(world, hosts)
        self._started_at = utc_now()
        notes = start.notes if start else {"epochs": [], "samples": {}}
        self._epochs = [Epoch.model_validate(row) for row in notes["epochs"]]
        self._tally = _Tally(**notes["samples"])
        if world.rank == 0:
            folder.keep_metrics(self._epochs)

    def after_epoch(self, result: EpochResult, start_s: float) -> None:
        """Count the epoch in, save it, and write it down; all ranks together."""
        self._tally.expected += int(self._job.expected.sum())
        self._tally.trained += result.epoch.train_samples
        self._tally.duplicated += result.duplicated
        self._tally.lost += result.lost
        self._epochs.append(result.epoch.model_copy(update={"wall_s": time.monotonic() - start_s}))
        number = result.epoch.epoch
        if number % self._config.checkpoint_every == 0 or number == self._config.epochs:
            self.save_checkpoint(number)
            # The checkpoint itself takes part of the epoch: what it holds is without that part.
            self._epochs[-1] = result.epoch.model_copy(update={"wall_s": time.monotonic() - start_s})
        if self._world.rank == 0:
            self._folder.append_metrics(self._epochs[-1])
        self.write("running")

    def save_checkpoint(self, epoch: int) -> None:
        """Write the checkpoint of `epoch`; all ranks together."""
        workers = self._config.workers
        writers = {"keep": workers, "average": 1, "reset": 0}[self._config.optimizer_state]
        with self._world.ledger.phase("checkpoint"):
            checkpoint.save(
                self._folder.checkpoints,
                epoch,
                self._job.synchroniser.replica,
                self._world,
                worker=self._job.worker,
                writers=writers if workers > 1 else 1,
                keep=self._config.checkpoint_keep,
                notes={
                    "epochs": [row.model_dump() for row in self._epochs],
                    "samples": vars(self._tally),
                    "config": self._config.model_dump(mode="json"),
                },
            )

    def write(self, outcome: Outcome, message: str | None = None) -> Record:
        """Gather all ranks' ledgers and write the record; all ranks together."""
        rows = [Rank(**row) for row in self._world.allgather_object(self._rank_row())]
        record = Record(
            schema_version=SCHEMA_VERSION,
            rankwise_version=metadata.version("rankwise"),
            started_at=self._started_at,
            wall_s=rows[0].wall_ns / 1e9,
            outcome=outcome,
            message=message,
            resumed_from_epoch=self._start.epoch if self._start else None,
            config=self._config.model_dump(mode="json"),
            environment=self._environment,
            epochs=self._epochs,
            ranks=rows,
            clock=Clock(error_bound_ns=0, violations=0),
            efficiency=_efficiency(rows),
            samples=Samples(**vars(self._tally)),
            faults=[],
        )
        if self._world.rank == 0:
            with self._world.ledger.phase("checkpoint"):
                self._folder.write(record)
            if outcome != "running":
                self._folder.progress.unlink(missing_ok=True)
        return record

    def _rank_row(self) -> dict[str, Any]:
        wall_ns, phases_ns = self._world.ledger.close()
        cpu_s = machine.cpu_seconds()
        traffic = self._world.traffic
        return {
            "rank": self._world.rank,
            "role": "master" if self._job.worker is None else "worker",
            "host": machine.host_name(),
            "threads": self._threads,
            "wall_ns": wall_ns,
            "phases_ns": phases_ns,
            "wait_on_ns": {},
            "hidden_ns": 0,
            "cpu_s": cpu_s,
            "cpu_percent": 100e9 * cpu_s / max(wall_ns, 1),
            "bytes_sent": traffic.bytes_sent,
            "bytes_received": traffic.bytes_received,
            "messages_sent": traffic.messages_sent,
            "max_rss_bytes": machine.max_rss_bytes(),
            "died_at_s": None,
        }


def _efficiency(rows: list[Rank]) -> Efficiency:
    """POP's parallel efficiency (mean useful time over wall time) and load balance (mean over largest)."""
    workers = [row for row in rows if row.role == "worker"]
    useful = [sum(row.phases_ns[phase] for phase in USEFUL) for row in workers]
    wall = [row.wall_ns for row in workers]
    if not useful or not max(useful):
        return Efficiency()
    mean = sum(useful) / len(useful)
    return Efficiency(parallel=mean / (sum(wall) / len(wall)), load_balance=mean / max(useful))


def _environment(world: World, hosts: list[Host]) -> Environment:
    mpi4py = sys.modules.get("mpi4py")
    return Environment(
        python=platform.python_version(),
        torch=torch.__version__,
        mpi4py=mpi4py.__version__ if mpi4py else None,
        mpi=world.describe(),
        git_commit=_git_commit() if world.rank == 0 else None,
        hosts=hosts,
    )


def _git_commit() -> str | None:
    """The commit checked out in the current folder, or None."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
