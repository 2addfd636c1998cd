"""A user's own function as a dataset."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankwise.data import Dataset, check, prepare
from rankwise.errors import DataError

HEAD = """
import numpy as np
images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
labels = np.array([0, 1, 2, 0, 1, 2])
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with nothing in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def own(here: Path, name: str, returned: str, before: str = "") -> str:
    """A module with a function that returns `returned`; gives the spec."""
    (here / f"{name}.py").write_text(f"{HEAD}\ndef load():\n    {before or 'pass'}\n    return {returned}\n")
    return f"{name}:load"


def opened(spec: str, here: Path) -> Dataset:
    return prepare(spec, cache_dir=here.parent / "cache")


def test_a_tuple_of_four_arrays_is_a_dataset(here: Path) -> None:
    """Without names the classes are numbered."""
    dataset = opened(own(here, "own_four", "images, labels, images[:3], labels[:3]"), here)
    assert dataset.classes == ("0", "1", "2")
    assert (dataset.name, dataset.image_shape, len(dataset.train), len(dataset.test)) == (
        "own_four:load",
        (3, 4, 4),
        6,
        3,
    )
    np.testing.assert_array_equal(dataset.train.images.ravel(), np.arange(288, dtype=np.uint8))


def test_a_fifth_item_names_the_classes(here: Path) -> None:
    """Names may be more than the labels in use."""
    dataset = opened(own(here, "own_five", "images, labels, images, labels, ['a', 'b', 'c', 'd']"), here)
    assert dataset.classes == ("a", "b", "c", "d")


def test_a_dataset_may_be_returned(here: Path) -> None:
    """The package's own Dataset is taken as it is, under the name of the function."""
    before = "from rankwise.data import Dataset, Split; split = Split(images, labels)"
    dataset = opened(
        own(here, "own_dataset", "Dataset('x', ('a', 'b', 'c'), split, split, 'y')", before), here
    )
    assert (dataset.name, dataset.classes) == ("own_dataset:load", ("a", "b", "c"))


def test_images_without_channels_are_grey(here: Path) -> None:
    """[n, height, width] has one channel."""
    dataset = opened(own(here, "own_grey", "images[..., 0], labels, images[..., 0], labels"), here)
    assert dataset.image_shape == (1, 4, 4)


def test_the_function_is_called_once_until_its_file_changes(here: Path) -> None:
    """A finished dataset is opened without importing the module."""
    spec = own(
        here,
        "own_once",
        "images, labels, images, labels",
        "with open('calls', 'a') as calls: calls.write('x')",
    )
    opened(spec, here)
    opened(spec, here)
    assert Path("calls").read_text() == "x"
    with open("own_once.py", "a") as module:
        module.write("# changed\n")
    opened(spec, here)
    assert Path("calls").read_text() == "xx"


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("None", "returned a NoneType, expected a rankwise.data.Dataset or a tuple"),
        ("(images, labels)", "returned a tuple of 2"),
        ("(images / 255, labels, images, labels)", "train images float64 [6, 4, 4, 3], expected uint8"),
        ("(images[0, 0], labels, images, labels)", "train images uint8 [4, 3]"),
        ("(images, labels, images[:0], labels[:0])", "test images uint8 [0, 4, 4, 3]"),
        ("(images, labels[:5], images, labels)", "train labels int64 [5], expected whole numbers [6]"),
        ("(images, labels, images, labels * 1.0)", "test labels float64 [6]"),
        ("(images, labels - 1, images, labels)", "train label -1, expected 0 or more"),
        ("(images, labels, images, labels, ['a', 'b'])", "label 2 and 2 names of classes"),
        ("(images, labels * 10**9, images, labels)", "label 2000000000 and no names"),
        ("(images, labels, images[:, :2], labels)", "shape (4, 4, 3) and test images of shape (2, 4, 3)"),
        ("(images, labels, [[1], [2, 3]], labels)", "did not return arrays: ValueError"),
        ("(images, labels, images, labels, 5)", "did not return arrays: TypeError"),
        ("1 / 0", "failed: ZeroDivisionError: division by zero"),
        ("exit(3)", "failed: SystemExit: 3"),
        ("undefined_name", "failed: NameError"),
    ],
)
def test_what_is_wrong_with_a_result_is_one_line(returned: str, said: str, here: Path) -> None:
    """What was given and what was expected, whatever the function did."""
    spec = own(here, f"own_{abs(hash(returned))}", returned)
    with pytest.raises(DataError) as caught:
        opened(spec, here)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_function_is_told(here: Path) -> None:
    """The module is there, the function is not."""
    own(here, "own_other", "None")
    with pytest.raises(DataError, match=r"own_other\.py has no function 'lod'"):
        opened("own_other:lod", here)


def test_a_module_that_cannot_be_imported_is_told(here: Path) -> None:
    """A module's own error comes through in one line; a missing parent package too."""
    Path("own_broken.py").write_text("import nothing_of_this_name\n")
    with pytest.raises(DataError, match="ModuleNotFoundError: No module named 'nothing_of_this_name'"):
        opened("own_broken:load", here)
    with pytest.raises(DataError, match="no_parent"):
        check("no_parent.child:load")
