"""What the machine under this process is, and how much of it this process may use."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

from rankwise.system import limits


def host_name() -> str:
    """Name of this host, as other hosts would call it."""
    return socket.gethostname()


@cache
def version_of(package: str) -> str:
    """Version of an installed package. It is kept: finding it reads all that the package says of itself."""
    return metadata.version(package)


def allowed_cpus() -> frozenset[int]:
    """Logical CPUs on which this process may run (its cpuset and binding)."""
    return frozenset(os.sched_getaffinity(0))


def cores_of(cpus: frozenset[int]) -> frozenset[int]:
    """The physical cores behind logical CPUs, each named by its lowest CPU.

    Arithmetic gains little from a second hardware thread on a core, so shares are counted in cores.
    """
    return frozenset(min(_siblings(cpu) & cpus) for cpu in cpus)


def _siblings(cpu: int) -> frozenset[int]:
    """CPUs on the same core, `cpu` included."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        text = path.read_text()
    except OSError:
        return frozenset({cpu})
    found = {cpu}
    for part in text.strip().split(","):
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)


def cpu_quota() -> float | None:
    """CPUs that the control groups grant (containers, batch jobs), or None without a limit."""
    return limits.cpu_quota()


def usable_cores(cores: frozenset[int] | None = None, quota: float | None = None) -> int:
    """Whole cores that can be kept busy of `cores` under a `quota` of CPUs; at least 1.

    Without arguments those of this process: its cpuset and its control group.
    """
    if cores is None:
        cores, quota = cores_of(allowed_cpus()), cpu_quota()
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return os.uname().machine


def multiplies_bf16() -> bool:
    """Whether the processor has instructions for bfloat16 (AVX-512 BF16, AMX, Arm's), or does it by way of
    float32."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    flags = {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def keep_freed_memory() -> None:
    """Ask glibc's allocator to keep what this process frees for what it allocates next.

    By default large blocks go back to the kernel at once, and a training step that frees its activations pays
    for clearing the same pages again in the next one.
    """
    m_trim_threshold, m_mmap_threshold, most = -1, -3, 1 << 30
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and others have none
    if mallopt is not None:
        mallopt(m_trim_threshold, most)
        mallopt(m_mmap_threshold, most)


_started: list[int] = []


def was_started_as(pid: int) -> None:
    """This process was forked from another one for `pid`, which is what was started, and ends with it."""
    _started[:] = [pid]


def started_process() -> int:
    """The process that was started for what this one does: this one, unless it was forked for another."""
    return _started[0] if _started else os.getpid()


def process_start_ns() -> int:
    """When this process started, on `time.monotonic_ns`'s clock (to 10 ms, the kernel's tick)."""
    # Not from its wall-clock time: that counts from the second of the boot, rounded down.
    started_ns = (start_ticks(started_process()) or 0) * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    return time.monotonic_ns() - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - started_ns)


def start_ticks(pid: int) -> int | None:
    """When a process started, in kernel ticks since the boot; None if there is none of that number."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return None


def sessions(leaders: Collection[int]) -> list[int]:
    """The live processes of the sessions that these processes began, whether they still live or not."""
    return [process.pid for process in psutil.process_iter() if _is_in_session(process, leaders)]


def _is_in_session(process: psutil.Process, leaders: Collection[int]) -> bool:
    try:
        return os.getsid(process.pid) in leaders and process.status() != psutil.STATUS_ZOMBIE
    except (OSError, psutil.NoSuchProcess):  # it has just ended
        return False


def die_with_parent(how: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent is gone, even by kill -9. One that was forked
    for another ends with that one already."""
    pr_set_pdeathsig = 1
    if not _started:
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, how)


def outlive_parent() -> None:
    """Take that back."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, 0)


def kill_self() -> None:
    """End this process at once, as kill -9 does. A rank that left in any other way would end its MPI job, or
    hang the ranks that repair the world."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGKILL)


def drop_host() -> None:
    """End this process, its parent, and all that the parent started, as if the host had lost power."""
    me = psutil.Process(started_process())
    parent = me.parent()
    for child in parent.children() if parent else ():
        if child.pid != me.pid:
            child.kill()
    if parent:
        parent.kill()
    os.kill(os.getpid(), signal.SIGKILL)


def can_cut_links() -> bool:
    """Whether this process may take the host's network links down."""
    cap_net_admin = 12
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> cap_net_admin & 1) and shutil.which("ip") is not None
    return False


def cut_links() -> None:
    """Take all network links of this host down but the one to itself."""
    for _, name in socket.if_nameindex():
        if name != "lo":
            subprocess.run(["ip", "link", "set", name, "down"], check=False, capture_output=True)


def clock_name() -> str:
    """Names the clock behind `time.monotonic_ns`: processes with the same name read the same clock.

    It is that of one boot of one kernel, but for processes in a time namespace of their own.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/time')}"
    except OSError:
        return host_name()


def cpu_seconds() -> float:
    """CPU time that this process has used, user and system, in seconds."""
    times = os.times()
    return times.user + times.system


def max_rss_bytes() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return psutil.virtual_memory().total
