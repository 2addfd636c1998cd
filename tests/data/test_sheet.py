"""The picture of a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankwise.data import Dataset, Split, draw_sheet
from rankwise.errors import DataError


def dataset(
    shape: tuple[int, int, int], classes: tuple[str, ...] = ("ant", "bee"), count: int = 20
) -> Dataset:
    random = np.random.default_rng(0)
    split = Split(random.integers(0, 200, (count, *shape), np.uint8), np.arange(count) % 2)
    return Dataset("made", classes, split, split, "here")


@pytest.mark.parametrize(
    "shape",
    [(8, 8, 1), (32, 32, 3), (5, 40, 2), (32, 32, 4), (300, 200, 3), (1, 1, 1), (100, 100, 7), (1, 900, 3)],
)
def test_a_sheet_is_drawn_for_any_image(shape: tuple[int, int, int], tmp_path: Path) -> None:
    """Any size and any number of channels gives a PNG."""
    draw_sheet(dataset(shape), tmp_path / "new/sheet", rows=2, columns=3)
    with Image.open(tmp_path / "new/sheet") as sheet:
        assert sheet.format == "PNG"
        assert max(sheet.size) < 1000


def test_a_row_has_samples_of_its_class_only(tmp_path: Path) -> None:
    """Each class has its row, and the seed chooses the samples."""
    images = np.zeros((20, 8, 8, 3), np.uint8)
    images[1::2] = (255, 0, 0)
    made = Dataset("made", ("black", "red"), *[Split(images, np.arange(20) % 2)] * 2, "here")
    draw_sheet(made, tmp_path / "sheet.png", columns=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet)
    red = np.all(pixels == (255, 0, 0), axis=2)
    assert red.sum() == 4 * 48 * 48
    assert not red[: len(pixels) // 2 - 2].any()


def test_the_seed_chooses_the_samples(tmp_path: Path) -> None:
    """The same seed gives the same sheet, another seed another."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_sheet(dataset((8, 8, 3)), tmp_path / name, columns=3, seed=seed)
    one, same, other = ((tmp_path / name).read_bytes() for name in "abc")
    assert one == same != other


def test_few_samples_and_odd_names_are_fine(tmp_path: Path) -> None:
    """A class with few samples or none, and names that no font has, do not stop the drawing."""
    classes = ("näme", "名前\n\x00", "\udcff" + "long" * 100, "")
    draw_sheet(dataset((8, 8, 1), classes, count=3), tmp_path / "sheet.png", rows=100)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] < 2000


def test_a_sheet_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """Neither a folder in the way nor a sheet of nothing is a traceback."""
    with pytest.raises(DataError, match="cannot be written"):
        draw_sheet(dataset((8, 8, 3)), tmp_path)
    with pytest.raises(DataError, match="1 or more"):
        draw_sheet(dataset((8, 8, 3)), tmp_path / "sheet.png", rows=0)
