"""Datasets decoded once a host: `.npy` files that every process maps into its memory.

::

    <cache>/cifar10-1f0c…/              one finished dataset; it is renamed into place when whole
        meta.json                       name, classes, source, the bytes of each file
        train_images.npy                uint8 [n, height, width, channels]
        train_labels.npy                int64 [n]
        test_images.npy, test_labels.npy
    <cache>/cifar10-1f0c….partial/      being written, by the process that holds the lock
    <cache>/cifar10-1f0c….lock          decode only with this in hand
    <cache>/downloads/                  archives as they came

A finished dataset is opened without a lock. A process that finds none takes the lock, looks again, and
decodes; the others wait on the lock and find it done. A killed process loses its lock to the
system and leaves a `.partial`, which no one takes for finished and the next one removes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rankwise.data.cache_folder import cache_folders, require_space, writable_folder
from rankwise.data.dataset import Dataset, Report, Samples, Source, Split
from rankwise.errors import DataError, one_line

LAYOUT = 1
"""Raised when the files change their form, so that no version reads another's."""

SPLITS = ("train", "test")
SPARE_BYTES = 1 << 20
"""Room for what comes on top of the samples: headers, names, folders."""


@dataclass(frozen=True)
class Prepared:
    """A dataset that stands finished in the cache; `size` is in bytes."""

    name: str
    source: str
    train_samples: int
    test_samples: int
    size: int
    path: Path


def prepare(source: Source, cache_dir: Path | None, refresh: bool, report: Report) -> Dataset:
    """Open the dataset, after decoding it if no finished copy stands in the cache.

    With `refresh` a copy is only taken if it was finished after this call began. Raises DataError
    when the source is unfit, or the cache cannot be written or is full.
    """
    began_ns = time.time_ns()
    newer_than = began_ns if refresh else 0
    name = _entry_name(source)
    for folder in cache_folders(cache_dir):
        found = _find(source, folder, name, newer_than)
        if found:
            return found

    folder = writable_folder(cache_dir)
    with _lock(folder / f"{name}.lock"):
        found = _find(source, folder, name, newer_than)
        if found:
            return found
        _remove_leftovers(folder, name)
        _decode(source, folder, name, report)
        found = _open(folder / name)
    if not found:
        raise DataError(f"{source.name} was written to {folder} and cannot be read back: is that disk sound?")
    return found


def prepared(cache_dir: Path | None = None) -> list[Prepared]:
    """What stands finished and whole in the cache, by name."""
    entries = []
    for folder in cache_folders(cache_dir):
        with suppress(OSError):
            for meta in sorted(folder.glob("*/meta.json")):
                dataset = _open(meta.parent)
                if dataset:
                    size = sum(file.stat().st_size for file in meta.parent.iterdir())
                    samples = len(dataset.train), len(dataset.test)
                    entries.append(Prepared(dataset.name, dataset.source, *samples, size, meta.parent))
    return sorted(entries, key=lambda entry: (entry.name, entry.path))


def _entry_name(source: Source) -> str:
    """A folder name a person recognises, and a digest of all that the samples depend on."""
    content = json.dumps({"layout": LAYOUT, "name": source.name, "key": source.key()}, sort_keys=True)
    return f"{_slug(source.name)}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[-40:].strip("-")


# ── reading ───────────────────────────────────────────────────────────────────────────────────────


def _find(source: Source, folder: Path, name: str, newer_than_ns: int) -> Dataset | None:
    """A finished, whole dataset of this source in `folder`, or None."""
    candidates = [folder / name]
    if source.any_entry and not newer_than_ns:
        candidates += sorted(folder.glob(f"{_slug(source.name)}-*[0-9a-f]"))
    for candidate in candidates:
        found = _open(candidate, newer_than_ns)
        if found and found.name == source.name:
            return found
    return None


def _open(entry: Path, newer_than_ns: int = 0) -> Dataset | None:
    """The dataset in `entry`; None if it is not there, not whole, or not newer than asked for.

    Only sizes, shapes and types are looked at: samples stay on disk until somebody needs them.
    """
    try:
        meta = json.loads((entry / "meta.json").read_bytes())
        if meta["layout"] != LAYOUT or meta["finished_ns"] < newer_than_ns:
            return None
        train, test = (_open_split(entry, split, meta["bytes"]) for split in SPLITS)
        return Dataset(meta["name"], tuple(meta["classes"]), train, test, meta["source"])
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except (ValueError, KeyError, TypeError, EOFError):  # a damaged file: it will be decoded anew
        return None
    except OSError as error:
        raise DataError(f"the prepared dataset in {entry} cannot be read: {one_line(error)}") from error


