"""What containers, batch jobs and slices leave of a machine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.config import TrainConfig
from rankwise.doctor.installation import examine
from rankwise.launch import preflight
from rankwise.plan import resolve
from rankwise.system import limits
from rankwise.system.limits import cpu_quota, shared_memory_short

V2 = "30 24 0:26 {root} {top} rw,nosuid - cgroup2 cgroup2 rw\n"
V1 = "31 24 0:27 {root} {top} rw,nosuid - cgroup cgroup rw,cpu,cpuacct\n"


def process(folder: Path, groups: str, mounts: str) -> Path:
    """A /proc/self with these groups and mounts."""
    proc = folder / "proc"
    proc.mkdir(exist_ok=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text("20 1 0:1 / / rw - ext4 /dev/sda rw\n" + mounts)
    return proc


def group(folder: Path, cpus: float | None, version: int) -> None:
    """A group with a quota, or without one."""
    folder.mkdir(parents=True, exist_ok=True)
    if version == 2:
        (folder / "cpu.max").write_text(f"{'max' if cpus is None else int(cpus * 100_000)} 100000\n")
    else:
        (folder / "cpu.cfs_quota_us").write_text(f"{-1 if cpus is None else int(cpus * 50_000)}\n")
        (folder / "cpu.cfs_period_us").write_text("50000\n")


QUOTAS = st.lists(st.one_of(st.none(), st.sampled_from([0.5, 1.0, 1.5, 4.0, 16.0])), min_size=1, max_size=5)


@given(QUOTAS, st.sampled_from([1, 2]), st.booleans())
def test_the_smallest_quota_on_the_way_up_counts(
    tmp_path_factory: pytest.TempPathFactory, quotas: list[float | None], version: int, in_container: bool
) -> None:
    """In both versions of control groups, however deep, on a host and in a container that sees its own part
    of the tree under the host's name."""
    folder = tmp_path_factory.mktemp("machine")
    top = folder / "sys fs"
    names = ["user.slice", "user-1000.slice", "session.scope", "job", "step"][: len(quotas) - 1]
    place = top
    group(place, quotas[0], version)
    for name, quota in zip(names, quotas[1:], strict=True):
        place = place / name
        group(place, quota, version)
    root = "/kubepods/pod7" if in_container else "/"
    path = "/".join([root.rstrip("/"), *names]) or "/"
    line = f"0::{path}\n" if version == 2 else f"5:memory:/else\n4:cpu,cpuacct:{path}\n"
    mount = (V2 if version == 2 else V1).format(root=root, top=str(top).replace(" ", "\\040"))
    proc = process(folder, line, mount)
    assert cpu_quota(proc) == min((quota for quota in quotas if quota is not None), default=None)


def test_a_group_that_cannot_be_seen_has_no_say(tmp_path: Path) -> None:
    """A group of the host's tree of which nothing is mounted here, and a machine without control groups."""
    group(tmp_path / "top", 3.0, 2)
    proc = process(tmp_path, "0::/../../other/pod\n", V2.format(root="/", top=tmp_path / "top"))
    assert cpu_quota(proc) == 3.0
    assert cpu_quota(tmp_path / "nowhere") is None


def test_little_shared_memory_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 64 MB, as containers have, many ranks get one line that says how much they need and how to give
    it, before the run and from doctor; few ranks, and a run of one, get none."""
    monkeypatch.setattr("os.statvfs", lambda folder: SimpleNamespace(f_blocks=16384, f_frsize=4096))
    assert shared_memory_short(4) is None
    line = shared_memory_short(8)
    assert line is not None
    assert "/dev/shm has 67 MB, and 8 ranks on a host may need 134 MB" in line
    assert "--shm-size=128m" in line
    assert preflight.remarks(resolve(TrainConfig(dataset="digits", ranks=8))) == [line]
    assert preflight.remarks(resolve(TrainConfig(dataset="digits", ranks=2))) == []
    assert preflight.remarks(resolve(TrainConfig(dataset="digits", hosts="a:8"))) == []
    monkeypatch.setattr("rankwise.system.machine.usable_cores", lambda: 8)
    facts = examine(tmp_path)
    assert facts["shared_memory_bytes"] == 64 << 20
    assert line in facts["problems"]


def test_a_host_without_such_memory_says_nothing(tmp_path: Path) -> None:
    """Where there is no /dev/shm, MPI uses something else."""
    assert limits.shared_memory_short(100, tmp_path / "none") is None


def test_memory_is_told_as_the_ranks_own(tmp_path: Path) -> None:
    """What two processes have together counts half for each, so it is less than what is resident; a kernel
    that does not say is no error."""
    own = limits.pss_bytes()
    assert own is not None
    assert 0 < own <= psutil.Process().memory_info().rss * 1.1
    assert limits.pss_bytes(tmp_path) is None
