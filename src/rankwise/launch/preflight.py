"""All that can be known before a rank is started, so that wrong use costs nobody a start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rankwise import data, models, strategies
from rankwise.comm.mpi_environment import survives_failures
from rankwise.config import TrainConfig
from rankwise.data import resizing
from rankwise.data.partition import parse_shards
from rankwise.data.selection import select
from rankwise.errors import ConfigError
from rankwise.models import freezing
from rankwise.runs import trackers
from rankwise.survival import fault_injection
from rankwise.training import batch_sizes, schedule


@dataclass(frozen=True)
class PreparedRun:
    """A run that can start: its resolved configuration, and how many samples an epoch trains."""

    config: TrainConfig
    samples_per_epoch: int


def check(config: TrainConfig, *, resumes: bool = False) -> TrainConfig:
    """The configuration with its dependent defaults filled in. Raises UsageError, one line.

    A run that `resumes` may have fewer ranks than it began with, to which faults were meant to happen.
    """
    config = strategies.resolve(config)
    models.check(config.model)
    schedule.check(config)
    if config.optimizer != "muon":
        for option, given in (
            (f"--muon-lr {config.muon_lr}", config.muon_lr is not None),
            ("--muon-fixed-norm", config.muon_fixed_norm),
        ):
            if given:
                raise ConfigError(
                    f"{option} was given, but it is for --optimizer muon, not {config.optimizer}"
                )
    parse_shards(config.shards)
    resizing.stages(config)
    if freezing.stages(config) and strategies.entry_of(str(config.strategy)).strategy.needs_all_gradients:
        raise ConfigError(
            f"--freeze {config.freeze} was given, but --strategy {config.strategy} waits for the "
            "gradients of all parameters: leave it out"
        )
    batch_sizes.check(config)
    data.check(config.dataset, config.data_dir)
    trackers.check(config.track)
    for text in config.fault:
        plan = fault_injection.parse(text)
        if plan.kind in fault_injection.OF_HOSTS and config.hosts is None:
            raise ConfigError(f"--fault {text}: expected a run on several --hosts")
        if not resumes and plan.rank is not None and plan.rank >= config.processes:
            raise ConfigError(f"--fault {text}: the run has ranks 0 to {config.processes - 1}")
    return _choose_on_failure(config)


def _choose_on_failure(config: TrainConfig) -> TrainConfig:
    """Fill in what a lost rank means, by what strategy and MPI can."""
    assert config.strategy is not None
    if config.min_ranks > config.ranks:
        raise ConfigError(f"--min-ranks {config.min_ranks} was given, but there are {config.ranks} ranks")
    recovery = strategies.entry_of(config.strategy).strategy.recovery
    can = recovery.survives
    wants = config.on_failure
    if wants == "continue" and not can:
        raise ConfigError(
            f"--on-failure continue was given, but the ranks of --strategy {config.strategy} cannot go on "
            "without one of them: use --on-failure restart or stop"
        )
    alone = config.ranks == 1
    if wants == "continue" and not (alone or survives_failures()):
        raise ConfigError(
            "--on-failure continue needs an MPI that survives failures: Open MPI 5, started by rankwise or "
            "by mpiexec --with-ft ulfm; else use --on-failure restart or stop"
        )
    if wants is None:
        wants = "continue" if can and not alone and survives_failures() else "stop"
    if config.spares and (wants != "continue" or alone):
        raise ConfigError(
            f"--spares {config.spares} was given, but they are for --on-failure continue with 2 ranks or more"
        )
    if config.spares and recovery.syncs_every_step:
        raise ConfigError(
            f"--spares {config.spares} was given, but nobody can come in with --strategy {config.strategy}, "
            "where the ranks of a host are alike: leave it out"
        )
    return config.model_copy(update={"on_failure": wants})


def prepare(config: TrainConfig, on_progress: Callable[[str, int, int], None] | None = None) -> PreparedRun:
    """Decode the dataset if it is not yet in the cache, and check the run against it.

    `config` is resolved. Raises UsageError, one line, for a dataset that is missing or damaged or too
    small for the workers.
    """
    dataset = data.prepare(
        config.dataset, data_dir=config.data_dir, cache_dir=config.cache_dir, on_progress=on_progress
    )
    if config.classes not in (None, len(dataset.classes)):
        raise ConfigError(
            f"--classes {config.classes} was given, by the recipe or by you, but {config.dataset} has "
            f"{len(dataset.classes)}: use another recipe, or --classes {len(dataset.classes)} to try this one"
        )
    resizing.check(config, dataset.image_shape)
    samples = len(select(config, dataset).train_pool)
    assert config.strategy is not None
    copies = config.workers if strategies.entry_of(config.strategy).replicates else 1
    return PreparedRun(config, samples * copies)
