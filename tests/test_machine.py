"""What the machine under this process is."""

from __future__ import annotations

import subprocess
import sys
import time

from rankwise.system import machine


def test_a_process_knows_when_it_started() -> None:
    """The start of a process lies between when it was asked for and when it could first look, to a tick."""
    code = "from rankwise.system import machine; print(machine.process_start_ns())"
    asked_ns = time.monotonic_ns()
    started_ns = int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    answered_ns = time.monotonic_ns()
    tick_ns = 10_000_000
    assert asked_ns - 2 * tick_ns <= started_ns <= answered_ns
    # Python alone takes longer to start than a tick: a start that were read too late would show.
    assert started_ns - asked_ns < answered_ns - started_ns


def test_freed_memory_is_kept() -> None:
    """Once asked for, memory that is freed serves the next allocation: the kernel gives no new pages."""
    code = (
        "import resource, torch; from rankwise.system import machine; machine.keep_freed_memory()\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for turn in range(20):\n"
        "    before = faults(); [torch.ones(1 << 20) for _ in range(8)]\n"
        "print(faults() - before)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    pages_of_one = (4 << 20) // 4096
    assert int(answer.stdout) < pages_of_one / 2


def test_processes_of_one_machine_read_one_clock() -> None:
    """Two processes on one machine name the same clock."""
    code = "from rankwise.system import machine; print(machine.clock_name())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    assert other.strip() == machine.clock_name()
