"""Writing a job's file, and giving it to the batch system."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rankwise.errors import ConfigError, LaunchError, StorageError, one_line
from rankwise.system.files import write_atomically

PATIENCE_S = 60.0
"""How long a batch system may take to accept a job."""


def hand_over(text: str, to: Path | None, program: Sequence[str] | None) -> str:
    """Write the file, if it has a path, and give it to `program`, if there is one; returns what the user is
    told: the program's answer, else the path, else the file itself.

    Raises ConfigError or LaunchError, one line.
    """
    if program and not shutil.which(program[0]):
        raise ConfigError(
            f"--run needs {program[0]}, which is not on the PATH: run it where the batch system is, or write "
            "the file with --to FILE and take it there"
        )
    if to is not None:
        try:
            write_atomically(to, text.encode())
        except StorageError as error:
            raise ConfigError(one_line(error)) from None
    if not program:
        return f"written: {to}" if to else text.rstrip("\n")
    try:
        done = subprocess.run(
            list(program), input=text, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise LaunchError(f"{program[0]} gave no answer within {PATIENCE_S:g} s") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())[:300]
        raise LaunchError(f"{program[0]} refused the job: {words or f'code {done.returncode}'}")
    return done.stdout.strip()
