"""What a batch system is to run: the options of a training, where the batch system has its say in some."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError


@dataclass(frozen=True)
class Work:
    """A training on a cluster: words of `rankwise train` without its folder, that folder, and how many ranks
    there are on how many hosts."""

    words: tuple[str, ...]
    out: Path | None
    ranks: int
    hosts: int

    @property
    def ranks_per_host(self) -> int:
        """Ranks on the host that has the most."""
        return -(-self.ranks // self.hosts)

    def lines(self, indent: str) -> str:
        """The words for a shell, an option a line."""
        lines: list[list[str]] = []
        for word in self.words:
            if word.startswith("--") or not lines:
                lines.append([])
            lines[-1].append(word)
        return "\n".join(indent + shlex.join(line) for line in lines)


def work_of(config: TrainConfig, hosts: int) -> Work:
    """The work of a configuration on a number of hosts.

    Raises ConfigError, one line, for what `rankwise train` would refuse wherever it ran, and for what is the
    batch system's to say.
    """
    from rankwise.launch.order import to_arguments  # what the command line imports must be quick to load
    from rankwise.plan import make_plan
    from rankwise.system.hosts import Host

    if config.hosts is not None or config.hostfile is not None:
        option = "--hosts" if config.hosts is not None else "--hostfile"
        raise ConfigError(f"{option} was given, but the batch system says which hosts: leave it out")
    if hosts < 1:
        raise ConfigError(f"{hosts} hosts were asked for: expected 1 or more")
    if config.processes < hosts:
        raise ConfigError(
            f"{config.processes} ranks cannot be on {hosts} hosts: ask for more with --ranks, or fewer hosts"
        )
    # Whether that MPI survives failures, and has the data, is found out there. Faults of hosts need --hosts.
    somewhere = {"hosts": str(Host("there", config.processes)), "data_dir": None}
    make_plan(config.model_copy(update=somewhere), mpi_survives=lambda: True)
    words = to_arguments(config.model_copy(update={"out": None}))
    return Work(tuple(words), config.out, config.processes, hosts)


def comment(words: Sequence[str]) -> str:
    """The command that wrote a file, for its head."""
    return "Written by: " + shlex.join(["rankwise", *words]).replace("\n", " ")
