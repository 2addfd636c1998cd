"""The cache: decoded once, whole or not there, and read-only."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rankwise.data import cache, prepare, prepared
from rankwise.data.dataset import Dataset, Decoded, Images, Labels, Report, Samples, Source
from rankwise.errors import DataError

SHAPE = (4, 4, 3)


class Counting(Source):
    """Forty samples in parts of ten. Each decoding adds a line to `log`; `slowly` comes before each part."""

    def __init__(self, log: Path, slowly: Callable[[int], None] = lambda _: None) -> None:
        self.name = "counting"
        self._log = log
        self._slowly = slowly

    def check(self) -> None:
        pass

    def key(self) -> dict[str, object]:
        return {}

    def decode(self, report: Report, downloads: Path) -> Decoded:
        with open(self._log, "a") as log:
            log.write("decoded\n")
        return Decoded(
            ("a", "b"), Samples(30, SHAPE, self._parts(3)), Samples(10, SHAPE, self._parts(1)), "here"
        )

    def _parts(self, count: int) -> Iterator[tuple[Images, Labels]]:
        for number in range(count):
            self._slowly(number)
            yield np.full((10, *SHAPE), number, np.uint8), np.arange(10) % 2

    def decodings(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


def silent(what: str, done: int, total: int) -> None:
    pass


def opened(source: Source, folder: Path, refresh: bool = False) -> Dataset:
    return cache.prepare(source, folder, refresh, silent)


def _prepare_in_process(log: Path, folder: Path, results: multiprocessing.Queue[int]) -> None:
    dataset = opened(Counting(log, slowly=lambda _: time.sleep(0.1)), folder)
    results.put(int(dataset.train.images[:].sum()))


def _prepare_and_hang(log: Path, folder: Path) -> None:
    opened(Counting(log, slowly=lambda number: time.sleep(60 * number)), folder)


def test_images_are_read_only_memory_maps(tmp_path: Path) -> None:
    """Samples are memory maps that nobody can write to."""
    dataset = opened(Counting(tmp_path / "log"), tmp_path / "cache")
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.images.shape == (30, *SHAPE)
    assert dataset.train.labels.dtype == np.int64
    assert dataset.image_shape == (3, 4, 4)
    for array in (dataset.train.images, dataset.train.labels, dataset.test.images, dataset.test.labels):
        assert isinstance(array, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


def test_a_second_start_decodes_nothing(tmp_path: Path) -> None:
    """A finished dataset is opened as it stands."""
    source = Counting(tmp_path / "log")
    first, second = opened(source, tmp_path), opened(source, tmp_path)
    assert source.decodings() == 1
    assert (second.name, second.classes, second.source) == ("counting", ("a", "b"), "here")
    np.testing.assert_array_equal(first.train.images, second.train.images)


def test_two_processes_at_once_decode_once(tmp_path: Path) -> None:
    """Of processes that start together one decodes, and the others get the same samples."""
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[int] = context.Queue()
    processes = [
        context.Process(target=_prepare_in_process, args=(tmp_path / "log", tmp_path / "cache", results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    sums = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert len(set(sums)) == 1
    assert Counting(tmp_path / "log").decodings() == 1


def test_a_killed_preparation_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    """After a kill in the middle the next start decodes anew and removes what was left."""
    folder = tmp_path / "cache"
    process = multiprocessing.get_context("spawn").Process(
        target=_prepare_and_hang, args=(tmp_path / "log", folder)
    )
    process.start()
    deadline = time.monotonic() + 30
    while not list(folder.glob("*.partial/train_images.npy")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)

    assert prepared(folder) == []
    source = Counting(tmp_path / "log")
    assert len(opened(source, folder).train) == 30
    assert source.decodings() == 2
    assert not list(folder.glob("*.partial"))


def test_leftovers_of_other_datasets_are_removed_unless_in_use(tmp_path: Path) -> None:
    """Another dataset's unfinished folder goes when nobody holds its lock, and stays when somebody does."""
    from filelock import FileLock

    for name in ("dead-0123", "busy-4567"):
        (tmp_path / f"{name}.partial").mkdir()
    with FileLock(tmp_path / "busy-4567.lock"):
        opened(Counting(tmp_path / "log"), tmp_path)
    assert [path.name for path in tmp_path.glob("*.partial")] == ["busy-4567.partial"]


