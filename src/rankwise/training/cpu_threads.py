"""How many arithmetic threads each rank gets, so that ranks share the cores of a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rankwise.system import machine


@dataclass(frozen=True)
class RankPlacement:
    """Where a rank runs: its host, the cores on which it may run, its container's quota of CPUs (None without
    a limit), whether it trains (a master works while the others rest), and its processor."""

    host: str
    cores: frozenset[int]
    quota: float | None
    trains: bool
    cpu_model: str = ""
    multiplies_bf16: bool = True

    @property
    def usable(self) -> int:
        """Whole cores that this rank alone could keep busy."""
        return machine.usable_cores(self.cores, self.quota)


def here(*, trains: bool) -> RankPlacement:
    """Where this process runs."""
    return RankPlacement(
        machine.host_name(),
        machine.cores_of(machine.allowed_cpus()),
        machine.cpu_quota(),
        trains,
        machine.cpu_model(),
        machine.multiplies_bf16(),
    )


def cores_of_hosts(ranks: Sequence[RankPlacement]) -> dict[str, int]:
    """The number of cores that the ranks of each host may use together, by host name."""
    hosts: dict[str, int] = {}
    for name in dict.fromkeys(rank.host for rank in ranks):
        there = [rank for rank in ranks if rank.host == name]
        together = frozenset[int]().union(*(rank.cores for rank in there))
        quotas = [rank.quota for rank in there if rank.quota is not None]
        hosts[name] = machine.usable_cores(together, min(quotas, default=None))
    return hosts


def share_threads(ranks: Sequence[RankPlacement], threads: int | Literal["auto", "all"]) -> list[int]:
    """Arithmetic threads of each rank.

    ``auto`` divides a core among the working ranks that may use it, and rounds the sum of a rank's parts
    down, to 1 at least. ``all`` gives each rank every core that it may use. A number is taken as it is.
    """
    if isinstance(threads, int):
        return [threads] * len(ranks)
    if threads == "all":
        return [rank.usable for rank in ranks]
    totals = cores_of_hosts(ranks)
    shares = []
    for rank in ranks:
        rivals = [other for other in ranks if other.host == rank.host and other.trains]
        if not rank.trains or not rivals:
            shares.append(rank.usable)
            continue
        share = sum(1 / sum(core in rival.cores for rival in rivals) for core in rank.cores)
        fair = totals[rank.host] / len(rivals) if rank.quota is not None else share
        shares.append(max(1, int(min(share, fair) + 1e-9)))
    return shares


def oversubscribed(ranks: Sequence[RankPlacement], threads: Sequence[int]) -> list[str]:
    """A warning for each host whose working ranks have more threads than there are cores."""
    warnings = []
    for host, cores in cores_of_hosts(ranks).items():
        working = sum(n for rank, n in zip(ranks, threads, strict=True) if rank.host == host and rank.trains)
        if working > cores:
            warnings.append(
                f"oversubscribed: {working} arithmetic threads of training ranks share {cores} "
                f"core{'s' if cores > 1 else ''} of {host}, so ranks take turns and each takes longer"
            )
    return warnings
