"""The plan of a run: every option with the value in force, and all rules between options.

`TrainConfig` says what was asked for. `resolve` fills in what follows from other options and refuses what
does not fit together; `make_plan` also asks this machine what it can do. A launcher does that once. The plan
stands in ``plan.json``, from which each rank takes it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field

from rankwise import data, models
from rankwise.comm.mpi_environment import survives_failures
from rankwise.config import PROGRAM_OPTIONS, TrainConfig
from rankwise.data.partition import Shards, parse_shards
from rankwise.data.resizing import Resizing, parse_resize
from rankwise.errors import ConfigError, ResumeError
from rankwise.models.freezing import Freezing, parse_freeze
from rankwise.runs import trackers
from rankwise.runs.cadence import Every, parse_every
from rankwise.runs.weights import Weights, Which, find_weights
from rankwise.strategies import OPTIONS, STRATEGIES, Entry, compression, entry_of
from rankwise.strategies.recovery import Stop
from rankwise.survival.fault_injection import OF_HOSTS, PlannedFault, parse_fault
from rankwise.system import machine
from rankwise.system.hosts import Host, hosts_asked_for, parse_hosts

PEAKS = {"one-cycle": 0.3, "triangular": 0.23}
"""Part of a run after which its rate is highest (Smith and Topin 2018, arXiv:1708.07120; Jordan 2024,
arXiv:2404.00498)."""

ENDS = {"cosine": 0.0, "one-cycle": 0.0, "triangular": 0.07}
"""Where a run ends, as a part of its highest rate."""

MUON_LR = 0.02

AVERAGE_DECAYS = {"ema": 0.99, "lookahead": 0.95}
"""Part of the average that stays at a step."""


class RunPlan(TrainConfig):
    """Every option of a run with the value in force. None is left where an option means nothing to this run,
    or nothing was asked for.

    What only ranks can find out stays as it was asked for here: threads, ``--compile`` and ``--balance
    measured``; `rankwise.training.settled` has what they find. Options in a small language are kept as they
    were written, and properties give what they mean.
    """

    strategy: str
    on_failure: Literal["continue", "restart", "stop"]
    hostfile: None = None
    program: tuple[str, ...] = Field((), exclude=True)
    """A program whose own loop trains, and its arguments; empty for `rankwise train`. It is no option."""
    said: tuple[str, ...] = Field((), exclude=True)
    """Options that the program's loop has said itself, such as its batch."""

    @property
    def label(self) -> str:
        """What the run is called."""
        return Path(self.program[0]).stem if self.program else self.model

    def recorded(self) -> dict[str, Any]:
        """The options as a record keeps them. Of those that a program says itself, such as its model and its
        learning rate, nothing is known: None."""
        known = self.model_dump(mode="json")
        if not self.program:
            return known
        kept = {*PROGRAM_OPTIONS, *self.said, "topology"}
        own = {name: value if name in kept else None for name, value in known.items()}
        program = list(self.program)
        return {**own, "model": Path(self.program[0]).name, "dataset": "its own", "program": program}

    @property
    def entry(self) -> Entry:
        """How ranks keep in step."""
        return entry_of(self.strategy)

    @property
    def has_master(self) -> bool:
        """Whether rank 0 averages and evaluates instead of training."""
        return self.topology == "master"

    @property
    def workers(self) -> int:
        """Ranks that train."""
        return self.ranks - 1 if self.has_master else self.ranks

    @property
    def host_list(self) -> tuple[Host, ...]:
        """The hosts on which the ranks are started, none if it is this one."""
        return parse_hosts(self.hosts) if self.hosts else ()

    @property
    def dealing(self) -> Shards:
        """How the training set is dealt."""
        return parse_shards(self.shards)

    @property
    def resizing(self) -> Resizing:
        """The stages of smaller training images."""
        return parse_resize(self.resize)

    @property
    def freezing(self) -> Freezing:
        """The parameters that are not trained in the last epochs."""
        return parse_freeze(self.freeze)

    @property
    def planned_faults(self) -> tuple[PlannedFault, ...]:
        """The faults to put into the run."""
        return tuple(map(parse_fault, self.fault))

    @property
    def elastic_range(self) -> tuple[int, int] | None:
        """The fewest and the most ranks that the run may have as it goes on."""
        return parse_elastic(self.elastic) if self.elastic else None

    @property
    def checkpoints(self) -> Every:
        """How often checkpoints are written."""
        return parse_every(self.checkpoint_every)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Samples in a step of each worker, equal ones while its speed is yet to be measured."""
        if self.balance in ("none", "measured"):
            return (self.batch_size,) * self.workers
        return tuple(map(int, self.balance.split(",")))

    def with_options(self, **changes: Any) -> RunPlan:
        """This plan with other values in force; no rule is looked at."""
        return RunPlan(**{**self.model_dump(), "program": self.program, "said": self.said, **changes})


def make_plan(
    config: TrainConfig, *, resumes: bool = False, mpi_survives: Callable[[], bool] | None = None
) -> RunPlan:
    """The plan of a run on this machine. Raises UsageError, one line, for what cannot be run.

    A run that `resumes` may have fewer ranks than it began with, to which faults were meant to happen.
    `mpi_survives` says whether MPI goes on when a rank dies, by default that of this machine. Only runs that
    depend on it ask, as finding it out starts programs.
    """
    plan = resolve(config)
    models.check(plan.model)
    data.check_of(plan)
    trackers.check(plan.track)
    if plan.init is not None and not resumes:
        plan = plan.with_options(init=str(initial_weights(plan.init).path.absolute()))
    check_faults(plan, resumes)
    return choose_on_failure(plan, config.on_failure, mpi_survives or survives_failures)


def initial_weights(spec: str) -> Weights:
    """What ``--init`` names: RUN, RUN@best, RUN@EPOCH or FILE. Raises ConfigError, one line."""
    path, at, which = spec.rpartition("@")
    chosen: Which = "newest"
    if at and not Path(spec).exists():
        if which in ("newest", "best"):
            chosen = cast(Which, which)
        elif which.isdecimal():
            chosen = int(which)
        else:
            raise ConfigError(f"--init {spec}: expected RUN, RUN@best, RUN@EPOCH, or a file of weights")
    try:
        return find_weights(Path(path if at and not Path(spec).exists() else spec).expanduser(), chosen)
    except ResumeError as error:
        raise ConfigError(f"--init {spec}: {error}") from None


def resolve(config: TrainConfig) -> RunPlan:
    """The plan by the options alone, wherever it will run. Raises ConfigError, one line.

    A lost rank stops it unless `config` says otherwise.
    """
    hosts = hosts_asked_for(config.hosts, config.hostfile)
    ranks = ranks_of(config, hosts)
    name = config.strategy or ("single" if ranks == 1 else "parameter-averaging")
    if config.sync_across_hosts and not config.strategy and ranks > 1:
        name = "two-level"
    entry = entry_of(name)
    topology = config.topology or (entry.topologies[0] if entry.topologies else None)
    _check_topology(name, entry, topology, ranks)
    _check_interval(name, entry, config)
    _check_strategys_own(name, entry, config)
    _check_optimizer(config)
    interval = config.sync_across_hosts or config.sync_every or entry.sync_every
    values = config.model_dump() | {
        "ranks": ranks,
        "hosts": ",".join(map(str, hosts)) or None,
        "hostfile": None,
        "strategy": name,
        "topology": topology,
        "sync_every": interval,
        "on_failure": config.on_failure or "stop",
        "peak_at": _of_schedule("--peak-at", config.peak_at, config, PEAKS),
        "final_lr_fraction": _of_schedule("--final-lr-fraction", config.final_lr_fraction, config, ENDS),
        "muon_lr": (config.muon_lr or MUON_LR) if config.optimizer == "muon" else None,
        "average_decay": _average_decay(name, entry, config),
    }
    plan = RunPlan(**values)
    plan = plan.with_options(**_strategys_own(entry, plan))
    parse_shards(plan.shards)
    parse_resize(plan.resize)
    _check_freezing(plan)
    _check_balance(plan)
    _check_checkpoints(plan)
    _check_elastic(plan)
    return plan


def parse_elastic(text: str) -> tuple[int, int]:
    """The fewest and the most ranks of ``MIN:MAX``. Raises ConfigError, one line."""
    least, colon, most = text.partition(":")
    if not (colon and least.isdecimal() and most.isdecimal() and 2 <= int(least) <= int(most)):
        raise ConfigError(f"--elastic {text} was given, expected MIN:MAX ranks, from 2, e.g. 2:8")
    return int(least), int(most)


def recorded_plan(options: Mapping[str, Any]) -> RunPlan:
    """The plan of a run by the options in its record, of an older version too. Raises ConfigError."""
    known = {name: value for name, value in options.items() if name in TrainConfig.model_fields}
    if options.get("program"):  # which says itself what is None here
        known = {name: value for name, value in known.items() if value is not None}
    return RunPlan(**{**known, "hostfile": None, "on_failure": known.get("on_failure") or "stop"})


def strategy_anew(options: Mapping[str, Any]) -> dict[str, Any]:
    """These options without those that say how ranks keep in step, which then follow from the others."""
    return {**options, **OPTIONS, **dict.fromkeys(("strategy", "topology", "sync_every"))}


def ranks_of(config: TrainConfig, hosts: tuple[Host, ...]) -> int:
    """As many as the hosts have slots, spares set apart, unless it was said how many."""
    if not hosts or "ranks" in config.model_fields_set:
        return config.ranks
    slots = sum(host.slots for host in hosts)
    if slots <= config.spares:
        raise ConfigError(f"--spares {config.spares} on {slots} slots leaves none to train")
    return slots - config.spares


def _check_topology(name: str, entry: Entry, topology: str | None, ranks: int) -> None:
    if topology is not None and topology not in entry.topologies:
        allowed = " or ".join(entry.topologies) or "none"
        raise ConfigError(f"--topology {topology} was given, but --strategy {name} takes {allowed}")
    if name == "single" and ranks > 1:
        raise ConfigError(
            f"--strategy single trains on one rank, but --ranks {ranks} was given: "
            "leave out --strategy, or use --ranks 1"
        )
    if topology == "master" and ranks == 1:
        raise ConfigError(
            "--ranks 1 with a master leaves nobody to train: use --ranks 2 or more, or --topology allreduce"
        )
    if name == "gossip" and ranks == 1:
        raise ConfigError(
            "--strategy gossip needs a neighbour, but --ranks 1 was given: use --ranks 2 or more"
        )


def _check_interval(name: str, entry: Entry, config: TrainConfig) -> None:
    if config.sync_every not in (None, entry.sync_every):
        if name == "single":
            raise ConfigError("--sync-every was given, but --strategy single has nobody to synchronise with")
        if name == "ddp":
            raise ConfigError("--strategy ddp synchronises in each step: leave out --sync-every")


def _check_strategys_own(name: str, entry: Entry, config: TrainConfig) -> None:
    """Options that only some strategies take."""
    compression.parse(config.compress)
    for option, nothing in OPTIONS.items():
        if name == "single" and option == "optimizer_state":
            continue  # about synchronisations, of which there are none: presets may say it all the same
        value = getattr(config, option)
        if value != nothing and not entry.takes(option):
            takers = [other for other, its in STRATEGIES.items() if its.takes(option)]
            raise ConfigError(
                f"--{option.replace('_', '-')} {value} was given, but --strategy {name} does not take it; "
                f"these do: {', '.join(takers)}"
            )
    if config.compress != "none" and config.optimizer_state == "average":
        raise ConfigError(
            "--compress and --optimizer-state average do not go together: use --optimizer-state keep or reset"
        )
    if config.bucket_mb is not None and config.bucket_mb * 1e6 > machine.memory_bytes():
        raise ConfigError(
            f"--bucket-mb {config.bucket_mb} was given, but this machine has "
            f"{machine.memory_bytes() / 1e6:.0f} MB of memory"
        )


def _strategys_own(entry: Entry, plan: RunPlan) -> dict[str, Any]:
    """The values in force of the options that only some strategies take, of those that this one takes.

    `sync_across_hosts` is the interval itself, which stands in `sync_every`.
    """
    strategy = entry.build(plan)
    names = [name for name in OPTIONS if entry.takes(name) and name != "sync_across_hosts"]
    values = {name: getattr(strategy, name) for name in names if hasattr(strategy, name)}
    if plan.local_after is None:
        values["local_after"] = entry.local_after
    return values


def _check_optimizer(config: TrainConfig) -> None:
    if config.optimizer != "muon":
        for option, given in (
            (f"--muon-lr {config.muon_lr}", config.muon_lr is not None),
            ("--muon-fixed-norm", config.muon_fixed_norm),
        ):
            if given:
                raise ConfigError(
                    f"{option} was given, but it is for --optimizer muon, not {config.optimizer}"
                )


def _of_schedule(
    option: str, given: float | None, config: TrainConfig, takers: dict[str, float]
) -> float | None:
    """An option that some schedules take, each with a default of its own."""
    if given is not None and config.schedule not in takers:
        raise ConfigError(
            f"{option} {given} was given, but --schedule {config.schedule} does not take it; these do: "
            f"{', '.join(takers)}"
        )
    return given if given is not None else takers.get(config.schedule)


def _average_decay(name: str, entry: Entry, config: TrainConfig) -> float | None:
    kind = config.averaged_weights
    if kind == "none" and config.average_decay is not None:
        raise ConfigError(
            f"--average-decay {config.average_decay} was given without --averaged-weights ema or lookahead"
        )
    fits = {
        "none": True,
        "ema": entry.strategy.recovery.synchronous,
        "lookahead": entry.strategy.sends_gradients,
    }
    if not fits[kind]:
        needs = "gradients" if kind == "lookahead" else "weights all alike"
        raise ConfigError(
            f"--averaged-weights {kind} was given, but it is for strategies whose ranks agree on {needs} in "
            f"each synchronisation, such as allreduce, and --strategy {name} is not one"
        )
    return config.average_decay if config.average_decay is not None else AVERAGE_DECAYS.get(kind)


def _check_freezing(plan: RunPlan) -> None:
    if plan.freezing.parts and plan.entry.strategy.needs_all_gradients:
        raise ConfigError(
            f"--freeze {plan.freeze} was given, but --strategy {plan.strategy} waits for the gradients of "
            "all parameters: leave it out"
        )


def _check_checkpoints(plan: RunPlan) -> None:
    strategy = plan.entry.strategy
    meets = strategy.recovery.synchronous or strategy.stop is Stop.LATER
    if plan.checkpoints.unit != "epochs" and not meets:
        raise ConfigError(
            f"--checkpoint-every {plan.checkpoint_every} was given, but the ranks of --strategy "
            f"{plan.strategy} meet at the end of epochs only: give a number of epochs"
        )


def _check_elastic(plan: RunPlan) -> None:
    if plan.elastic_range is None:
        return
    least, most = plan.elastic_range
    if not least <= plan.ranks <= most:
        raise ConfigError(
            f"--elastic {plan.elastic} was given, but the run begins with {plan.ranks} ranks: expected from "
            f"{least} to {most}"
        )


def _check_balance(plan: RunPlan) -> None:
    if plan.balance == "none":
        return
    what = f"--balance {plan.balance} was given, but"
    if plan.entry.replicates:
        raise ConfigError(f"{what} with --strategy {plan.strategy} every worker trains on all samples")
    if not plan.entry.strategy.weighs_samples:
        raise ConfigError(f"{what} the mean of --strategy {plan.strategy} counts every rank alike")
    if plan.dealing.kind == "dirichlet":
        raise ConfigError(f"{what} the shards of --shards {plan.shards} are uneven by themselves")
    if plan.balance == "measured":
        return
    words = plan.balance.split(",")
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"{what} expected none, measured, or the batch of each worker, e.g. 24,8")
    if len(words) != plan.workers:
        raise ConfigError(f"{what} there are {plan.workers} workers, and it names {len(words)} batches")


def check_faults(plan: RunPlan, resumes: bool) -> None:
    for text, fault in zip(plan.fault, plan.planned_faults, strict=True):
        if fault.kind in OF_HOSTS and plan.hosts is None:
            raise ConfigError(f"--fault {text}: expected a run on several --hosts")
        if not resumes and fault.rank is not None and fault.rank >= plan.processes:
            raise ConfigError(f"--fault {text}: the run has ranks 0 to {plan.processes - 1}")


def choose_on_failure(plan: RunPlan, asked: str | None, mpi_survives: Callable[[], bool]) -> RunPlan:
    """Fill in what a lost rank means, by what strategy and MPI can."""
    if plan.min_ranks > plan.ranks:
        raise ConfigError(f"--min-ranks {plan.min_ranks} was given, but there are {plan.ranks} ranks")
    can, alone = plan.entry.strategy.recovery.survives, plan.ranks == 1
    if asked == "continue" and not can:
        raise ConfigError(
            f"--on-failure continue was given, but the ranks of --strategy {plan.strategy} cannot go on "
            "without one of them: use --on-failure restart or stop"
        )
    if asked == "continue" and not (alone or mpi_survives()):
        raise ConfigError(
            "--on-failure continue needs an MPI that survives failures: Open MPI 5, started by rankwise or "
            "by mpiexec --with-ft ulfm; else use --on-failure restart or stop"
        )
    if asked is None and can and not alone and mpi_survives():
        plan = plan.with_options(on_failure="continue")
    if plan.spares and (plan.on_failure != "continue" or alone):
        raise ConfigError(
            f"--spares {plan.spares} was given, but they are for --on-failure continue with 2 ranks or more"
        )
    if plan.spares and plan.entry.strategy.recovery.syncs_every_step:
        raise ConfigError(
            f"--spares {plan.spares} was given, but nobody can come in with --strategy {plan.strategy}, "
            "where the ranks of a host are alike: leave it out"
        )
    _check_copies(plan)
    return plan


def _check_copies(plan: RunPlan) -> None:
    if not plan.keep_copies:
        return
    what, strategy = "--keep-copies was given, but", plan.entry.strategy
    if plan.on_failure != "continue":
        raise ConfigError(f"{what} it is for --on-failure continue with 2 ranks or more")
    if plan.topology == "master" or not strategy.recovery.synchronous or strategy.recovery.syncs_every_step:
        raise ConfigError(
            f"{what} not with --strategy {plan.strategy} --topology {plan.topology}: take local-sgd, "
            "parameter-averaging, post-local-sgd, slowmo, diloco or allreduce with --topology allreduce"
        )
    keeps = plan.spares > 0 and not strategy.shares_optimizer and plan.optimizer_state == "keep"
    if not keeps and plan.compress == "none":
        raise ConfigError(
            f"{what} no rank has anything of its own that could be kept: it is for --compress, and for "
            "--optimizer-state keep with --spares"
        )
