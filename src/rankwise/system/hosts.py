"""The hosts on which a run was asked for: what may be said of them, and what it means."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rankwise.errors import ConfigError, one_line, unknown_name
from rankwise.system.files import misspelt

_SLOTS = ("slots", "slot", "count", "cpus", "cpu")
"""Keys by which hostfiles of Open MPI say how many ranks a host takes."""

_IGNORED = ("max_slots", "max-slots", "port", "binding", "ifname")
"""Keys of hostfiles that say nothing of that."""


@dataclass(frozen=True)
class Host:
    """A host as it was asked for: a name or address that ssh knows, how many ranks it takes, and as which
    user ssh goes there, empty for this one."""

    name: str
    slots: int
    user: str = ""

    def __str__(self) -> str:
        return f"{self.address}:{self.slots}"

    @property
    def address(self) -> str:
        """What ssh is called with."""
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def first_name(self) -> str:
        """The name up to its first dot, by which Open MPI knows a host; an address is no name."""
        return self.name if re.fullmatch(r"[\d.]+", self.name) else self.name.partition(".")[0]


def hosts_asked_for(hosts: str | None, hostfile: Path | None) -> tuple[Host, ...]:
    """The hosts of `--hosts` or of `--hostfile`, none if neither was given. Raises ConfigError, one line."""
    if hostfile is not None and hosts is not None:
        raise ConfigError("--hosts and --hostfile were given: choose one")
    if hosts is not None:
        return parse_hosts(hosts)
    return read_hostfile(hostfile) if hostfile is not None else ()


@functools.cache
def parse_hosts(text: str) -> tuple[Host, ...]:
    """Hosts as ``NAME:SLOTS,USER@NAME:SLOTS``, one slot unless it says so; what is given several times adds
    up, as in mpiexec. Raises ConfigError, one line."""
    return added_up([_host(f"--hosts {text}", *_split(word.strip())) for word in text.split(",")])


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Hosts of a file, as one of these writes it: Open MPI (``NAME slots=N``), MPICH (``NAME:N``), PBS and
    LSF (a line for each slot), Grid Engine (``NAME N QUEUE ...``). Raises ConfigError, one line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the hostfile {path}: {one_line(error)}{misspelt(path)}") from None
    found: list[Host] = []
    counted: dict[str, bool] = {}
    for number, line in enumerate(lines, start=1):
        text = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if not text:
            continue
        where = f"{path}, line {number}"
        host, says_slots = _of_line(where, text)
        if counted.setdefault(host.name, says_slots) != says_slots:
            raise ConfigError(
                f"{where}: host {host.name} stands in several lines, some with a number of slots and some "
                "without: give it one line with slots=N, or a line for each slot"
            )
        found.append(host)
    if not found:
        raise ConfigError(f"the hostfile {path} names no host: expected lines like: node1 slots=4")
    return added_up(found)


def _of_line(where: str, words: Sequence[str]) -> tuple[Host, bool]:
    """The host of a line, and whether that says its slots."""
    name, slots = _split(words[0])
    user = ""
    given = slots if ":" in words[0] else None
    for place, word in enumerate(words[1:]):
        key, equals, value = word.partition("=")
        if not equals and place == 0 and word.isdecimal():
            given = word
            break  # Grid Engine's: what follows is a queue
        if key in _SLOTS:
            given = value
        elif key in ("user", "username"):
            user = value
        elif key not in _IGNORED:
            raise ConfigError(f"{where}: {unknown_name('word', word, ('slots=N', 'user=NAME', *_IGNORED))}")
    host = _host(where, name, slots if given is None else given)
    if user:
        host = _host(where, f"{user}@{host.name}", str(host.slots))
    return host, given is not None


def _split(word: str) -> tuple[str, str]:
    name, colon, slots = word.rpartition(":")
    return (name, slots) if colon else (word, "1")


def _host(where: str, name: str, slots: str) -> Host:
    user, _, bare = name.rpartition("@")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bare) or (user == "") != ("@" not in name):
        raise ConfigError(f"{where}: {name!r} is no name of a host; expected NAME:SLOTS, e.g. node1:4")
    if user and not re.fullmatch(r"[A-Za-z_][\w.-]*", user):
        raise ConfigError(
            f"{where}: {user!r} is no name of a user; expected USER@NAME:SLOTS, e.g. me@node1:4"
        )
    if not (slots.isdecimal() and int(slots) > 0):
        raise ConfigError(f"{where}: host {bare} has {slots!r} slots, expected a number of 1 or more")
    return Host(bare, int(slots), user)


def added_up(hosts: Iterable[Host]) -> tuple[Host, ...]:
    """Each host once, with all of its slots, in the order of their first names. Raises ConfigError for a host
    with two users."""
    found: dict[str, Host] = {}
    for host in hosts:
        known = found.get(host.name)
        if known is not None and known.user != host.user:
            raise ConfigError(
                f"host {host.name} was given as {known.address} and as {host.address}: give it one user"
            )
        found[host.name] = replace(host, slots=host.slots + known.slots) if known else host
    return tuple(found.values())


def share_a_first_name(hosts: Sequence[Host]) -> bool:
    """Whether two of the hosts differ behind the first dot of their names only: ``n1.rack1``,
    ``n1.rack2``."""
    return len({host.first_name for host in hosts}) < len(hosts)
