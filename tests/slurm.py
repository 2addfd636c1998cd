"""A Slurm of one node on this machine: its daemons with files of their own, ended afterwards."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from rankwise.system import machine

_DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*_DAEMONS, "sbatch", "scontrol")
PACKAGES = ("slurm-wlm", "munge")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"

_CONF = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1
SwitchType=switch/none
MpiDefault=none
KillWait=5
ReturnToService=2
NodeName=localhost NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def why_not() -> str | None:
    """Why no Slurm can run here, None if one can. As root Debian's packages are installed."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    if not _programs():
        for words in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", *PACKAGES]):
            if shutil.which("apt-get"):
                environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
                subprocess.run(
                    ["apt-get", *words], env=environment, capture_output=True, check=False, timeout=300
                )
    return None if _programs() else f"no Slurm here, and {' and '.join(PACKAGES)} cannot be installed"


def _programs() -> bool:
    return all(shutil.which(program, path=PATH) for program in PROGRAMS)


class Slurm:
    """Runs while it is entered. `run` calls its programs."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        os.chmod(self.folder, 0o755)
        for name in ("munge", "state", "spool"):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        ports = _free_ports(2)
        conf = _CONF.format(folder=self.folder, ports=ports, cores=max(2, len(machine.allowed_cpus())))
        (self.folder / "slurm.conf").write_text(conf)
        munge = self.folder / "munge"
        try:
            self._start(
                "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={munge}/socket",
                f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
            )  # fmt: skip
            _until((munge / "socket").exists)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", "localhost")
            _until(lambda: "idle" in self.run("sinfo", "-h", "-o", "%T").lower())
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if len(self._daemons) == len(_DAEMONS):  # or a job of a test that failed would outlive it
            self.run("scancel", f"--user={os.getuid()}")
            with contextlib.suppress(AssertionError):
                _until(lambda: not self.run("squeue", "-h").strip(), 15)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait(10)
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def environment(self) -> dict[str, str]:
        """What its programs need to find it."""
        return {**os.environ, "PATH": PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *words: str, cwd: Path | None = None, check: bool = False) -> str:
        """What one of its programs prints."""
        done = subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=30
        )
        assert not (check and done.returncode), done.stderr
        return done.stdout

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job."""
        words = self.run("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def words(self) -> str:
        """The last words of its daemons, for when a test fails."""
        logs = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{log.name}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)

    def _start(self, program: str, *words: str) -> None:
        path = shutil.which(program, path=PATH)
        assert path
        with (self.folder / f"{program}.log").open("wb") as log:
            daemon = subprocess.Popen(
                [path, *words], env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._daemons.append(daemon)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _until(happened: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, "Slurm did not come up in time"
        time.sleep(0.1)
