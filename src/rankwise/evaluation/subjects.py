"""What a network is evaluated on: the images of its run, of another dataset, or a user's own files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rankwise import data
from rankwise.data.dataset import Images, Labels, Report, Split
from rankwise.data.feed import as_input, feed
from rankwise.data.partition import Indices
from rankwise.data.registry import look_of
from rankwise.data.selection import select
from rankwise.data.sources import pictures
from rankwise.data.sources.folder import TESTS, TOPS, decoded_parts
from rankwise.data.sources.trees import open_tree
from rankwise.errors import DataError
from rankwise.evaluation.trained import TrainedRun
from rankwise.runs.record import Seen
from rankwise.system.files import misspelt
from rankwise.training.loop import evaluation_batch

Batch = tuple[Tensor, Tensor | None]
"""Images float32 [samples, channels, height, width], and their classes int64 [samples] if they are known."""

ARCHIVES = (".zip",)


@dataclass(frozen=True)
class Subject:
    """Images in batches. `name` says what they are; `files` names them, if they are a user's."""

    name: str
    count: int
    batches: Callable[[], Iterator[Batch]]
    labelled: bool = True
    files: tuple[str, ...] = field(default=())


def subject_of(run: TrainedRun, on: str | None, data_dir: Path | None, report: Report) -> Subject:
    """What `on` names: the run's own validation images (None), a dataset's test images, or those in a folder,
    a zip or a file. Raises DataError for images or classes that are not those of the run."""
    if on is None:
        return _own(run, report)
    path = Path(on).expanduser()
    if path.exists():
        return _of_files(run, path, on)
    if path.suffix and ":" not in on:
        raise DataError(
            f"{on} does not exist{misspelt(path)}: expected an image, a folder or zip of images, or a dataset"
        )
    return _of_dataset(run, on, data_dir, report)


def _own(run: TrainedRun, report: Report) -> Subject:
    dataset = data.prepare_of(run.plan, report)
    _require_same(run, Seen.of(dataset), f"dataset {dataset.name}")
    chosen = select(run.plan, dataset)
    own = "held-out" if run.plan.validation_split else "test"
    return _of_split(chosen.validation, chosen.val_pool, f"the {own} images of {dataset.name}", None)


def _of_dataset(run: TrainedRun, spec: str, data_dir: Path | None, report: Report) -> Subject:
    _, height, width = run.seen.image_shape
    of_files = spec.startswith("folder:")
    dataset = data.prepare(
        spec,
        data_dir=data_dir,
        cache_dir=run.plan.cache_dir,
        image_size=height if of_files and height == width else None,
        background=run.plan.background if of_files else pictures.BACKGROUND,
        on_progress=report,
    )
    seen = Seen.of(dataset)
    if seen.image_shape != run.seen.image_shape:
        raise DataError(
            f"images of {dataset.name} are {_times(seen.image_shape)}, and the network of {run.path} takes "
            f"{_times(run.seen.image_shape)} (channels, height, width)"
        )
    split, which = (dataset.test, "test") if len(dataset.test) else (dataset.train, "training")
    numbers = _numbers(run, seen.classes, f"dataset {dataset.name}")
    return _of_split(split, np.arange(len(split)), f"the {which} images of {dataset.name}", numbers)


def _of_split(split: Split, pool: Indices, name: str, numbers: Labels | None) -> Subject:
    def batches() -> Iterator[Batch]:
        for images, labels in feed(split, pool, evaluation_batch(split)):
            yield images, labels if numbers is None else torch.from_numpy(numbers)[labels]

    return Subject(name, len(pool), batches)


def _of_files(run: TrainedRun, path: Path, on: str) -> Subject:
    """A folder or zip with a folder for each class, or with images alone, or one image."""
    if path.is_file() and path.suffix.lower() not in ARCHIVES:
        return _of_images(run, path.parent, [path.name], on)
    with open_tree(path, TOPS) as tree:
        folders = tree.folders()
        root = next((folders[name] for name in TESTS if name in folders), "")
        root = root or folders.get("train", "")
        by_class = {name: images for name, images in tree.classes(root).items() if images}
        loose = [] if by_class else tree.loose()
    if not by_class and not loose:
        raise DataError(f"{on} holds no images: expected CLASS/ folders with images, or images")
    if loose:
        return _of_images(run, path, loose, on)
    numbers = _numbers(run, tuple(by_class), str(path / root) if root else on)
    named = [(image, int(numbers[at])) for at, name in enumerate(by_class) for image in by_class[name]]
    return Subject(f"the images in {path / root if root else path}", len(named), _decoding(run, path, named))


def _of_images(run: TrainedRun, path: Path, names: list[str], on: str) -> Subject:
    batches = _decoding(run, path, [(name, -1) for name in names])
    return Subject(f"the images in {on}", len(names), batches, labelled=False, files=tuple(names))


def _decoding(run: TrainedRun, path: Path, named: list[tuple[str, int]]) -> Callable[[], Iterator[Batch]]:
    """Cut and scaled to what the network takes."""
    channels, height, width = run.seen.image_shape
    if channels not in (1, 3):
        raise DataError(f"the network of {run.path} takes images of {channels} channels, which no file has")
    step = evaluation_batch(Split(np.empty((0, height, width, channels), np.uint8), np.empty(0, np.int64)))

    def batches() -> Iterator[Batch]:
        parts = decoded_parts(path, named, (height, width, channels), look_of(run.plan), fits=True)
        for images, labels in parts:
            for start in range(0, len(images), step):
                yield _batch(images[start : start + step], labels[start : start + step])

    pictures.colour(run.plan.background)
    return batches


def _batch(images: Images, labels: Labels) -> Batch:
    return as_input(images), torch.from_numpy(labels) if labels[0] >= 0 else None


def _require_same(run: TrainedRun, seen: Seen, what: str) -> None:
    """The run's own dataset must be what it was."""
    if seen.image_shape != run.seen.image_shape or seen.classes != run.seen.classes:
        raise DataError(
            f"{what} has changed since {run.path} was trained: it was {_times(run.seen.image_shape)} with "
            f"{len(run.seen.classes)} classes and is {_times(seen.image_shape)} with {len(seen.classes)}; "
            "evaluate --on another one"
        )


def _numbers(run: TrainedRun, classes: tuple[str, ...], what: str) -> Labels:
    """The run's numbers of these classes, by their names. Raises DataError at the first that it does not
    know."""
    known = {name: number for number, name in enumerate(run.seen.classes)}
    for name in classes:
        if name not in known:
            few = ", ".join(run.seen.classes[:10]) + (", ..." if len(run.seen.classes) > 10 else "")
            raise DataError(
                f"class {name!r} of {what} is none of those that {run.path} was trained on: {few}"
            )
    return np.array([known[name] for name in classes], np.int64)


def _times(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
