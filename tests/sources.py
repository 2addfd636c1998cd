"""The source archive of mpi4py, whose demo programs its wheel leaves out."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from .readers import BUILD


def find_or_unpack() -> Path | None:
    """The folder with the sources of the mpi4py that is installed; they come from the package index if they
    are missing. None if that fails."""
    version = metadata.version("mpi4py")
    place = BUILD / f"mpi4py-{version}"
    BUILD.mkdir(exist_ok=True)
    with FileLock(BUILD / ".mpi4py.lock"):
        if not place.exists():
            new = Path(tempfile.mkdtemp(dir=BUILD, prefix=".mpi4py-"))
            words = ("download", "--quiet", "--no-deps", "--no-binary", ":all:", "--no-build-isolation")
            done = subprocess.run(
                [sys.executable, "-m", "pip", *words, f"mpi4py=={version}", "--dest", str(new)],
                check=False,
                capture_output=True,
                timeout=600,
            )
            archives = [*new.glob("*.tar.gz")]
            if done.returncode or not archives:
                shutil.rmtree(new)
                return None
            with tarfile.open(archives[0]) as archive:
                archive.extractall(new, filter="data")
            (new / f"mpi4py-{version}").rename(place)
            shutil.rmtree(new)
    return place
