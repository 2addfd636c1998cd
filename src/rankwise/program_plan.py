"""The plan of a program whose own loop trains: the rules between its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rankwise.comm.mpi_environment import survives_failures
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.plan import RunPlan, check_faults, choose_on_failure, ranks_of, resolve
from rankwise.runs import trackers
from rankwise.strategies import compression, entry_of
from rankwise.strategies.base import Strategy
from rankwise.strategies.gradients import GradientAveraging
from rankwise.strategies.single import Single
from rankwise.system.hosts import hosts_asked_for

DEFAULT_STRATEGY = "allreduce"

OF_SEVERAL = (
    *("strategy", "topology", "sync_every", "compress", "optimizer_state", "local_after", "outer_lr"),
    "outer_momentum",
)
"""Options of how several ranks keep in step, which say nothing of one."""


def program_plan(
    config: TrainConfig, program: tuple[str, ...], *, mpi_survives: Callable[[], bool] | None = None
) -> RunPlan:
    """The plan of a program whose own loop trains: on several ranks `allreduce` unless it was said how.
    `mpi_survives` says whether MPI goes on when a rank dies, by default that of this machine.

    Raises ConfigError, one line, for what such a loop cannot have.
    """
    if ranks_of(config, hosts_asked_for(config.hosts, config.hostfile)) == 1:
        if config.strategy is not None:
            entry_of(config.strategy)  # on one rank it is taken as single, but a name that is none is told
        compression.parse(config.compress)
        given = {name: its for name, its in config.given().items() if name not in OF_SEVERAL}
        plan = resolve(TrainConfig(**given))
    else:
        plan = resolve(_of_several(config))
    require_loop_can(plan)
    trackers.check(plan.track)
    check_faults(plan, resumes=True)
    plan = plan.with_options(program=program)
    return choose_on_failure(plan, config.on_failure, mpi_survives or survives_failures)


def _of_several(config: TrainConfig) -> TrainConfig:
    """The options of several ranks, all of which train."""
    name = config.strategy or DEFAULT_STRATEGY
    topologies = entry_of(name).topologies
    if "allreduce" in topologies:
        return config.over({"strategy": name, "topology": "allreduce"})
    return config.over({"strategy": name})


def require_loop_can(plan: RunPlan) -> None:
    """Raises ConfigError, one line, for a strategy that a loop of one's own cannot have."""
    strategy = plan.entry.strategy
    if plan.checkpoints.unit != "epochs" and not strategy.recovery.synchronous:
        raise ConfigError(
            f"--checkpoint-every {plan.checkpoint_every} was given, but in a loop of one's own the ranks of "
            f"--strategy {plan.strategy} meet at the end of epochs only: give a number of epochs"
        )
    what = f"--strategy {plan.strategy} was given, but"
    if plan.has_master or plan.entry.replicates:
        raise ConfigError(
            f"{what} in a loop of one's own all ranks train, each its part of the samples: take one without "
            "a master, such as allreduce or local-sgd"
        )
    if issubclass(strategy, GradientAveraging):
        if plan.sync_every != 1:
            raise ConfigError(
                f"--sync-every {plan.sync_every} was given, but in a loop of one's own --strategy "
                f"{plan.strategy} averages in each backward pass: leave it out, and accumulate gradients "
                "inside run.no_sync() instead"
            )
    elif not issubclass(strategy, Single) and strategy.train is not Strategy.train:
        raise ConfigError(
            f"{what} it makes the optimiser's steps itself, and a loop of one's own does that: take "
            "allreduce, local-sgd, parameter-averaging, slowmo, diloco or gossip"
        )


def of_world(options: Mapping[str, Any], processes: int) -> TrainConfig:
    """The options of a `Run` in a world of this many processes, of which the last are `spares`: of one
    process they say nothing, as it is a program under plain Python. Raises ConfigError if none is left."""
    spares = options.get("spares", 0) if processes > 1 else 0
    if spares >= processes:
        raise ConfigError(f"--spares {spares} of {processes} ranks leaves none to train")
    return TrainConfig(**{**options, "ranks": processes - spares, "spares": spares})
