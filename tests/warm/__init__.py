"""Pythons that have imported torch already, for tests that start many processes.

`import torch` takes more than a second of a core, most of what a small run under mpiexec costs. So one
process (server.py) imports it, and what stands for `python` (stand_in.py) asks it to fork, hands over its
arguments, environment, folder and output, passes signals on, and ends as its fork ended. Tests in which
ranks are killed or stopped from outside, or whose subject is how a process starts or ends, run a Python of
their own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent


@contextmanager
def warm_python(folder: Path) -> Iterator[Path]:
    """The path of a stand-in for Python, whose server runs while inside; both live in `folder`."""
    place = folder / "socket"
    stand_in = folder / "python"
    stand_in.write_text(f"#!{sys.executable} -IS\n" + (HERE / "stand_in.py").read_text())
    stand_in.chmod(0o755)
    words = [sys.executable, str(HERE / "server.py"), str(place), str(stand_in)]
    # Its input ends when we do, however we end, and then so does it.
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        assert server.stdout.readline() == b"ready\n", "the server of warm Pythons did not start"
        try:
            yield stand_in
        finally:
            server.stdin.close()
            server.wait(10)
