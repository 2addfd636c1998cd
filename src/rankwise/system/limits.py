"""What a container, a batch job or a systemd slice leaves of the machine: CPUs and shared memory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
SHARED_MEMORY = Path("/dev/shm")

BYTES_A_RANK = 16 << 20
"""Shared memory that a rank may come to use: Open MPI 5 makes a file of 16 MiB for each, of which it writes
what it needs; MPICH 5 takes 5.4 MB at once."""


def cpu_quota(proc: Path = PROC) -> float | None:
    """CPUs that the control groups grant, or None without a limit: the smallest quota on the way from this
    process's own group to the topmost that can be seen, in both versions of control groups."""
    found = [quota for folder in _groups(proc) for quota in [_quota_of(folder)] if quota is not None]
    return min(found, default=None)


def _quota_of(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _groups(proc: Path) -> Iterator[Path]:
    """The folders of this process's group and of those above it, in each hierarchy that limits CPUs."""
    try:
        groups = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = list(_mounts((proc / "mountinfo").read_text()))
    except (OSError, ValueError):
        return
    for _, controllers, path in groups:
        for kind, options, root, top in mounts:
            is_ours = kind == "cgroup2" if not controllers else kind == "cgroup" and "cpu" in options
            if is_ours and (not controllers or "cpu" in controllers.split(",")):
                yield from _upwards(top, _below(path, root))


def _mounts(text: str) -> Iterator[tuple[str, list[str], str, Path]]:
    """Kind, options, root and place of each mounted hierarchy (proc_pid_mountinfo(5))."""
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            root, top = (
                re.sub(r"\\(\d{3})", lambda o: chr(int(o[1], 8)), word) for word in left.split()[3:5]
            )
            yield kind, options.split(","), root, Path(top)


def _below(path: str, root: str) -> str:
    """A group's path below what is mounted, which in a container is a part of the host's tree."""
    inside = path[len(root) :] if root != "/" and f"{path}/".startswith(f"{root}/") else path
    return os.path.normpath("/" + inside).strip("/")


def _upwards(top: Path, path: str) -> Iterator[Path]:
    folder = top / path
    while folder != top:
        yield folder  # of which nothing may be seen from here
        folder = folder.parent
    yield top


def pss_bytes(proc: Path = PROC) -> int | None:
    """Memory of this process that is its own, and its share of what it has together with others, such as the
    files of torch, which each rank's resident memory counts anew; None where the kernel does not say."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", (proc / "smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def shared_memory_bytes(folder: Path = SHARED_MEMORY) -> int | None:
    """Size of the memory through which the ranks of this host exchange, None where there is none such."""
    try:
        its = os.statvfs(folder)
    except OSError:
        return None
    return its.f_blocks * its.f_frsize


def shared_memory_short(ranks: int, folder: Path = SHARED_MEMORY) -> str | None:
    """One line if that many ranks may come to need more shared memory than there is, as in a container with
    64 MB; None otherwise."""
    there, needed = shared_memory_bytes(folder), ranks * BYTES_A_RANK
    if there is None or there >= needed:
        return None
    return (
        f"{folder} has {there / 1e6:.0f} MB, and {ranks} ranks on a host may need {needed / 1e6:.0f} MB: one "
        f"that "
        f"finds it full dies of a bus error; give the container more (docker or podman run "
        f"--shm-size={-(-needed >> 20)}m; in Kubernetes an emptyDir with medium: Memory mounted there)"
    )
