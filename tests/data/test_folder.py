"""A user's own images, in a folder or in a zip, friendly or not."""

from __future__ import annotations

import contextlib
import io
import os
import random
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rankwise.config import TrainConfig
from rankwise.data import Dataset, check, prepare
from rankwise.data.selection import select
from rankwise.data.sources import trees
from rankwise.errors import ConfigError, DataError


def encoded(mode: str = "RGB", size: tuple[int, int] = (6, 4), seed: int = 0, form: str = "PNG") -> bytes:
    numbers = np.random.default_rng(seed)
    channels = {"RGB": (3,), "RGBA": (4,), "L": (), "P": (), "F": ()}[mode]
    pixels = numbers.integers(0, 256, (size[1], size[0], *channels)).astype(
        np.float32 if mode == "F" else np.uint8
    )
    picture = Image.fromarray(pixels)
    if mode == "P":
        picture = picture.convert("P")
    packed = io.BytesIO()
    picture.save(packed, format=form)
    return packed.getvalue()


def standard(mode: str = "RGB") -> dict[str, bytes]:
    """Two classes, three training images and two test images."""
    return {
        "train/cat/b.png": encoded(mode, seed=2),
        "train/cat/a.png": encoded(mode, seed=1),
        "train/ant/a.png": encoded(mode, seed=3),
        "test/ant/x.png": encoded(mode, seed=4),
        "test/cat/y.png": encoded(mode, seed=5),
    }


def in_folder(files: dict[str, bytes], path: Path) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def in_zip(files: dict[str, bytes], path: Path, top: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(top + name, content)
    return path


def opened(path: Path, cache_dir: Path) -> Dataset:
    return prepare(f"folder:{path}", cache_dir=cache_dir)


def require_error(path: Path, cache_dir: Path, *said: str) -> None:
    with pytest.raises(DataError) as caught:
        opened(path, cache_dir)
    for words in said:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("form", ["folder", "zip", "zip with one top folder"])
def test_classes_and_images_stand_in_the_order_of_their_names(
    form: str, tmp_path: Path, cache_dir: Path
) -> None:
    """A folder and a zip of it, with or without a top folder, are the same dataset."""
    files = standard() | {"train/cat/.DS_Store": b"hidden", "train/.hidden/x.png": b"hidden"}
    if form == "folder":
        path = in_folder(files, tmp_path / "data")
    else:
        path = in_zip(files, tmp_path / "data.zip", top="pets/" if "top" in form else "")
    dataset = opened(path, cache_dir)
    assert dataset.classes == ("ant", "cat")
    assert dataset.train.labels.tolist() == [0, 1, 1]
    assert dataset.test.labels.tolist() == [0, 1]
    assert dataset.image_shape == (3, 4, 6)
    for index, seed in enumerate((3, 1, 2)):
        expected = np.asarray(Image.open(io.BytesIO(encoded(seed=seed))))
        np.testing.assert_array_equal(dataset.train.images[index], expected)


def test_a_zip_from_a_mac_is_fine(tmp_path: Path, cache_dir: Path) -> None:
    """The folder that macOS adds to a zip does not count."""
    path = in_zip({f"pets/{name}": content for name, content in standard().items()}, tmp_path / "data.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("__MACOSX/pets/train/cat/._a.png", b"junk")
    assert len(opened(path, cache_dir).train) == 3


def test_images_that_are_all_grey_stay_grey(tmp_path: Path, cache_dir: Path) -> None:
    """One channel if every image is grey, three as soon as one is not."""
    assert opened(in_folder(standard("L"), tmp_path / "grey"), cache_dir).image_shape == (1, 4, 6)
    mixed = standard("L") | {"test/cat/y.png": encoded("P")}
    assert opened(in_folder(mixed, tmp_path / "mixed"), cache_dir).image_shape == (3, 4, 6)


def test_formats_may_be_mixed(tmp_path: Path, cache_dir: Path) -> None:
    """PNG with and without transparency, JPEG, BMP, GIF and TIFF become RGB."""
    files = standard("RGBA")
    for form in ("JPEG", "BMP", "GIF", "TIFF"):
        files[f"train/cat/{form}"] = encoded(form=form)
    assert opened(in_folder(files, tmp_path / "data"), cache_dir).train.images.shape == (7, 4, 6, 3)


def test_linked_images_and_classes_are_followed_in_a_folder(tmp_path: Path, cache_dir: Path) -> None:
    """People link large collections into place; a link that goes in circles ends nothing."""
    path = in_folder(standard(), tmp_path / "data")
    (path / "train/cat/c.png").symlink_to(path / "train/cat/a.png")
    (path / "train/cat/circle").symlink_to(path / "train")
    (path / "train/dog").symlink_to(path / "train/ant")
    (path / "test/dog").symlink_to(path / "test/ant")
    dataset = opened(path, cache_dir)
    assert dataset.classes == ("ant", "cat", "dog")
    assert dataset.train.labels.tolist() == [0, 1, 1, 1, 2]


def test_a_changed_image_is_decoded_anew(tmp_path: Path, cache_dir: Path) -> None:
    """A dataset follows its folder: a new image shows, an unchanged folder is not read again."""
    path = in_folder(standard(), tmp_path / "data")
    opened(path, cache_dir)
    prepare(f"folder:{path}", cache_dir=cache_dir, on_progress=lambda *_: pytest.fail("decoded again"))
    (path / "train/cat/c.png").write_bytes(encoded(seed=9))
    assert len(opened(path, cache_dir).train) == 4


def _without(start: str) -> dict[str, bytes]:
    return {name: content for name, content in standard().items() if not name.startswith(start)}


@pytest.mark.parametrize("pack", [in_folder, in_zip])
@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({}, ["no folder train/"]),
        (_without("train/"), ["no folder train/"]),
        (_without("test/cat"), ["class 'cat'", "is in train/ and not in test/"]),
        (_without("train/ant"), ["class 'ant'", "is in test/ and not in train/"]),
        (_without("train/ant") | {"train/ant/.hidden": b""}, ["class 'ant'"]),
        (standard() | {"train/cat/a.png": encoded(size=(6, 5))}, ["cat/a.png", "6x5", "6x4", "--image-size"]),
        (standard() | {"train/cat/notes.txt": b"hello"}, ["train/cat/notes.txt", "cannot be decoded"]),
        (standard() | {"test/cat/y.png": encoded()[:-30]}, ["test/cat/y.png", "cannot be decoded"]),
        (standard() | {"test/cat/y.png": b""}, ["test/cat/y.png", "cannot be decoded"]),
        (standard() | {"test/cat/y.png": encoded("F", form="TIFF")}, ["test/cat/y.png", "more than 16 bits"]),
        (
            _without("test/") | {"val/cat/z.png": b"", "valid/cat/z.png": b""},
            ["val/ and valid/", "call one test/"],
        ),
        (
            standard() | {"test/cat/y.png": b"%!PS-Adobe-3.0 EPSF-3.0\n"},
            ["test/cat/y.png", "cannot be decoded"],
        ),
        ({"train/a.png": encoded(), "test/a.png": encoded()}, ["train/", "no class folders"]),
    ],
)
def test_an_unfit_dataset_is_told_in_one_line(
    pack: Callable[[dict[str, bytes], Path], Path],
    files: dict[str, bytes],
    said: list[str],
    tmp_path: Path,
    cache_dir: Path,
) -> None:
    """Each fault names the folder, the class or the image that has it."""
    (tmp_path / "data").mkdir()
    path = pack(files, tmp_path / "data" if pack is in_folder else tmp_path / "data/images.zip")
    require_error(path, cache_dir, *said)


