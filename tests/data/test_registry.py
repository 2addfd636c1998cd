"""The names of datasets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.data import check, known, prepare
from rankwise.errors import DataError


def test_every_dataset_is_listed_with_what_it_is() -> None:
    """`known` has each pattern and one line about it."""
    listed = dict(known())
    assert set(listed) == {"cifar10", "cifar100", "digits", "folder:PATH", "synthetic:N", "module:function"}
    assert all(about and "\n" not in about for about in listed.values())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cifar", "did you mean 'cifar10'"),
        ("", "unknown dataset ''"),
        ("mnist", "known are cifar10, cifar100, digits, folder:PATH, module:function, synthetic:N"),
        ("syntetic:100", "did you mean 'synthetic:N'"),
        ("digits:8", "write digits"),
        ("folder:", "write folder:PATH"),
        ("folder", "write folder:PATH"),
        ("folder:/no/such\0place", "does not exist"),
        ("folder:/no/such/place", "does not exist"),
        ("folder:" + "x" * 5000, "does not exist"),
        ("synthetic", "synthetic:10000"),
        ("synthetic:", "synthetic:10000"),
        ("synthetic:abc", "synthetic:10000"),
        ("synthetic:-3", "synthetic:10000"),
        ("synthetic:9", "10 or more"),
        ("synthetic:1.5k", "synthetic:10000"),
        ("synthetic:" + "9" * 6000, "synthetic:10000"),
        ("no_such_module_here:function", "no module 'no_such_module_here'"),
        ("sys:exit", "no source file"),
        ("two words:function", "unknown dataset"),
    ],
)
def test_a_bad_spec_is_one_line_that_tells_what_to_do(spec: str, said: str, tmp_path: Path) -> None:
    """What is wrong with a dataset's name is found without decoding anything."""
    for attempt in (lambda: check(spec), lambda: prepare(spec, cache_dir=tmp_path)):
        with pytest.raises(DataError) as caught:
            attempt()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("spec", ["digits", "synthetic:10", "synthetic:2M", "cifar10", "cifar100"])
def test_a_good_spec_passes_the_check(spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Datasets that need no files are fine as they are, and CIFAR may be downloaded later; nothing is decoded
    or downloaded to find that out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check(spec)
    assert list(tmp_path.iterdir()) == []


def test_opening_a_prepared_dataset_imports_little(tmp_path: Path) -> None:
    """Ranks that open a finished dataset do not pay for decoders, downloads or torch."""
    prepare("synthetic:10", cache_dir=tmp_path)
    code = (
        "import sys, rankwise.data, pathlib;"
        f"rankwise.data.prepare('synthetic:10', cache_dir=pathlib.Path({str(tmp_path)!r}));"
        "heavy = ('torch', 'PIL', 'sklearn', 'urllib.request', 'filelock', 'mpi4py', 'rich');"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
