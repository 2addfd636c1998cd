"""A user's own images: a folder a class, in a folder or a zip."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from rankwise.data.dataset import Decoded, Images, Labels, Report, Samples, Source
from rankwise.data.sources import pictures
from rankwise.data.sources.trees import Tree, open_tree
from rankwise.errors import DataError
from rankwise.system import machine

T = TypeVar("T")

DECODER = 2
"""Raised when the same files give other pixels, so that a cache of before is not taken."""

PART_BYTES = 16 << 20
"""Images handed on at once."""

TESTS = ("test", "val", "valid", "validation")
TOPS = ("train", *TESTS)
LAYOUT = "train/CLASS/ and test/CLASS/ (or val/, valid/, validation/) with images"


@dataclass(frozen=True)
class Look:
    """How images of all kinds are made alike: `side` is the pixels of the square to which they are cut and
    scaled, None if they have one size; the `background` is seen through what is transparent."""

    side: int | None = None
    background: str = pictures.BACKGROUND


AS_THEY_ARE = Look()


class Folder(Source):
    """Images in `PATH/train/CLASS/` and `PATH/test/CLASS/`, or in a zip with these inside.

    In place of `test` it may be called `val`, `valid` or `validation`; it may be missing if the run holds
    samples out, and then the classes may stand in PATH itself. Images become RGB; if all are grey, they stay
    grey. Classes and images stand in the order of their names. Hidden files are left out, and so are files
    beside the folders of the classes.
    """

    def __init__(self, argument: str | None, look: Look = AS_THEY_ARE, *, needs_test: bool = False) -> None:
        """With `needs_test` the check refuses images of which none are there to test on."""
        if not argument:
            raise DataError(
                "dataset 'folder:' has no path: write folder:PATH, a folder or a zip with train/ and test/"
            )
        self._path = Path(os.path.expanduser(argument)).absolute()
        self._look = look
        self._needs_test = needs_test
        self.name = f"folder:{self._path}"

    def check(self) -> None:
        pictures.colour(self._look.background)
        with open_tree(self._path, TOPS) as tree:
            _, test = _splits(tree)
        if self._needs_test and test is None:
            raise DataError(
                f"{self._path} has no folder {', '.join(f'{name}/' for name in TESTS[:-1])} or {TESTS[-1]}/: "
                "make one with the same classes, or hold images out with --validation-split 0.1"
            )

    def key(self) -> dict[str, object]:
        with open_tree(self._path, TOPS) as tree:
            roots = [root for root in _splits(tree) if root is not None]
            look = {"side": self._look.side, "background": pictures.colour(self._look.background)}
            return {"files": tree.digest(roots), "roots": roots, "decoder": DECODER, **look}

    def decode(self, report: Report, downloads: Path) -> Decoded:
        with open_tree(self._path, TOPS) as tree:
            train, test = _splits(tree)
            train_images = tree.classes(train)
            test_images = None if test is None else tree.classes(test)
        name = f"{train}/" if train else ""
        classes = _common_classes(self._path, name, train_images, test, test_images)
        of_train, of_test = (
            [(image, label) for label, each in enumerate(classes) for image in (images or {}).get(each, [])]
            for images in (train_images, test_images)
        )
        shape = _common_shape(self._path, [image for image, _ in [*of_train, *of_test]], self._look, report)
        train_samples, test_samples = (
            Samples(len(found), shape, decoded_parts(self._path, found, shape, self._look))
            for found in (of_train, of_test)
        )
        split = " and ".join(f"{root}/" for root in (train, test) if root)
        return Decoded(classes, train_samples, test_samples, f"{self._path}{f' ({split})' if split else ''}")


def _splits(tree: Tree) -> tuple[str, str | None]:
    """The folders with the classes to train on ("" is the whole), and to test on, None if there are none."""
    folders = tree.folders()
    train, test = folders.get("train"), folders.get("test")
    others = [folders[name] for name in TESTS[1:] if name in folders]
    if test is None and len(others) > 1:
        raise DataError(
            f"{tree.path} has {' and '.join(f'{name}/' for name in others)}: take one of them away, or call "
            "one test/"
        )
    if test is None and others:
        test = others[0]
    if train is None and (test is not None or not folders):
        raise DataError(f"{tree.path} has no folder train/: expected {LAYOUT}")
    return train or "", test


def _common_classes(
    path: Path,
    train: str,
    train_images: dict[str, list[str]],
    test: str | None,
    test_images: dict[str, list[str]] | None,
) -> tuple[str, ...]:
    """The names of the classes, which are the same in both splits and have images in both."""
    found = {train: train_images} if test_images is None else {train: train_images, f"{test}/": test_images}
    for split, ours in found.items():
        if not ours:
            raise DataError(f"{split} of {path} has no class folders: put the images into {split}CLASS/")
        for name in ours:
            for other, theirs in found.items():
                if name not in theirs:
                    raise DataError(
                        f"class {name!r} of {path} is in {split} and not in {other}: it must be in both"
                    )
            if not ours[name]:
                place = f" in {split}" if split else ""
                raise DataError(
                    f"class {name!r} of {path} has no images{place}: add some or remove the class"
                )
    return tuple(sorted(train_images))


# ── images ────────────────────────────────────────────────────────────────────────────────────────


def _common_shape(path: Path, images: list[str], look: Look, report: Report) -> tuple[int, int, int]:
    """(height, width, channels) of all images, from their headers; DataError at the first of another size."""
    background = pictures.colour(look.background)
    first: pictures.Header | None = None
    all_grey, done = True, 0
    with open_tree(path, TOPS) as tree, pictures.quiet(), _all_cores() as cores:

        def header(image: str) -> pictures.Header:
            with tree.open(image) as file:
                return pictures.header(file, tree.where(image), background)

        for chosen in _pieces(images, 1000):
            report("looking at the sizes of the images", done, len(images))
            for image, found in zip(chosen, cores.map(header, chosen), strict=True):
                first = first or found
                if look.side is None and (found.width, found.height) != (first.width, first.height):
                    raise DataError(
                        f"image {tree.where(image)!r} has {found.width}x{found.height} pixels and "
                        f"{images[0]!r} has {first.width}x{first.height}: all must have one size, which "
                        "--image-size 64 gives them"
                    )
                all_grey = all_grey and found.grey
            done += len(chosen)
            report("looking at the sizes of the images", done, len(images))
    assert first, "a class has images"
    height, width = (look.side, look.side) if look.side else (first.height, first.width)
    return height, width, 1 if all_grey else 3


def decoded_parts(
    path: Path,
    samples: Sequence[tuple[str, int]],
    shape: tuple[int, int, int],
    look: Look,
    *,
    fits: bool = False,
) -> Iterator[tuple[Images, Labels]]:
    """The images of this tree, decoded on all cores, and their classes, part by part; with `fits`, or a
    `look` with a side, they are cut and scaled to the shape. Raises DataError."""
    background, fits = pictures.colour(look.background), fits or look.side is not None
    with open_tree(path, TOPS) as tree, pictures.quiet(), _all_cores() as cores:

        def decode(image: str) -> Images:
            with tree.open(image) as file:
                return pictures.pixels(file, tree.where(image), shape, background, fits=fits)

        for chosen in _pieces(samples, max(1, PART_BYTES // math.prod(shape))):
            images = np.empty((len(chosen), *shape), np.uint8)
            for place, found in zip(
                images, _ahead(cores, decode, [image for image, _ in chosen]), strict=True
            ):
                place[...] = found
            yield images, np.array([label for _, label in chosen], np.int64)


def _all_cores() -> ThreadPoolExecutor:
    """Threads are enough: Pillow decodes and scales outside of Python's lock."""
    return ThreadPoolExecutor(machine.usable_cores(), thread_name_prefix="decode")


def _ahead(cores: ThreadPoolExecutor, do: Callable[[str], T], names: Sequence[str]) -> Iterator[T]:
    """What `do` gives for each name, in order. After an error nothing more is begun."""
    futures = [cores.submit(do, name) for name in names]
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()


def _pieces(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
