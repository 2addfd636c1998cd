"""The hosts on which a run was asked for: what may be said of them, and what it means."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rankwise.errors import ConfigError


@dataclass(frozen=True)
class Host:
    """A host as it was asked for: a name or address that ssh knows, and how many ranks it takes."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


def hosts_asked_for(hosts: str | None, hostfile: Path | None) -> tuple[Host, ...]:
    """The hosts of `--hosts` or of `--hostfile`, none if neither was given. Raises ConfigError, one line."""
    if hostfile is not None and hosts is not None:
        raise ConfigError("--hosts and --hostfile were given: choose one")
    return parse_hosts(hosts) if hosts else read_hostfile(hostfile) if hostfile else ()


@functools.cache
def parse_hosts(text: str) -> tuple[Host, ...]:
    """Hosts as ``NAME:SLOTS,NAME:SLOTS``, one slot unless it says so. Raises ConfigError, one line."""
    return _once([_host(f"--hosts {text}", *_split(word)) for word in text.split(",")])


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Hosts of a file with a line ``NAME slots=N`` each, as mpiexec reads it. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the hostfile {path}: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].split()
        if words:
            slots = [word.partition("=")[2] for word in words[1:] if word.startswith("slots=")]
            found.append(_host(f"{path}, line {number}", words[0], slots[0] if slots else "1"))
    if not found:
        raise ConfigError(f"the hostfile {path} names no host: expected lines like: node1 slots=4")
    return _once(found)


def _split(word: str) -> tuple[str, str]:
    name, colon, slots = word.rpartition(":")
    return (name, slots) if colon else (word, "1")


def _host(where: str, name: str, slots: str) -> Host:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ConfigError(f"{where}: {name!r} is no name of a host; expected NAME:SLOTS, e.g. node1:4")
    if not (slots.isdecimal() and int(slots) > 0):
        raise ConfigError(f"{where}: host {name} has {slots!r} slots, expected a number of 1 or more")
    return Host(name, int(slots))


def _once(hosts: Iterable[Host]) -> tuple[Host, ...]:
    found: dict[str, Host] = {}
    for host in hosts:
        if found.setdefault(host.name, host) != host:
            raise ConfigError(
                f"host {host.name} was given with {found[host.name].slots} slots and with {host.slots}: "
                "give it once"
            )
    return tuple(found.values())