@pytest.mark.parametrize("file", ["train_images.npy", "train_labels.npy", "test_images.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "garbage"])
def test_a_damaged_cache_is_decoded_anew(tmp_path: Path, file: str, damage: str) -> None:
    """A file of the cache that is not as it was written is never used."""
    source = Counting(tmp_path / "log")
    opened(source, tmp_path)
    (path,) = tmp_path.glob(f"counting-*/{file}")
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": content[:-7], "emptied": b"", "garbage": b"PK\x03\x04" + content[4:]}[damage]
        )
    again = opened(source, tmp_path)
    assert source.decodings() == 2
    assert again.train.images[:].sum() == (0 + 1 + 2) * 10 * 48


def test_refresh_decodes_anew(tmp_path: Path) -> None:
    """A refresh replaces a finished dataset, and whoever has it open keeps what he has."""
    source = Counting(tmp_path / "log")
    before = opened(source, tmp_path)
    opened(source, tmp_path, refresh=True)
    assert source.decodings() == 2
    assert before.train.images[29, 0, 0, 0] == 2


def test_a_failure_while_decoding_leaves_nothing(tmp_path: Path) -> None:
    """An error of the source comes through, and no folder stays behind."""

    def fail(number: int) -> None:
        if number == 2:
            raise DataError("damaged")

    with pytest.raises(DataError, match=r"^damaged$"):
        opened(Counting(tmp_path / "log", slowly=fail), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_full_disk_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says how many bytes are needed, and where."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(DataError, match=rf"needs 1,\d\d\d,\d\d\d bytes in {tmp_path}, where 1,000 are free"):
        opened(Counting(tmp_path / "log"), tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_a_disk_that_fills_up_meanwhile_is_one_error(tmp_path: Path) -> None:
    """A write that fails becomes a DataError with the bytes that are needed, and nothing is left."""

    def fill(_: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"needs 2,240 bytes: .*No space left"):
        opened(Counting(tmp_path / "log", slowly=fill), tmp_path)
    assert not list(tmp_path.glob("*.partial"))


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    """The samples that are done are reported, up to the last; a finished dataset reports nothing."""
    told: list[tuple[int, int]] = []
    for _ in range(2):
        cache.prepare(
            Counting(tmp_path / "log"), tmp_path, False, lambda _, done, total: told.append((done, total))
        )
    assert told == [(0, 40), (10, 40), (20, 40), (30, 40), (40, 40)]


def test_the_cache_lists_what_is_whole(tmp_path: Path) -> None:
    """`prepared` gives the finished datasets with their sizes, and leaves out damaged ones."""
    opened(Counting(tmp_path / "log"), tmp_path)
    prepare("synthetic:10", cache_dir=tmp_path)
    (meta,) = tmp_path.glob("synthetic-*/meta.json")
    meta.write_text(json.dumps([]))
    (entry,) = prepared(tmp_path)
    assert (entry.name, entry.source, entry.train_samples, entry.test_samples) == ("counting", "here", 30, 10)
    assert entry.size == sum(file.stat().st_size for file in entry.path.iterdir())
    assert prepared(tmp_path / "nowhere") == []


def test_the_cache_stands_where_xdg_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a folder of its own the cache is rankwise/ under XDG_CACHE_HOME, else under ~/.cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepare("synthetic:10")
    assert list((tmp_path / "xdg/rankwise").glob("synthetic-10-*"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    prepare("synthetic:10")
    assert list((tmp_path / "home/.cache/rankwise").glob("synthetic-10-*"))


def test_an_unwritable_home_falls_back_to_a_private_temp_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the user's cache cannot be made, a folder of mode 700 in the temp folder stands in."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prepare("synthetic:10")
    fallback = tmp_path / f"rankwise-{os.getuid()}"
    assert fallback.stat().st_mode & 0o777 == 0o700
    assert [entry.name for entry in prepared()] == ["synthetic:10"]
    prepare("synthetic:10", on_progress=lambda *_: pytest.fail("decoded again"))


def _no_home(*_: object, **__: object) -> Path:
    raise RuntimeError("could not determine the home directory")  # as platformdirs 4.11 does


@pytest.mark.parametrize("told", [_no_home, lambda *_, **__: Path("~/.cache/rankwise")])
def test_a_user_without_a_home_has_a_cache(
    told: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the system knows no home, the private folder in the temp folder stands in, and no folder named ~
    appears."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("platformdirs.user_cache_path", told)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    prepare("synthetic:10")
    assert [path.name for path in tmp_path.iterdir()] == [f"rankwise-{os.getuid()}"]


def test_a_temp_folder_laid_out_by_others_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fallback folder that others can write to is refused."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"rankwise-{os.getuid()}").mkdir()
    (tmp_path / f"rankwise-{os.getuid()}").chmod(0o777)
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        prepare("synthetic:10")


def test_a_cache_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    """A folder that was asked for and cannot be used is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"--cache-dir .*file was given, which is no folder"):
        prepare("synthetic:10", cache_dir=tmp_path / "file")


class Garbage:
    """Only the garbage collector can end it, and then other threads get a turn."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0)


def test_threads_may_open_at_once(tmp_path: Path) -> None:
    """Ranks that are threads of one process open the same dataset at the same time, whenever the garbage
    collector sets in."""
    prepare("synthetic:10", cache_dir=tmp_path)
    failures: list[BaseException] = []

    def open_often() -> None:
        try:
            for _ in range(300):
                Garbage(), Garbage(), Garbage()
                prepare("synthetic:10", cache_dir=tmp_path)
        except BaseException as error:
            failures.append(error)

    before = gc.get_threshold(), sys.getswitchinterval()
    gc.set_threshold(7, 2, 2)
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=open_often) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*before[0])
        sys.setswitchinterval(before[1])
    assert failures == []
