"""A user's own function as a dataset: `module:function`."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.data.dataset import Dataset, Decoded, Images, Labels, Report, Samples, Source
from rankwise.errors import DataError, one_line
from rankwise.system.user_code import find_users, import_users

MOST_UNNAMED_CLASSES = 100_000
SPLITS = ("train", "test")
EXPECTED = (
    "a rankwise.data.Dataset or a tuple (train_images, train_labels, test_images, test_labels[, classes])"
)


class Custom(Source):
    """`function()` of `module` returns a Dataset, or a tuple of arrays and, if wanted, the classes' names.

    Images are uint8 [n, height, width, channels] or [n, height, width], labels whole numbers [n]
    that count the classes from 0. Modules are looked for in the current directory first, as
    `python -m` does. The function is called anew when the module's file changes; what else it
    reads is not watched.
    """

    def __init__(self, module: str, function: str) -> None:
        self.name = f"{module}:{function}"
        self._module = module
        self._function = function

    def check(self) -> None:
        self._file()

    def key(self) -> dict[str, object]:
        file = self._file()
        try:
            return {"file": str(file), "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        except OSError as error:
            raise DataError(f"dataset {self.name!r}: {file} cannot be read: {one_line(error)}") from error

    def decode(self, report: Report, downloads: Path) -> Decoded:
        report(f"calling {self.name}", 0, 1)
        file = self._file()
        with self._blamed("failed"):
            function = getattr(import_users(self._module), self._function, None)
            if not callable(function):
                raise DataError(f"dataset {self.name!r}: {file} has no function {self._function!r}")
            returned = function()
        with self._blamed("did not return arrays"):
            return self._validated(returned, str(file))

    def _file(self) -> Path:
        """The file of the module, which is not imported."""
        with self._blamed("cannot be imported"):
            found = find_users(self._module)
        if found is None:
            raise DataError(
                f"dataset {self.name!r}: no module {self._module!r} in {Path.cwd()} or on Python's path; "
                "`rankwise data list` shows the datasets there are"
            )
        if not found.origin or not os.path.isfile(found.origin):
            raise DataError(f"dataset {self.name!r}: module {self._module!r} has no source file")
        return Path(found.origin)

    @contextlib.contextmanager
    def _blamed(self, what: str) -> Iterator[None]:
        """Whatever the user's code raises becomes one line."""
        try:
            yield
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            raise DataError(
                f"dataset {self.name!r} {what}: {type(error).__name__}: {one_line(error)}"
            ) from error

    def _validated(self, returned: object, origin: str) -> Decoded:
        classes: object = None
        pairs: list[tuple[object, object]]
        match returned:
            case Dataset():
                classes = returned.classes
                pairs = [(split.images, split.labels) for split in (returned.train, returned.test)]
            case (train_images, train_labels, test_images, test_labels, *rest) if len(rest) <= 1:
                classes = rest[0] if rest else None
                pairs = [(train_images, train_labels), (test_images, test_labels)]
            case _:
                raise DataError(f"dataset {self.name!r} returned {_described(returned)}, expected {EXPECTED}")

        splits = [self._validated_split(split, *pair) for split, pair in zip(SPLITS, pairs, strict=True)]
        train_shape, test_shape = (images.shape[1:] for images, _ in splits)
        if train_shape != test_shape:
            raise DataError(
                f"dataset {self.name!r} returned training images of shape {train_shape} and "
                f"test images of shape {test_shape}: expected one shape"
            )
        names = self._named(classes, max(int(labels.max()) for _, labels in splits))
        train, test = (Samples(len(labels), train_shape, [(images, labels)]) for images, labels in splits)
        return Decoded(names, train, test, origin)

    def _validated_split(
        self, split: str, given_images: object, given_labels: object
    ) -> tuple[Images, Labels]:
        images, labels = np.asarray(given_images), np.asarray(given_labels)
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
            raise DataError(
                f"dataset {self.name!r} returned {split} images {_described(images)}, "
                "expected uint8 [n, height, width, channels] or [n, height, width], and not empty"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise DataError(
                f"dataset {self.name!r} returned {split} labels {_described(labels)}, "
                f"expected whole numbers [{len(images)}], one an image"
            )
        if labels.min() < 0:
            raise DataError(
                f"dataset {self.name!r} returned the {split} label {labels.min()}, expected 0 or more"
            )
        return images.reshape(*images.shape[:3], -1), labels.astype(np.int64)

    def _named(self, classes: Any, highest: int) -> tuple[str, ...]:
        """The names of the classes: those given, or the numbers up to the highest label."""
        if classes is None:
            if highest >= MOST_UNNAMED_CLASSES:
                raise DataError(
                    f"dataset {self.name!r} returned the label {highest} and no names of classes: "
                    f"expected labels under {MOST_UNNAMED_CLASSES:,}, which count the classes from 0"
                )
            return tuple(str(number) for number in range(highest + 1))
        names = tuple(str(name) for name in classes)
        if highest >= len(names):
            raise DataError(
                f"dataset {self.name!r} returned the label {highest} and {len(names)} names of classes: "
                f"expected labels from 0 to {len(names) - 1}"
            )
        return names


def _described(thing: object) -> str:
    if isinstance(thing, np.ndarray):
        return f"{thing.dtype} {list(thing.shape)}"
    if isinstance(thing, tuple):
        return f"a tuple of {len(thing)}"
    return f"a {type(thing).__name__}"
