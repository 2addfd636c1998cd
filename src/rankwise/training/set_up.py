"""What a rank sets up around a run, whoever's loop trains: threads, watchdog, faults, history."""

from __future__ import annotations

import math
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from rankwise.comm import World
from rankwise.errors import ConfigError
from rankwise.plan import RunPlan
from rankwise.runs.checkpoint import Checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Host, Rank
from rankwise.survival.fault_injection import Faults, NoFaults
from rankwise.survival.hangs import Limits
from rankwise.survival.harm import ProcessHarm, ThreadHarm
from rankwise.survival.watchdog import Watchdog
from rankwise.system import machine
from rankwise.system.signals import STOP, handling, leave_lost_terminal
from rankwise.training import cpu_threads
from rankwise.training.history import RunHistory

Say = Callable[[str], None]


def by_rank_0(say: Say, world: World) -> Say:
    """Says what this rank has to say while it is rank 0."""

    def speak(line: str) -> None:
        if world.rank == 0:
            say(line)

    return speak


def share_threads(plan: RunPlan, world: World, say: Say) -> tuple[int, list[Host]]:
    """Set this rank's arithmetic threads; returns them, and the hosts of the world in rank order."""
    works = world.rank < plan.ranks
    mine = cpu_threads.here(trains=works and not (plan.has_master and world.rank == 0))
    ranks: list[cpu_threads.RankPlacement] = world.allgather_object(mine)
    threads = cpu_threads.share_threads(ranks, plan.threads)
    for warning in cpu_threads.oversubscribed(ranks, threads):
        say(warning)
    alone = [host for host, count in Counter(rank.host for rank in ranks).items() if count == 1]
    if plan.step_timeout and alone:
        say(
            f"--step-timeout {plan.step_timeout:g} ends no rank that is alone on its host, as on "
            f"{', '.join(alone)}: only the others of a host can end one"
        )
    if world.why_no_sharing:
        say(f"ranks add up by messages, which takes longer than in shared memory: {world.why_no_sharing}")
    slow = sorted({rank.host for rank in ranks if not rank.multiplies_bf16})
    if plan.precision == "bf16" and slow:
        say(
            f"--precision bf16 is slow here: {', '.join(slow)} has no instructions for bfloat16 and goes "
            "by way of float32, which --precision fp32 does at once"
        )
    if not works:  # it will take the place of one that trains, most likely
        threads[world.rank] = min(n for n, rank in zip(threads, ranks, strict=True) if rank.trains)
    torch.set_num_threads(threads[world.rank])
    models_of = {rank.host: rank.cpu_model for rank in ranks}
    hosts = [
        Host(
            name=name, cores=cores, ranks=sum(rank.host == name for rank in ranks), cpu_model=models_of[name]
        )
        for name, cores in cpu_threads.cores_of_hosts(ranks).items()
    ]
    return threads[world.rank], hosts


def watchdog_of(plan: RunPlan, folder: RunFolder, world: World) -> Watchdog:
    """Watches the other ranks of this host for those that hang."""
    limits = Limits(plan.hang_timeout or math.inf, plan.step_timeout or math.inf)
    if world.in_threads:
        limits = Limits()  # ranks that are threads are one process: none of them can be ended alone
    return Watchdog(folder, rank=world.number, ranks=plan.processes, ledger=world.ledger, limits=limits)


def faults_of(plan: RunPlan, folder: RunFolder, world: World, poison: Callable[[], None]) -> NoFaults:
    """What is to strike this rank; `poison` makes its gradients no numbers. Raises ConfigError for what this
    machine cannot do."""
    if not plan.fault:
        return NoFaults()
    if any(fault.kind == "cut" for fault in plan.planned_faults) and not machine.can_cut_links():
        raise ConfigError("--fault cut takes links down, which needs the program ip and CAP_NET_ADMIN")
    return Faults(
        plan.planned_faults,
        folder.faults,
        rank=world.number,
        seed=plan.seed,
        exchanges=world,
        harm=ThreadHarm() if world.in_threads else ProcessHarm(),
        poison=poison,
    )


def begin_history(
    folder: RunFolder, start: Checkpoint | None, spares: list[Rank], world: World
) -> RunHistory:
    """What is known of the run as this sitting begins."""
    age_s = world.ledger.close().wall_ns / 1e9
    return RunHistory.begin(folder, start, spares, ranks=world.size, age_s=age_s)


@contextmanager
def stop_on_signal(world: World) -> Iterator[None]:
    """While inside, SIGINT, SIGTERM, SIGHUP and SIGUSR1 ask the run to stop at its next synchronisation."""

    def ask(number: int, _frame: FrameType | None) -> None:
        if world.stopping and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person asked twice: at once
        if number == signal.SIGHUP:
            leave_lost_terminal()
        world.stopping = True

    with handling(STOP, ask):
        yield
