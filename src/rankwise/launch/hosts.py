"""The hosts of a run: which were asked for, whether they answer, and whether they fit together."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, LaunchError, TrainingError
from rankwise.system import machine

ANSWER_S = 10.0
"""How long a host may take to answer."""

AGENT = "PRTE_MCA_plm_ssh_agent"
"""Where Open MPI looks for what to call in place of ssh; so do we."""

PROBE = """
import json, platform, socket, sys
from importlib.metadata import version
from pathlib import Path
found = {"name": socket.gethostname(), "python": platform.python_version()}
found |= {"sees": Path(sys.argv[1]).exists()}
found |= {name: version(name) for name in sys.argv[2:]}
print("rankwise-host", json.dumps(found))
"""

PACKAGES = ("rankwise", "mpi4py", "torch")
"""Packages that must be the same on all hosts."""


@dataclass(frozen=True)
class Host:
    """A host as it was asked for: a name or address that ssh knows, and how many ranks it takes."""

    name: str
    slots: int

    def __str__(self) -> str:
        return f"{self.name}:{self.slots}"


@dataclass(frozen=True)
class Answer:
    """What a host says of itself; `trouble` is why it does not answer, and empty if it does.

    `name` is what it calls itself, `versions` of Python and PACKAGES, `sees_folder` whether the run's folder
    is there.
    """

    name: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    sees_folder: bool = False
    trouble: str = ""


def resolve_hosts(config: TrainConfig) -> TrainConfig:
    """The configuration with hosts from a file filled in, and as many ranks as they have slots unless it says
    how many. Raises ConfigError, one line."""
    found = asked_for(config.hosts, config.hostfile)
    if not found:
        return config
    changes: dict[str, object] = {"hosts": ",".join(map(str, found)), "hostfile": None}
    if "ranks" not in config.model_fields_set:
        slots = sum(host.slots for host in found)
        if slots <= config.spares:
            raise ConfigError(f"--spares {config.spares} on {slots} slots leaves none to train")
        changes["ranks"] = slots - config.spares
    return TrainConfig(**{**config.given(), **changes})


def asked_for(hosts: str | None, hostfile: Path | None) -> list[Host]:
    """The hosts of `--hosts` or of `--hostfile`, none if neither was given. Raises ConfigError, one line."""
    if hostfile is not None and hosts is not None:
        raise ConfigError("--hosts and --hostfile were given: choose one")
    return parse(hosts) if hosts else read(hostfile) if hostfile else []


def parse(text: str) -> list[Host]:
    """Hosts as ``NAME:SLOTS,NAME:SLOTS``, one slot unless it says so. Raises ConfigError, one line."""
    return _once([_host(f"--hosts {text}", *_split(word)) for word in text.split(",")])


def read(path: Path) -> list[Host]:
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


def _once(hosts: Iterable[Host]) -> list[Host]:
    found: dict[str, Host] = {}
    for host in hosts:
        if found.setdefault(host.name, host) != host:
            raise ConfigError(
                f"host {host.name} was given with {found[host.name].slots} slots and with {host.slots}: "
                "give it once"
            )
    return list(found.values())


def check(hosts: Sequence[Host], folder: Path) -> dict[str, str]:
    """What each host calls itself, by the name that was given.

    Raises LaunchError, one line, unless all answer, have the same versions, and see the folder.
    """
    answers = ask(hosts, folder)
    for host, answer in zip(hosts, answers, strict=True):
        if answer.trouble:
            raise LaunchError(f"host {host.name} cannot be used: {answer.trouble}")
        for difference in differences(host, answer):
            raise LaunchError(difference)
        if not answer.sees_folder:
            raise LaunchError(
                f"host {host.name} does not see the run folder {folder}: choose an --out on a file system "
                "that all hosts share"
            )
    return {host.name: answer.name for host, answer in zip(hosts, answers, strict=True)}


def differences(host: Host, answer: Answer) -> list[str]:
    """What a host has in another version than this one, a line each."""
    return [
        f"host {host.name} has {name} {theirs}, and this one {ours}: install the same everywhere"
        for (name, theirs), (_, ours) in zip(answer.versions, versions_here(), strict=True)
        if theirs != ours
    ]


def answering(hosts: Sequence[Host], folder: Path, say: Callable[[str], None]) -> list[Host]:
    """The hosts that still answer; the user is told of others."""
    answers = ask(hosts, folder)
    for host, answer in zip(hosts, answers, strict=True):
        if answer.trouble:
            say(f"host {host.name} does not answer: {answer.trouble}")
    return [host for host, answer in zip(hosts, answers, strict=True) if not answer.trouble]


def fit(config: TrainConfig, hosts: Sequence[Host]) -> TrainConfig:
    """The configuration on these hosts, which are what is left: with fewer ranks if they do not fit.

    Raises TrainingError if that are too few.
    """
    slots = sum(host.slots for host in hosts)
    ranks = min(config.ranks, slots)
    if ranks < max(config.min_ranks, 1 + config.has_master):
        raise TrainingError(f"on the hosts that are left there is room for {slots} ranks, which are too few")
    where = ",".join(map(str, hosts))
    changes: dict[str, object] = {"hosts": where, "ranks": ranks, "spares": min(config.spares, slots - ranks)}
    if config.balance != "none":
        changes["balance"] = "measured"
    return config.model_copy(update=changes)


def ask(hosts: Sequence[Host], folder: Path) -> list[Answer]:
    """What each host answers, all asked at once; it takes ANSWER_S seconds at most."""
    if not hosts:
        return []
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda host: _ask(host, folder), hosts))


def _ask(host: Host, folder: Path) -> Answer:
    program = [sys.executable, "-c", PROBE, str(folder.absolute()), *PACKAGES]
    try:
        done = subprocess.run(
            program if _is_here(host.name) else _elsewhere(host.name, program),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer(trouble=f"no answer within {ANSWER_S:g} s")
    except OSError as error:
        return Answer(trouble=f"cannot call {error.filename}: {error.strerror}")
    told = re.search(r"^rankwise-host (.*)$", done.stdout, re.MULTILINE)
    if told is None:
        words = " ".join((done.stderr or done.stdout).split())[-300:]
        return Answer(trouble=words or f"it ended with code {done.returncode}")
    found = json.loads(told[1])
    versions = tuple((name, found[name]) for name in ("python", *PACKAGES))
    return Answer(found["name"], versions, found["sees"])


def _elsewhere(name: str, program: Sequence[str]) -> list[str]:
    agent = shlex.split(os.environ.get(AGENT, "ssh"))
    if Path(agent[0]).name == "ssh":
        agent += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_S:.0f}"]
    words = ["env", *(f"{key}={value}" for key, value in passed_on().items()), *program]
    return [*agent, name, shlex.join(words)]


def passed_on() -> dict[str, str]:
    """Variables of this environment that ranks on other hosts need too."""
    return {name: os.environ[name] for name in ("PYTHONPATH", "XDG_CACHE_HOME") if name in os.environ}


def _is_here(name: str) -> bool:
    """Whether this machine has this name or address."""
    if name in ("localhost", machine.host_name()):
        return True
    try:
        family, kind, _, _, address = socket.getaddrinfo(name, 0, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def versions_here() -> list[tuple[str, str]]:
    """What must be the same on all hosts, as it is on this one."""
    return [("python", platform.python_version()), *((name, version(name)) for name in PACKAGES)]
