"""Whatever stands in files that come from outside: the answer is one line, and never a traceback."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from rankwise import cli
from rankwise.config import TrainConfig, read_toml
from rankwise.errors import ConfigError, RankwiseError, ResumeError, TimelineError
from rankwise.ledger.timeline import read_timeline
from rankwise.runs import checkpoint
from rankwise.runs.folder import RunFolder

from . import effort, records, tiny

anywhere = effort.examples(50, 200, suppress_health_check=[HealthCheck.function_scoped_fixture])

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
    st.just({"a": {"b": None}}),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a JSON value."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from places(part, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], leaf: Any) -> Any:
    """The value with something else at a place."""
    if not path:
        return leaf
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], leaf)
    return value


@contextmanager
def at_most(kind: type[RankwiseError], words: str = "") -> Iterator[None]:
    """The block succeeds, or raises this error, in one line with these words in it."""
    told = words
    try:
        yield
    except kind as error:
        told = str(error)
    assert "\n" not in told
    assert words in told


def exit_code(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(list(words))
    return int(end.value.code or 0)


@anywhere
@given(content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_config_files(tmp_path: Path, content: bytes) -> None:
    """Any bytes as --config are options, or one line."""
    path = tmp_path / "options.toml"
    path.write_bytes(content)
    with at_most(ConfigError):
        TrainConfig(**read_toml(path))


@anywhere
@given(option=st.sampled_from(sorted(TrainConfig.model_fields)), value=LEAVES)
def test_values_of_options(option: str, value: Any) -> None:
    """Any value of any option is one that it takes, or one line that names the option."""
    with at_most(ConfigError, option.replace("_", "-")):
        TrainConfig(**{option: value})


@anywhere
@given(data=st.data())
def test_records(tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject) -> None:
    """A record with anything in any place is compared, or answered with one line and code 2."""
    plain = json.loads(records.record().model_dump_json())
    path = data.draw(st.sampled_from(list(places(plain))))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir(exist_ok=True)
    folder.record.write_text(json.dumps(replaced(plain, path, data.draw(LEAVES))))
    other = RunFolder(tmp_path / "other")
    other.path.mkdir(exist_ok=True)
    other.record.write_text(json.dumps(plain))
    try:
        cli.main(["compare", str(folder.path), str(other.path)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    err = capsys.readouterr().err
    assert code in (0, 2), err
    assert "Traceback" not in err
    assert code == 0 or err.count("\n") == 1


@anywhere
@given(data=st.data(), format=st.sampled_from(["talp", "mlperf", "csv", "extrap"]))
def test_records_that_are_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject, format: str
) -> None:
    """A record with anything in any place is exported, or answered with one line and code 2."""
    epochs = [
        row.model_copy(update={"evaluation_s": 0.5, "since_launch_s": 2.0 * row.epoch})
        for row in records.epochs(2)
    ]
    plain, other = (
        json.loads(
            records.record(ranks, epochs=epochs, launched_at="2026-11-22T16:18:00.5+00:00").model_dump_json()
        )
        for ranks in (3, 2)
    )
    path = data.draw(st.sampled_from(list(places(plain))))
    changed = replaced(plain, path, data.draw(LEAVES))
    for name, content in (("run", changed), ("other", other)):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "record.json").write_text(json.dumps(content))
    runs = [str(tmp_path / name) for name in (["run", "other"] if format == "extrap" else ["run"])]
    output = tmp_path / "output"
    output.unlink(missing_ok=True)
    try:
        cli.main(["export", *runs, "--format", format, "--output", str(output)])
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    err = capsys.readouterr().err
    assert code in (0, 2), (path, err)
    assert output.exists() == (code == 0)
    assert code == 0 or err.count("\n") == 1


def whole_timeline(tmp_path: Path) -> bytes:
    """The bytes of a timeline that can be read."""
    folder = records.run_folder(tmp_path / "whole", records.record(), steps=3)
    return sorted(folder.timeline.iterdir())[0].read_bytes()


@anywhere
@given(data=st.data())
def test_timelines(tmp_path: Path, data: st.DataObject) -> None:
    """A timeline that was cut, changed or made up is read, or answered with one line."""
    if not (tmp_path / "content").exists():
        (tmp_path / "content").write_bytes(whole_timeline(tmp_path))
    content = bytearray((tmp_path / "content").read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "rank-0000.npz"
    path.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]))
    with at_most(TimelineError):
        read_timeline(path)


def header(shape: str, dtype: str) -> bytes:
    """The first bytes of an array file that claims this shape."""
    words = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    words += b" " * (-(len(words) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(words).to_bytes(2, "little") + words


@pytest.mark.parametrize("shape", ["(10**13,)", "(10000000000000,)", "(-1,)", "()", "(2, 3)", "'x'"])
def test_a_timeline_that_claims_to_be_large(tmp_path: Path, shape: str) -> None:
    """An array of 80 TB in a file of a kilobyte, or of a shape that is none, is refused."""
    path = tmp_path / "rank-0000.npz"
    with zipfile.ZipFile(path, "w") as file:
        for name in ("about", "epochs", "steps", "spans", "exchanges"):
            file.writestr(f"{name}.npy", header(shape, "<f8"))
    with pytest.raises(TimelineError):
        read_timeline(path)


def test_a_timeline_that_is_a_bomb(tmp_path: Path) -> None:
    """Gigabytes of zeros in a small file are refused before they are unpacked."""
    path = tmp_path / "rank-0000.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("spans.npy", bytes(2**20))
        file.filelist *= 1100  # it is listed 1,100 times, and lies there once
    assert path.stat().st_size < 2e6
    with pytest.raises(TimelineError, match="would unpack to 1,153,433,600 bytes"):
        read_timeline(path)


@anywhere
@given(data=st.data())
def test_manifests_of_checkpoints(tmp_path: Path, data: st.DataObject) -> None:
    """A manifest with anything in any place, outside paths too, is believed or refused in one line."""
    notes = {"epochs": [], "samples": {"expected": 0}, "rounds": 0, "config": {}}
    plain = {"epoch": 1, "workers": 1, "files": {"model.safetensors": "0" * 64}, "notes": notes}
    path = data.draw(st.sampled_from(list(places(plain))))
    leaf = data.draw(st.one_of(LEAVES, st.just({"../../secret": "0" * 64}), st.just({"/etc/passwd": "0"})))
    place = tmp_path / "epoch-0001"
    place.mkdir(exist_ok=True)
    (place / checkpoint.MANIFEST).write_text(json.dumps(replaced(plain, path, leaf)))
    with at_most(ResumeError):
        checkpoint.verify(place)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff\xfe", b"{", b"null", b"NaN", b""])
def test_what_is_no_json(tmp_path: Path, content: bytes) -> None:
    """Records and manifests that are nested without end, of other bytes, or empty, are damaged."""
    folder = RunFolder(tmp_path)
    folder.record.write_bytes(content)
    with pytest.raises(ResumeError):
        folder.read()
    (tmp_path / checkpoint.MANIFEST).write_bytes(content)
    with pytest.raises(ResumeError):
        checkpoint.verify(tmp_path)


def test_notes_that_fit_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint whose notes were changed is refused in one line."""
    words = ["train", "--dataset", tiny.DATASET, "--model", tiny.MODEL, "--ranks", "1"]
    cli.main([*words, "--epochs", "1", "--out", str(tmp_path / "run")])
    for manifest in (tmp_path / "run/checkpoints").glob("*/manifest.json"):
        content = json.loads(manifest.read_bytes())
        content["notes"] = {"epochs": [{"epoch": "first"}]}
        manifest.write_text(json.dumps(content))
    capsys.readouterr()
    assert exit_code("train", "--resume", str(tmp_path / "run"), "--epochs", "2") == 2
    err = capsys.readouterr().err
    assert [line for line in err.splitlines() if line.startswith("rankwise: ")] != []
    assert "--debug" not in err


def test_the_leaves_are_json() -> None:
    """What the tests put into files can be written into them."""
    for leaf in ([], {}, [[[]]], float("nan"), 2**70):
        assert json.dumps(leaf)
    assert isinstance(np.load(io.BytesIO(header("(0,)", "<f8"))), np.ndarray)
    assert issubclass(TimelineError, RankwiseError)
