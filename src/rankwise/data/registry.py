"""The datasets there are, by the names they have on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rankwise.config import TrainConfig
from rankwise.data import cache
from rankwise.data.dataset import Dataset, Report, Source
from rankwise.data.sources.cifar import Cifar
from rankwise.data.sources.cifar_variants import CIFAR10, CIFAR100
from rankwise.data.sources.custom import Custom
from rankwise.data.sources.digits import Digits
from rankwise.data.sources.folder import AS_THEY_ARE, Folder, Look
from rankwise.data.sources.pictures import BACKGROUND
from rankwise.data.sources.synthetic import Synthetic
from rankwise.errors import DataError, unknown_name


@dataclass(frozen=True)
class How:
    """How a dataset is to be had: the data folder, what images of all kinds are made, and whether there must
    be some to test on."""

    data_dir: Path | None = None
    look: Look = AS_THEY_ARE
    needs_test: bool = False


@dataclass(frozen=True)
class Kind:
    """One way to name a dataset. `source` takes what stands after the colon, and how it is to be had."""

    pattern: str
    about: str
    source: Callable[[str, How], Source]


KINDS = {
    kind.pattern.partition(":")[0]: kind
    for kind in (
        Kind(
            "cifar10",
            "60,000 photographs, 32x32 RGB, 10 classes",
            lambda _, how: Cifar(CIFAR10, how.data_dir),
        ),
        Kind(
            "cifar100",
            "60,000 photographs, 32x32 RGB, 100 classes",
            lambda _, how: Cifar(CIFAR100, how.data_dir),
        ),
        Kind("digits", "1,797 handwritten digits of scikit-learn, 32x32; no download", lambda *_: Digits()),
        Kind(
            "folder:PATH",
            "your images in train/CLASS/ and test/CLASS/, or a zip; --image-size for any sizes",
            lambda path, how: Folder(path, how.look, needs_test=how.needs_test),
        ),
        Kind("synthetic:N", "N made images, 32x32 RGB, 10 classes; no download", lambda n, _: Synthetic(n)),
    )
}

OWN = "module:function"


def known() -> tuple[tuple[str, str], ...]:
    """For a list: how each dataset is named, and in a few words what it is."""
    named = tuple((kind.pattern, kind.about) for kind in KINDS.values())
    return (*named, (OWN, "your function, which returns the arrays"))


def check(
    spec: str,
    data_dir: Path | None = None,
    *,
    look: Look = AS_THEY_ARE,
    needs_test: bool = False,
) -> None:
    """Find out, cheaply, whether it can be prepared: DataError if it is unknown or files are missing, with
    `needs_test` those to test on too."""
    _source(spec, How(data_dir, look, needs_test)).check()


def check_of(config: TrainConfig) -> None:
    """The same for the dataset of a run."""
    check(config.dataset, config.data_dir, look=look_of(config), needs_test=config.validation_split is None)


def prepare(
    spec: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    image_size: int | None = None,
    background: str = BACKGROUND,
    refresh: bool = False,
    on_progress: Report | None = None,
) -> Dataset:
    """The dataset, decoded once a host and from then on mapped out of the cache.

    Any number of processes may call this at once: one decodes, the others wait. `data_dir` is where
    CIFAR lies if it is not to be downloaded. With `image_size` images of a folder are cut and scaled to
    squares of so many pixels; what is transparent in them shows the `background`. `refresh` decodes anew.
    `on_progress` gets what is being done, how much is done and out of how much; it is not called when
    nothing is to be done.
    Raises DataError when the dataset is unknown, missing, damaged or unfit, or the cache is full.
    """
    source = _source(spec, How(data_dir, Look(image_size, background)))
    return cache.prepare(source, cache_dir, refresh, on_progress or _silent)


def prepare_of(config: TrainConfig, on_progress: Report | None = None) -> Dataset:
    """The same for the dataset of a run."""
    return prepare(
        config.dataset,
        data_dir=config.data_dir,
        cache_dir=config.cache_dir,
        image_size=config.image_size,
        background=config.background,
        on_progress=on_progress,
    )


def look_of(config: TrainConfig) -> Look:
    """What the images of a run are made."""
    return Look(config.image_size, config.background)


def _source(spec: str, how: How) -> Source:
    head, colon, argument = spec.partition(":")
    if head != "folder" and how.look != AS_THEY_ARE:
        option = f"--image-size {how.look.side}" if how.look.side else f"--background {how.look.background}"
        raise DataError(
            f"{option} was given, but it is for images in a folder or a zip, --dataset folder:PATH, and "
            f"{spec} was asked for: leave it out"
        )
    kind = KINDS.get(head)
    if kind:
        if argument and ":" not in kind.pattern:
            raise DataError(
                f"dataset {spec!r} is given {argument!r}, which {head} has no use for: write {head}"
            )
        return kind.source(argument, how)
    if colon and argument.isidentifier() and all(part.isidentifier() for part in head.split(".")):
        return Custom(head, argument)
    raise DataError(unknown_name("dataset", spec, [pattern for pattern, _ in known()]))


def _silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""
