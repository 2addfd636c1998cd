"""One photograph: from a file as people have it to the pixels that a network sees."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import numpy as np

from rankwise.data.dataset import Images
from rankwise.errors import DataError, one_line, unknown_name

if TYPE_CHECKING:
    from PIL import Image as Pillow

    Picture = Pillow.Image

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
"""What Pillow may read; its other formats include some that start programs."""

BACKGROUND = "white"

_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)
"""Orientations whose image is stored on its side."""


@dataclass(frozen=True)
class Header:
    """What is known of an image before it is decoded: its size when it stands upright, and whether it is
    grey."""

    width: int
    height: int
    grey: bool


def colour(name: str) -> tuple[int, int, int]:
    """A background by its name or as ``#rrggbb``. Raises DataError for what is no colour."""
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(name)[:3]
    except ValueError:
        if name.startswith("#") or "(" in name:
            raise DataError(
                f"--background {name!r} was given, expected a colour such as white, black or #ff8000"
            ) from None
        raise DataError(f"--background: {unknown_name('colour', name, ImageColor.colormap)}") from None


def header(file: IO[bytes], name: str, background: tuple[int, int, int]) -> Header:
    """Looks at the beginning of a file. Raises DataError, by the image's `name`, for what cannot be read."""
    with _opened(file, name) as picture:
        width, height = picture.size
        if picture.format != "TIFF" and "exif" in picture.info and _orientation(picture) in _LYING:
            width, height = height, width
        return Header(width, height, _is_grey(picture, background))


def pixels(
    file: IO[bytes],
    name: str,
    shape: tuple[int, int, int],
    background: tuple[int, int, int],
    *,
    fits: bool = False,
) -> Images:
    """The image as [height, width, channels], 8 bits each, of this `shape`.

    It stands upright as its EXIF says. What is transparent in it shows the background. Grey of 16 bits is
    scaled to 8; of colours of 16 bits Pillow reads the upper 8. CMYK goes by the profile in the file to sRGB,
    or by the plain formula if there is none. With `fits` the largest part of the shape's proportions is cut
    out of its centre and scaled by Pillow's bilinear filter, which averages over all pixels that become one;
    otherwise it must have the size. Raises DataError, by the image's `name`.
    """
    from PIL import Image

    height, width, channels = shape
    with _opened(file, name) as opened:
        opened.load()
        turn = _turns().get(_orientation(opened))
        picture = _with_eight_bits(opened, name)
        picture = _opaque(picture, background)
        picture = _without_inks(picture)
        picture = picture.convert("L" if channels == 1 else "RGB")
        picture = picture if turn is None else picture.transpose(turn)
        if picture.size != (width, height):
            if not fits:
                raise DataError(
                    f"image {name!r} turns out to have {picture.width}x{picture.height} pixels, not "
                    f"{width}x{height}: start again if it has just changed, or give --image-size"
                )
            picture = picture.resize(
                (width, height), Image.Resampling.BILINEAR, box=_centre(picture.size, width, height)
            )
        return np.asarray(picture, np.uint8).reshape(shape)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """While inside, Pillow neither logs nor warns: what is wrong a DataError says. Not to be entered by
    several threads at once."""
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _opened(file: IO[bytes], name: str) -> Iterator[Picture]:
    """The image, of which only the header is read; Pillow's errors become a DataError that names it."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as picture:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and picture.width * picture.height > most:
                raise DataError(
                    f"image {name!r} is too large: {picture.width}x{picture.height} pixels, where at most "
                    f"{most:,} are read"
                )
            yield picture
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"image {name!r} is too large: {one_line(error)}") from error
    except Exception as error:  # on damaged files Pillow raises nearly anything
        raise DataError(
            f"image {name!r} cannot be decoded: {one_line(error)}; repair it or take it away"
        ) from error


def _orientation(picture: Picture) -> int:
    """As EXIF counts it; 1, upright, where that cannot be read."""
    try:
        return int(picture.getexif().get(_ORIENTATION, 1))
    except Exception:  # EXIF is damaged more often than images are, and viewers then pass it over
        return 1


def _turns() -> dict[int, Pillow.Transpose]:
    """How an image of each orientation is set upright."""
    from PIL.Image import Transpose

    return {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }


def _is_grey(picture: Picture, background: tuple[int, int, int]) -> bool:
    grey = picture.mode in ("1", "L", "LA", "La", "I") or picture.mode.startswith("I;16")
    return grey and not (picture.has_transparency_data and len(set(background)) > 1)


def _with_eight_bits(picture: Picture, name: str) -> Picture:
    """Grey of 16 bits in 8. Raises DataError for more bits, of which nobody knows what is white."""
    from PIL import Image

    has_16 = picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format in ("PNG", "PPM"))
    if not has_16 and not picture.mode.startswith(("I", "F")):
        return picture
    if not has_16:
        raise DataError(
            f"image {name!r} has more than 16 bits a channel, or numbers below 0 (mode {picture.mode}), so "
            "there is no telling which is white: save it with 8 or 16"
        )
    if "transparency" in picture.info:
        raise DataError(
            f"image {name!r} has 16 bits and a grey that stands for transparent: save it with 8, or with an "
            "alpha channel"
        )
    values = np.asarray(picture).astype(np.uint32)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


def _opaque(picture: Picture, background: tuple[int, int, int]) -> Picture:
    """The image over the background, if any of it may be transparent."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture
    under = Image.new("RGBA", picture.size, (*background, 255))
    return Image.alpha_composite(under, picture.convert("RGBA")).convert("RGB")


def _without_inks(picture: Picture) -> Picture:
    """CMYK as RGB."""
    from PIL import ImageCms

    profile = picture.info.get("icc_profile")
    if picture.mode != "CMYK" or not profile:
        return picture
    try:
        printed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        found = ImageCms.profileToProfile(picture, printed, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):  # a profile that is damaged, or of other channels
        return picture
    return found if found is not None else picture


def _centre(size: tuple[int, int], width: int, height: int) -> tuple[float, float, float, float]:
    """The largest box with the proportions width : height in the middle of an image of this size."""
    whole_width, whole_height = size
    scale = min(whole_width / width, whole_height / height)
    left, top = (whole_width - scale * width) / 2, (whole_height - scale * height) / 2
    return left, top, left + scale * width, top + scale * height
