"""Photographs as people have them: what the network sees of them."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from rankwise.data import Dataset, check, prepare
from rankwise.data.sources.folder import Look
from rankwise.data.sources.pictures import header, pixels
from rankwise.errors import DataError

WHITE = (255, 255, 255)

CORNERS = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
"""A picture in which each pixel is another grey."""


def packed(picture: Image.Image, form: str = "PNG", **options: Any) -> io.BytesIO:
    file = io.BytesIO()
    picture.save(file, form, **options)
    file.seek(0)
    return file


def seen(
    file: io.BytesIO, shape: tuple[int, int, int], background: tuple[int, int, int] = WHITE, **options: Any
) -> np.ndarray:
    return pixels(file, "x", shape, background, **options)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, CORNERS),
        (2, CORNERS[:, ::-1]),
        (3, CORNERS[::-1, ::-1]),
        (4, CORNERS[::-1]),
        (5, CORNERS.T),
        (6, np.rot90(CORNERS, -1)),
        (7, CORNERS[::-1, ::-1].T),
        (8, np.rot90(CORNERS)),
    ],
)
@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG"])
def test_a_photograph_stands_upright(orientation: int, upright: np.ndarray, form: str) -> None:
    """Each of the eight ways in which a camera can be held, by EXIF's table; the header tells the size so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = packed(Image.fromarray(CORNERS), form, exif=exif, **({"quality": 100} if form == "JPEG" else {}))
    found = header(file, "x", WHITE)
    assert (found.height, found.width) == upright.shape
    file.seek(0)
    given = seen(file, (*upright.shape, 1))[..., 0].astype(int)
    assert np.abs(given - upright).max() <= (2 if form == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_passed_over() -> None:
    """A picture that every viewer shows is no error for what stands beside it."""
    file = packed(Image.fromarray(CORNERS), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")
    assert header(file, "x", WHITE).width == 6
    file.seek(0)
    assert seen(file, (4, 6, 1)).shape == (4, 6, 1)


def transparent(mode: str) -> Image.Image:
    """Three pixels: opaque 100, half of it, and nothing."""
    values = {"LA": (100,), "RGBA": (100, 20, 60)}[mode]
    return Image.fromarray(np.array([[(*values, 255), (*values, 128), (*values, 0)]], np.uint8))


@pytest.mark.parametrize(
    ("background", "expected"), [(WHITE, [100, 177, 255]), ((0, 0, 0), [100, 50, 0])], ids=["white", "black"]
)
def test_grey_with_alpha_is_grey_over_its_background(
    background: tuple[int, int, int], expected: list[int]
) -> None:
    """One channel, mixed by its alpha; a coloured background makes it colour."""
    file = packed(transparent("LA"))
    assert header(file, "x", background).grey
    assert not header(packed(transparent("LA")), "x", (255, 0, 0)).grey
    file.seek(0)
    np.testing.assert_allclose(seen(file, (1, 3, 1), background).ravel(), expected, atol=1)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "palette"])
def test_what_is_transparent_shows_the_background(form: str) -> None:
    """Alpha channels, and palettes and colours that stand for transparent: never what lies under them."""
    picture = transparent("RGBA")
    if form == "palette":
        file = packed(Image.fromarray(np.array([[(9, 9, 9), (1, 2, 3)]], np.uint8)), transparency=(1, 2, 3))
    else:
        file = packed(picture, form, **({"lossless": True, "exact": True} if form == "WEBP" else {}))
    width = 2 if form == "palette" else 3
    assert seen(file, (1, width, 3), (10, 200, 30))[0, -1].tolist() == [10, 200, 30]


@pytest.mark.parametrize(("form", "order"), [("PNG", "<"), ("TIFF", "<"), ("TIFF", ">"), ("PPM", "<")])
def test_grey_of_16_bits_is_scaled(form: str, order: str) -> None:
    """0 to 65535 becomes 0 to 255, to the nearest: Pillow alone would cut it off at 255."""
    values = np.array([[0, 128, 129, 257, 32768, 65535]], np.uint16)
    if order == ">":
        file = packed(Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes()), form)
    else:
        file = packed(Image.fromarray(values), form)
    assert header(file, "x", WHITE).grey
    file.seek(0)
    assert seen(file, (1, 6, 1)).ravel().tolist() == [0, 0, 1, 1, 128, 255]


@pytest.mark.parametrize("values", [np.float32([[0.5, 1]]), np.int32([[5, -1]])], ids=["float", "signed"])
def test_more_bits_are_refused_by_name(values: np.ndarray) -> None:
    """Where nobody can say which number is white, one line says so."""
    with pytest.raises(DataError, match=r"'x' has more than 16 bits .*save it with 8 or 16"):
        seen(packed(Image.fromarray(values), "TIFF"), (1, 2, 1))


def test_cmyk_is_converted() -> None:
    """Inks become light: by the plain formula, or by the file's profile where that can be used."""
    inks = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "CMYK")
    expected = [[255, 255, 255], [0, 255, 255], [0, 0, 0]]
    assert seen(packed(inks, "TIFF"), (1, 3, 3))[0].tolist() == expected
    photo = packed(inks.resize((24, 8), Image.Resampling.NEAREST), "JPEG", quality=100)
    middles = seen(photo, (8, 24, 3))[4, 4::8].astype(int)
    assert np.abs(middles - expected).max() < 12
    other = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert seen(packed(inks, "TIFF", icc_profile=other), (1, 3, 3))[0].tolist() == expected


