"""Hosts with clocks of their own, as time namespaces of one machine: the truth is known."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import Command, mpiexec_words

pytestmark = [pytest.mark.mpi, pytest.mark.alone, pytest.mark.timeout(120)]


def may_unshare_time() -> bool:
    """Whether this user may start a process whose monotonic clock is shifted."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-T", "--monotonic", "1", "true"], capture_output=True).returncode == 0


@pytest.mark.skipif(not may_unshare_time(), reason="needs the right to make time namespaces (root)")
@pytest.mark.parametrize("ahead_s", [[1000], [-500, 86400], [1000, 500, 40, 86400]])
def test_clocks_of_several_hosts_are_aligned(command: Command, ahead_s: list[int]) -> None:
    """Ranks whose clocks are hours apart are aligned within the bound that is told, and a delay is charged
    to its rank as on one host."""
    program = [sys.executable, str(Path(__file__).with_name("clocks.py"))]
    words = [*mpiexec_words(1), *program, "0"]
    for ahead in ahead_s:
        words += [":", "-n", "1", "unshare", "-T", "--monotonic", str(ahead), *program, str(ahead)]
    done = command(*words)
    assert done.code == 0, done
    assert len(done.out.splitlines()) == 1 + len(ahead_s)
