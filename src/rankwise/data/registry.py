"""The datasets there are, by the names they have on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rankwise.data import cache
from rankwise.data.dataset import Dataset, Report, Source
from rankwise.data.sources.cifar import Cifar
from rankwise.data.sources.cifar_variants import CIFAR10, CIFAR100
from rankwise.data.sources.custom import Custom
from rankwise.data.sources.digits import Digits
from rankwise.data.sources.folder import Folder
from rankwise.data.sources.synthetic import Synthetic
from rankwise.errors import DataError, unknown_name


@dataclass(frozen=True)
class Kind:
    """One way to name a dataset. `source` takes what stands after the colon, and the data folder."""

    pattern: str
    about: str
    source: Callable[[str, Path | None], Source]


KINDS = {
    kind.pattern.partition(":")[0]: kind
    for kind in (
        Kind("cifar10", "60,000 photographs, 32x32 RGB, 10 classes", lambda _, data: Cifar(CIFAR10, data)),
        Kind("cifar100", "60,000 photographs, 32x32 RGB, 100 classes", lambda _, data: Cifar(CIFAR100, data)),
        Kind("digits", "1,797 handwritten digits of scikit-learn, 32x32; no download", lambda *_: Digits()),
        Kind(
            "folder:PATH",
            "your images in train/CLASS/ and test/CLASS/, or a zip",
            lambda path, _: Folder(path),
        ),
        Kind("synthetic:N", "N made images, 32x32 RGB, 10 classes; no download", lambda n, _: Synthetic(n)),
    )
}

OWN = "module:function"


def known() -> tuple[tuple[str, str], ...]:
    """For a list: how each dataset is named, and in a few words what it is."""
    named = tuple((kind.pattern, kind.about) for kind in KINDS.values())
    return (*named, (OWN, "your function, which returns the arrays"))


def check(spec: str, data_dir: Path | None = None) -> None:
    """Find out, cheaply, whether it can be prepared: DataError if it is unknown or files are missing."""
    _source(spec, data_dir).check()


def prepare(
    spec: str,
    *,
    data_dir: Path | None = None,
    cache_dir: Path | None = None,
    refresh: bool = False,
    on_progress: Report | None = None,
) -> Dataset:
    """The dataset, decoded once a host and from then on mapped out of the cache.

    Any number of processes may call this at once: one decodes, the others wait. `data_dir` is where
    CIFAR lies if it is not to be downloaded. `refresh` decodes anew. `on_progress` gets what is
    being done, how much is done and out of how much; it is not called when nothing is to be done.
    Raises DataError when the dataset is unknown, missing, damaged or unfit, or the cache is full.
    """
    return cache.prepare(_source(spec, data_dir), cache_dir, refresh, on_progress or _silent)


def _source(spec: str, data_dir: Path | None) -> Source:
    head, colon, argument = spec.partition(":")
    kind = KINDS.get(head)
    if kind:
        if argument and ":" not in kind.pattern:
            raise DataError(
                f"dataset {spec!r} is given {argument!r}, which {head} has no use for: write {head}"
            )
        return kind.source(argument, data_dir)
    if colon and argument.isidentifier() and all(part.isidentifier() for part in head.split(".")):
        return Custom(head, argument)
    raise DataError(unknown_name("dataset", spec, [pattern for pattern, _ in known()]))


def _silent(what: str, done: int, total: int) -> None:
    """Reports nothing."""