def _open_split(entry: Path, split: str, sizes: dict[str, int]) -> Split:
    images = _map(entry / f"{split}_images.npy", sizes, np.dtype(np.uint8), dimensions=4)
    labels = _map(entry / f"{split}_labels.npy", sizes, np.dtype(np.int64), dimensions=1)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images and {len(labels)} labels")
    return Split(images, labels)


_PARSING = threading.Lock()
"""numpy reads a file's header with Python's parser, which in CPython 3.11 fails at times when two
threads parse at once (python/cpython#106905); ranks that are threads open their maps at once."""


def _map(path: Path, sizes: dict[str, int], dtype: np.dtype[Any], dimensions: int) -> NDArray[Any]:
    """A read-only memory map of the array in `path`. Raises ValueError if it is not as it was written."""
    with _PARSING:
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    if path.stat().st_size != sizes[path.name] or array.dtype != dtype or array.ndim != dimensions:
        raise ValueError(f"{path} is not as it was written")
    return array


# ── writing ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock, for which this waits as long as another process is at work."""
    from filelock import FileLock  # not needed to open a prepared dataset

    lock = FileLock(path)
    try:
        lock.acquire()
    except (OSError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{path} cannot be locked: {one_line(error)}; set XDG_CACHE_HOME to a folder on a local disk"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes left: our own, and that of others if no process is at work on it."""
    from filelock import FileLock, Timeout

    for partial in folder.glob("*.partial"):
        if partial.stem == name:
            _remove(partial)
            continue
        with (
            suppress(Timeout, OSError, NotImplementedError),
            FileLock(partial.with_suffix(".lock"), timeout=0),
        ):
            _remove(partial)


def _remove(entry: Path) -> None:
    try:
        shutil.rmtree(entry)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise DataError(
            f"{entry} is unfinished or out of date and cannot be removed: {one_line(error)}"
        ) from error


def _decode(source: Source, folder: Path, name: str, report: Report) -> None:
    """Decode the source into `folder/name`. Whatever goes wrong, nothing half-finished is left there."""
    partial = folder / f"{name}.partial"
    decoded = source.decode(report, folder / "downloads")
    splits = dict(zip(SPLITS, (decoded.train, decoded.test), strict=True))
    needed = sum(samples.count * (int(np.prod(samples.shape)) + 8) for samples in splits.values())
    what = f"preparing {source.name}"
    require_space(folder, needed + SPARE_BYTES, what)

    total = sum(samples.count for samples in splits.values())
    done = 0
    report(what, done, total)
    try:
        partial.mkdir()
        for split, samples in splits.items():
            for count in _write(partial, split, samples):
                done += count
                report(what, done, total)
        meta = {
            "layout": LAYOUT,
            "name": source.name,
            "classes": decoded.classes,
            "source": decoded.origin,
            "bytes": {file.name: file.stat().st_size for file in sorted(partial.iterdir())},
            "finished_ns": time.time_ns(),
        }
        with open(partial / "meta.json", "w", encoding="utf-8") as file:
            json.dump(meta, file, indent=1)
            _sync(file)
        _remove(folder / name)  # a damaged one, or one to refresh; who has it mapped keeps it
        partial.rename(folder / name)
    except OSError as error:
        raise DataError(
            f"{what} failed in {folder}, where it needs {needed:,} bytes: {one_line(error)}; "
            "make room there, or set XDG_CACHE_HOME to another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(folder: Path, split: str, samples: Samples) -> Iterator[int]:
    """Write one split part by part; after each, yields how many samples it held.

    By plain writes, not through a map: a full disk is then an error and not the end of the process.
    """
    with (
        open(folder / f"{split}_images.npy", "wb") as images_file,
        open(folder / f"{split}_labels.npy", "wb") as labels_file,
    ):
        for file, dtype, shape in (
            (images_file, np.uint8, (samples.count, *samples.shape)),
            (labels_file, np.int64, (samples.count,)),
        ):
            form = {
                "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                "fortran_order": False,
                "shape": shape,
            }
            np.lib.format.write_array_header_1_0(file, form)
        written = 0
        for images, labels in samples.parts:
            assert images.shape == (len(labels), *samples.shape), "a source broke its promise"
            images_file.write(np.ascontiguousarray(images, np.uint8).data)
            labels_file.write(np.ascontiguousarray(labels, np.int64).data)
            written += len(labels)
            yield len(labels)
        assert written == samples.count, "a source broke its promise"
        _sync(images_file)
        _sync(labels_file)


def _sync(file: IO[Any]) -> None:
    """Have all of it on the disk, so that after a power cut nothing unwritten passes for finished."""
    file.flush()
    os.fsync(file.fileno())
