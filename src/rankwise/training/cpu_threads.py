"""How many arithmetic threads each rank gets, so that ranks share a host's cores and do not fight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rankwise.system import machine


@dataclass(frozen=True)
class RankPlacement:
    """Where a rank sits: its host, the cores on which it may run, its container's share of CPUs if
    that is limited, whether it trains (a master works while the others rest), and its processor."""

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
    """The seat of this process."""
    return RankPlacement(
        machine.host_name(),
        machine.cores_of(machine.allowed_cpus()),
        machine.cpu_quota(),
        trains,
        machine.cpu_model(),
        machine.multiplies_bf16(),
    )


def cores_of_hosts(seats: Sequence[RankPlacement]) -> dict[str, int]:
    """The cores that the ranks of each host may use together."""
    hosts: dict[str, int] = {}
    for name in dict.fromkeys(seat.host for seat in seats):
        there = [seat for seat in seats if seat.host == name]
        together = frozenset[int]().union(*(seat.cores for seat in there))
        quotas = [seat.quota for seat in there if seat.quota is not None]
        hosts[name] = machine.usable_cores(together, min(quotas, default=None))
    return hosts


def share_threads(seats: Sequence[RankPlacement], wish: int | Literal["auto", "all"]) -> list[int]:
    """Threads of each rank.

    ``auto``: a core that several working ranks may use counts in parts, rounded down, at least 1.
    ``all``: every core that the rank may use. A number is taken as it is.
    """
    if isinstance(wish, int):
        return [wish] * len(seats)
    if wish == "all":
        return [seat.usable for seat in seats]
    totals = cores_of_hosts(seats)
    threads = []
    for seat in seats:
        rivals = [other for other in seats if other.host == seat.host and other.trains]
        if not seat.trains or not rivals:
            threads.append(seat.usable)
            continue
        share = sum(1 / sum(core in rival.cores for rival in rivals) for core in seat.cores)
        fair = totals[seat.host] / len(rivals) if seat.quota is not None else share
        threads.append(max(1, int(min(share, fair) + 1e-9)))
    return threads


def oversubscribed(seats: Sequence[RankPlacement], threads: Sequence[int]) -> list[str]:
    """A warning for each host whose working ranks have more threads than there are cores."""
    warnings = []
    for host, cores in cores_of_hosts(seats).items():
        working = sum(n for seat, n in zip(seats, threads, strict=True) if seat.host == host and seat.trains)
        if working > cores:
            warnings.append(
                f"oversubscribed: {working} arithmetic threads of training ranks share {cores} "
                f"core{'s' if cores > 1 else ''} of {host}, so ranks take turns and each takes longer"
            )
    return warnings
