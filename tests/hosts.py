"""Several hosts on one machine: network namespaces joined by a bridge, each with an address and a name."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from .processes import Belongings, Process

LETTERS = "abcdefgh"


def why_not() -> str | None:
    """Why this machine cannot make such hosts, None if it can."""
    for program in ("ip", "tc", "unshare"):
        if shutil.which(program) is None:
            return f"hosts on one machine need the program {program}"
    name = f"rwt{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"hosts on one machine need the right to make network namespaces: {done.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=False)
    return None


class Hosts:
    """Hosts that live while it is entered; afterwards nothing is left of them, nor of what ran there.

    `rates` are what each host's link carries in each direction, as tc says it ("100mbit"), None for as much
    as it can. Programs see the files of this machine, and its cores. A host calls itself by its name, or as
    `called` says, and is reached by that, with `domain` behind it, too.
    """

    def __init__(self, *rates: str | None, called: Sequence[str] = (), domain: str = "") -> None:
        self._mark = f"{os.getpid() % 100_000:05d}"
        subnet = f"10.{98 + os.getpid() // 250 % 100}.{os.getpid() % 250}"
        self.network = f"{subnet}.0/24"
        self.names = [f"rw{self._mark}{letter}" for letter, _ in zip(LETTERS, rates, strict=False)]
        self.called = list(called) or self.names
        self.full_names = [name + domain for name in self.called]
        self.addresses = [f"{subnet}.{number}" for number in range(1, len(rates) + 1)]
        self._rates = rates
        self._scratch = Path(tempfile.mkdtemp())
        self._belongings = Belongings()

    def __enter__(self) -> Hosts:
        bridge = f"rwb{self._mark}"
        try:
            _call("ip", "link", "add", bridge, "type", "bridge")
            _call("ip", "link", "set", bridge, "up")
            for name, address, rate in zip(self.names, self.addresses, self._rates, strict=True):
                outside = self._outside(name)
                _call("ip", "netns", "add", name)
                _call("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
                _call("ip", "link", "set", outside, "master", bridge, "up")
                _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
                _call("ip", "-n", name, "link", "set", "eth0", "up")
                _call("ip", "-n", name, "link", "set", "lo", "up")
                if rate:
                    limit = ("tbf", "rate", rate, "burst", "32kbit", "latency", "50ms")
                    _call("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *limit)  # what it sends
                    _call("tc", "qdisc", "add", "dev", outside, "root", *limit)  # what it gets
            self._write_agent()
        except BaseException:
            self._remove()
            self._belongings.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()
        left = [*self._belongings.close(), *self._left()]
        assert not left, f"left behind of hosts that are gone: {', '.join(left)}"

    def environment(self) -> dict[str, str]:
        """What Open MPI must know to find these hosts."""
        return {
            "PRTE_MCA_plm_ssh_agent": str(self._scratch / "agent"),
            "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
            "PRTE_MCA_prte_if_include": self.network,
            "OMPI_MCA_btl_tcp_if_include": self.network,
        }

    def on(self, host: int, *words: str) -> list[str]:
        """The command that runs another on a host."""
        name = self.names[host]
        script = f'hostname {self.called[host]}; exec "$@"'
        return ["ip", "netns", "exec", name, "unshare", "-u", "bash", "-c", script, "bash", *words]

    def start(
        self,
        *words: str,
        host: int = 0,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Process:
        """Run a command on a host."""
        return Process(
            self._belongings,
            self.on(host, *words),
            env=self._belongings.environment({**os.environ, **self.environment(), **(environment or {})}),
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def processes(self, host: int) -> list[int]:
        """What runs on a host."""
        done = subprocess.run(
            ["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False
        )
        return [int(word) for word in done.stdout.split()]

    def cut(self, host: int) -> None:
        """Take the link of a host down."""
        _call("ip", "-n", self.names[host], "link", "set", "eth0", "down")

    def _write_agent(self) -> None:
        """What stands for ssh: it drops options, takes the address, and runs the rest there."""
        cases = "\n".join(
            f"  {address}|{name}|{called}|{full}) name={name}; called={called};;"
            for name, address, called, full in zip(
                self.names, self.addresses, self.called, self.full_names, strict=True
            )
        )
        agent = self._scratch / "agent"
        agent.write_text(
            "#!/bin/bash\n"
            'while [[ "$1" == -* ]]; do [[ "$1" == -o ]] && shift; shift; done\n'
            f"case ${{1#*@}} in\n{cases}\n  *) echo no such host: $1 >&2; exit 255;;\nesac\nshift\n"
            "up=$(ip -n $name link show eth0 2>&1 | grep -c 'state UP')\n"
            "[[ $up == 1 ]] || { echo no route to $name >&2; exit 255; }\n"
            'exec ip netns exec "$name" unshare -u bash -c "hostname $called; $*"\n'
        )
        agent.chmod(0o755)

    def _outside(self, name: str) -> str:
        """The bridge's end of a host's link."""
        return f"rwv{self._mark}{name[-1]}"

    def _left(self) -> list[str]:
        """Namespaces and links that are still there."""
        spaces = [name for name in self.names if Path("/run/netns", name).exists()]
        links = [path.name for path in Path("/sys/class/net").glob(f"rw[bv]{self._mark}*")]
        return spaces + links

    def _remove(self) -> None:
        for host in range(len(self.names)):
            for pid in self.processes(host):
                subprocess.run(["kill", "-9", str(pid)], check=False, capture_output=True)
        for name in self.names:
            # Both ends of a link go with one, at once; with a namespace they would go some time later, and
            # their names might still be taken when the next hosts are made.
            subprocess.run(["ip", "link", "del", self._outside(name)], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
        subprocess.run(["ip", "link", "del", f"rwb{self._mark}"], check=False, capture_output=True)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _call(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True)