def test_any_size_is_cut_and_scaled() -> None:
    """As the whole image scaled to the height, of which the middle square is kept."""
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = [[0, 0, 100, 100], [0, 0, 100, 100], [40, 40, 200, 200], [40, 40, 200, 200]]
    wide[:, :4] = wide[:, 8:] = 255
    for side in (2, 3, 9):
        whole = np.asarray(Image.fromarray(wide).resize((3 * side, side), Image.Resampling.BILINEAR))
        given = seen(packed(Image.fromarray(wide)), (side, side, 1), fits=True)
        np.testing.assert_array_equal(given[..., 0], whole[:, side : 2 * side])
    level = Image.fromarray(np.full((7, 31, 3), 77, np.uint8))
    assert np.unique(seen(packed(level), (64, 64, 3), fits=True)).tolist() == [77]
    line = Image.new("L", (1, 5000), 9)  # a panorama makes no picture of gigabytes
    assert seen(packed(line), (32, 32, 1), fits=True).shape == (32, 32, 1)


# ── datasets of them ──────────────────────────────────────────────────────────────────────────────


def photographs(path: Path) -> Path:
    """Two classes of images of all sizes and kinds."""
    kinds: dict[str, Callable[[], io.BytesIO]] = {
        "a.png": lambda: packed(transparent("RGBA").resize((30, 20))),
        "b.jpg": lambda: packed(Image.new("CMYK", (9, 17)), "JPEG"),
        "c.tif": lambda: packed(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "TIFF"),
        "d.gif": lambda: packed(Image.new("P", (1, 40)), "GIF"),
        "e.webp": lambda: packed(Image.new("RGB", (100, 3), "red"), "WEBP"),
        "Thumbs.db": lambda: io.BytesIO(b"litter"),
    }
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for file, make in kinds.items():
                place = path / split / name / file
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(make().read())
    return path


def opened(path: Path, cache_dir: Path, **options: Any) -> Dataset:
    return prepare(f"folder:{path}", cache_dir=cache_dir, **options)


def test_photographs_of_all_kinds_are_one_dataset(tmp_path: Path) -> None:
    """With a size they train together; another size or background is another dataset, decoded once."""
    path = photographs(tmp_path / "photos")
    first = opened(path, tmp_path / "cache", image_size=16)
    assert first.train.images.shape == (10, 16, 16, 3)
    assert first.train.images[2].min() == 255
    dark = opened(path, tmp_path / "cache", image_size=16, background="black")
    assert first.train.images[0, 8, 14].min() > 230 > 20 > dark.train.images[0, 8, 14].max()
    assert opened(path, tmp_path / "cache", image_size=8).image_shape == (3, 8, 8)
    again = opened(path, tmp_path / "cache", image_size=16, on_progress=lambda *_: pytest.fail("anew"))
    np.testing.assert_array_equal(again.train.images, first.train.images)


def test_threads_keep_the_order(tmp_path: Path) -> None:
    """Decoded on many cores, each image keeps its place and its class."""
    path = tmp_path / "many"
    for number in range(60):
        place = path / f"train/{number % 3}/{number:03}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (10 + number, 12), number).save(place)
    dataset = opened(path, tmp_path / "cache", image_size=4)
    order = [number for label in range(3) for number in range(label, 60, 3)]
    assert dataset.train.images[:, 2, 2, 0].tolist() == order
    assert dataset.train.labels.tolist() == [number % 3 for number in order]


@pytest.mark.parametrize("how", ["backslashes", "code page", "utf-8 without its mark", "a field beside it"])
def test_zips_of_windows_are_read(how: str, tmp_path: Path) -> None:
    """Backslashes between folders, and names in whatever letters, as the packers of Windows write them."""
    path, name = tmp_path / "windows.zip", "Bär"
    image = packed(Image.new("RGB", (4, 4))).read()
    with zipfile.ZipFile(path, "w") as archive:
        for file in ("train/{}/1.png", "test/{}/1.png", "train/ant/1.png", "test/ant/1.png"):
            plain, full = file.format("Bar"), file.format(name).encode()
            member = zipfile.ZipInfo(plain if how == "a field beside it" else full.decode())
            member.create_system = 0
            if how == "a field beside it":
                field = b"\1" + zlib.crc32(plain.encode()).to_bytes(4, "little") + full
                member.extra = b"\x75\x70" + len(field).to_bytes(2, "little") + field
            archive.writestr(member, image)
        archive.writestr("train/ant/desktop.ini", b"litter")
    content = path.read_bytes()
    if how == "backslashes":
        content = content.replace(b"/", b"\\")
    elif how != "a field beside it":
        raw = name.encode("cp437") + b" " if how == "code page" else name.encode()
        content = content.replace(name.encode(), raw).replace(b"\x14\0\0\x08", b"\x14\0\0\0")
    path.write_bytes(content)
    dataset = opened(path, tmp_path / "cache")
    assert [each.strip() for each in dataset.classes] == [name, "ant"]
    assert (len(dataset.train), len(dataset.test)) == (2, 2)


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("digits", {"image_size": 64}, "--image-size 64 was given, .*folder:PATH.*digits"),
        ("cifar10", {"background": "black"}, "--background black was given"),
        ("folder:.", {"background": "whit"}, "unknown colour 'whit': did you mean 'white'"),
        ("folder:.", {"background": "#12345"}, "expected a colour such as white"),
    ],
)
def test_an_option_that_does_not_fit_is_one_line(
    spec: str, options: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, with the nearest right form."""
    photographs(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=said):
        prepare(spec, cache_dir=tmp_path / "cache", **options)
    with pytest.raises(DataError, match=said):
        check(spec, look=Look(options.get("image_size"), options.get("background", "white")))