def test_an_empty_class_folder_is_told(tmp_path: Path, cache_dir: Path) -> None:
    """A class without images is named, with the split in which it has none."""
    path = in_folder(standard(), tmp_path / "data")
    (path / "train/dog").mkdir()
    (path / "test/dog").mkdir()
    require_error(path, cache_dir, "class 'dog'", "no images in train/")


def test_the_check_needs_no_decoding(tmp_path: Path) -> None:
    """A missing split is found by the check alone, broken images are not looked at."""
    path = in_folder(_without("test/") | {"train/cat/a.png": b"broken"}, tmp_path / "data")
    with pytest.raises(DataError, match=r"no folder test/, .*--validation-split"):
        check(f"folder:{path}", needs_test=True)
    check(f"folder:{path}")
    (path / "test").mkdir()
    check(f"folder:{path}", needs_test=True)


def test_a_decompression_bomb_is_an_error(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow's limits, the warning's and the error's, become a DataError that names the image."""
    path = in_folder(standard(), tmp_path / "data")
    for limit in (20, 5):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        require_error(path, cache_dir, "train/ant/a.png", "too large")


def test_a_pipe_among_the_images_is_no_hang(tmp_path: Path, cache_dir: Path) -> None:
    """What is no plain file is not read."""
    path = in_folder(standard(), tmp_path / "data")
    os.mkfifo(path / "train/cat/pipe.png")
    require_error(path, cache_dir, "pipe.png", "is no file")


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
@pytest.mark.parametrize("pack", [in_folder, in_zip])
def test_the_images_to_validate_on_may_have_other_names(
    pack: Callable[[dict[str, bytes], Path], Path], name: str, tmp_path: Path, cache_dir: Path
) -> None:
    """val/, valid/ and validation/ are taken where there is no test/, in small or large letters."""
    files = {each.replace("test/", f"{name}/"): content for each, content in standard().items()}
    dataset = opened(pack(files, tmp_path / "data"), cache_dir)
    assert (len(dataset.train), len(dataset.test)) == (3, 2)
    assert f"{name}/" in dataset.source
    both = standard() | {each: content for each, content in files.items() if each.startswith(f"{name}/x")}
    assert "test/" in opened(pack(both, tmp_path / "both"), cache_dir).source


@pytest.mark.parametrize("top", ["train/", ""])
@pytest.mark.parametrize("pack", [in_folder, in_zip])
def test_images_without_a_test_set_are_held_out_of_the_others(
    pack: Callable[[dict[str, bytes], Path], Path], top: str, tmp_path: Path, cache_dir: Path
) -> None:
    """Classes in train/, or in the folder itself, are a dataset; without --validation-split one line says
    what is missing."""
    files = {name.replace("train/", top): each for name, each in _without("test/").items()}
    path = pack(files, tmp_path / "data")
    dataset = opened(path, cache_dir)
    assert (dataset.classes, len(dataset.train), len(dataset.test)) == (("ant", "cat"), 3, 0)
    with pytest.raises(ConfigError, match="--validation-split"):
        select(TrainConfig(dataset=dataset.name), dataset)
    chosen = select(TrainConfig(dataset=dataset.name, validation_split=0.4), dataset)
    assert (len(chosen.train_pool), len(chosen.val_pool)) == (2, 1)


# ── hostile zips ──────────────────────────────────────────────────────────────────────────────────


def test_a_zip_that_points_outside_is_refused(tmp_path: Path, cache_dir: Path) -> None:
    """A name with .. is refused, and nothing is ever written but the cache."""
    path = in_zip(standard() | {"train/cat/../../../evil.png": encoded()}, tmp_path / "data.zip")
    require_error(path, cache_dir, "evil.png", "points out of the zip")
    assert [entry.name for entry in tmp_path.iterdir()] == ["data.zip"]


def test_a_link_in_a_zip_is_not_followed(tmp_path: Path, cache_dir: Path) -> None:
    """A symbolic link in a zip is refused, whatever it points to."""
    path = in_zip(standard(), tmp_path / "data.zip")
    link = zipfile.ZipInfo("train/cat/link.png")
    link.create_system = 3
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    require_error(path, cache_dir, "train/cat/link.png", "symbolic link")


@pytest.mark.parametrize("pack", [in_folder, in_zip])
def test_a_huge_file_is_refused_before_it_is_read(
    pack: Callable[[dict[str, bytes], Path], Path],
    tmp_path: Path,
    cache_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A size over the limit is an error, without reading."""
    monkeypatch.setattr(trees, "FILE_BYTES", 100_000)
    (tmp_path / "data").mkdir()
    files = standard() | {"train/cat/bomb.png": bytes(100_001)}
    path = pack(files, tmp_path / "data" if pack is in_folder else tmp_path / "data/images.zip")
    require_error(path, cache_dir, "train/cat/bomb.png", "100,001 bytes")


def test_a_zip_that_lies_about_a_size_is_an_error(tmp_path: Path, cache_dir: Path) -> None:
    """A member is read no further than it declared to go."""
    path = in_zip(standard() | {"train/cat/c.png": bytes(5_000_000)}, tmp_path / "data.zip")
    content = path.read_bytes()
    path.write_bytes(content.replace((5_000_000).to_bytes(4, "little"), (500).to_bytes(4, "little")))
    require_error(path, cache_dir, "train/cat/c.png")


def test_an_encrypted_zip_is_an_error(tmp_path: Path, cache_dir: Path) -> None:
    """A member that asks for a password is named."""
    path = in_zip(standard(), tmp_path / "data.zip")
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + offset] |= 1
    path.write_bytes(content)
    require_error(path, cache_dir, "train/cat/b.png", "cannot be read")


def test_garbage_is_never_more_than_one_error(tmp_path: Path, cache_dir: Path) -> None:
    """Zips with random bytes changed or cut either still open or raise DataError; so does pure noise."""
    chance = random.Random(0)
    whole = in_zip(standard(), tmp_path / "whole.zip").read_bytes()
    path = tmp_path / "data.zip"
    for _ in range(150):
        content = bytearray(whole[: chance.choice([len(whole), chance.randrange(len(whole))])])
        for _ in range(chance.randrange(8)):
            if content:
                content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            opened(path, cache_dir)
    path.write_bytes(chance.randbytes(5000))
    require_error(path, cache_dir, "no folder and no sound zip")
