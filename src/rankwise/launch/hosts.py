"""The hosts of a run: whether they answer, and whether they fit together."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rankwise.errors import LaunchError, TrainingError
from rankwise.plan import RunPlan
from rankwise.system import machine
from rankwise.system.hosts import Host

ANSWER_S = 10.0
"""How long a host may take to answer."""

AGENT = "PRTE_MCA_plm_ssh_agent"
"""Where Open MPI looks for what to call in place of ssh; so do we."""

PROBE = """
import json, platform, socket, sys
from importlib.metadata import version
from pathlib import Path
found = {"name": socket.gethostname(), "python": platform.python_version()}
boot = Path("/proc/sys/kernel/random/boot_id")
found |= {"machine": boot.read_text().strip() if boot.exists() else ""}
found |= {"sees": Path(sys.argv[1]).exists()}
found |= {name: version(name) for name in sys.argv[2:]}
print("rankwise-host", json.dumps(found))
"""

PACKAGES = ("rankwise", "mpi4py", "torch")
"""Packages that must be the same on all hosts."""


@dataclass(frozen=True)
class Answer:
    """What a host says of itself; `trouble` is why it does not answer, and empty if it does.

    `name` is what it calls itself, `versions` of Python and PACKAGES, `sees_folder` whether the run's folder
    is there, `machine` names its kernel's boot, which no other machine has.
    """

    name: str = ""
    versions: tuple[tuple[str, str], ...] = ()
    sees_folder: bool = False
    trouble: str = ""
    machine: str = ""


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
    _require_own_names(hosts, answers)
    return {host.name: answer.name for host, answer in zip(hosts, answers, strict=True)}


def _require_own_names(hosts: Sequence[Host], answers: Sequence[Answer]) -> None:
    """Hosts are told apart by what they call themselves, by MPI as by us: two machines of one name would be
    taken for one."""
    first: dict[str, tuple[Host, str]] = {}
    for host, answer in zip(hosts, answers, strict=True):
        other, its_machine = first.setdefault(answer.name, (host, answer.machine))
        if its_machine != answer.machine:
            raise LaunchError(
                f"hosts {other.name} and {host.name} both call themselves {answer.name}, so that MPI would "
                f"take "
                "them for one: give each a name of its own (hostnamectl set-hostname NAME), or leave one out"
            )


def differences(host: Host, answer: Answer) -> list[str]:
    """What a host has in another version than this one, a line each."""
    return [
        f"host {host.name} has {name} {theirs}, and this one {ours}: install the same everywhere"
        for (name, theirs), (_, ours) in zip(answer.versions, versions_here(), strict=True)
        if theirs != ours
    ]


def answering(hosts: Sequence[Host], folder: Path, say: Callable[[str], None]) -> list[Host]:
    """The hosts that still answer; others are reported to the user."""
    answers = ask(hosts, folder)
    for host, answer in zip(hosts, answers, strict=True):
        if answer.trouble:
            say(f"host {host.name} does not answer: {answer.trouble}")
    return [host for host, answer in zip(hosts, answers, strict=True) if not answer.trouble]


def fit(plan: RunPlan, hosts: Sequence[Host]) -> RunPlan:
    """The plan on these hosts, which are what is left: with fewer ranks if they do not fit, and batches by
    speed measured anew.

    Raises TrainingError if that are too few.
    """
    slots = sum(host.slots for host in hosts)
    ranks = min(plan.ranks, slots)
    if ranks < max(plan.min_ranks, 1 + plan.has_master):
        raise TrainingError(f"on the hosts that are left there is room for {slots} ranks, which are too few")
    return plan.with_options(
        hosts=",".join(map(str, hosts)),
        ranks=ranks,
        spares=min(plan.spares, slots - ranks),
        balance="none" if plan.balance == "none" else "measured",
    )


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
            program if is_here(host.name) else _elsewhere(host.address, program),
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
    return Answer(found["name"], versions, found["sees"], machine=found["machine"])


def _elsewhere(name: str, program: Sequence[str]) -> list[str]:
    agent = shlex.split(os.environ.get(AGENT, "ssh"))
    if Path(agent[0]).name == "ssh":
        agent += ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={ANSWER_S:.0f}"]
    words = ["env", *(f"{key}={value}" for key, value in passed_on().items()), *program]
    return [*agent, name, shlex.join(words)]


def passed_on() -> dict[str, str]:
    """Variables of this environment that ranks on other hosts need too."""
    return {name: os.environ[name] for name in ("PYTHONPATH", "XDG_CACHE_HOME") if name in os.environ}


def is_here(name: str) -> bool:
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
