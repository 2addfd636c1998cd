"""Other people's tools, in a folder of their own: Extra-P wants numpy 1 and TALP's pages bring a browser, so
they are no part of the environment in which rankwise is tested."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from filelock import FileLock

LINES = Path(__file__).with_suffix(".txt")
BUILD = Path(__file__).parents[1] / "build"


def find_or_install() -> Path | None:
    """The folder with the readers; they are installed from the package index if they are missing. None if
    that fails."""
    wanted = LINES.read_bytes() + sys.version.encode()
    place = BUILD / f"readers-{hashlib.sha256(wanted).hexdigest()[:12]}"
    BUILD.mkdir(exist_ok=True)
    with FileLock(BUILD / ".readers.lock"):
        if not place.exists():
            new = Path(tempfile.mkdtemp(dir=BUILD, prefix=".readers-"))
            words = [
                "install",
                "--quiet",
                "--no-deps",
                "--no-compile",
                "--target",
                str(new),
                "-r",
                str(LINES),
            ]
            done = subprocess.run(
                [sys.executable, "-m", "pip", *words], check=False, capture_output=True, timeout=600
            )
            if done.returncode:
                shutil.rmtree(new)
                return None
            new.rename(place)
    return place


def ask(readers: Path, program: str, *words: str | Path) -> Any:
    """What a program that uses the readers prints as JSON on its last line."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(readers), "MPLBACKEND": "agg", "PYTHONDONTWRITEBYTECODE": ""},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
