"""A picture of a dataset: some samples of each class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rankwise.data.dataset import Dataset, Images
from rankwise.errors import DataError, one_line

GAP = 2
SMALLEST, LARGEST = 48, 128
"""Pixels of the longer side of a sample on the sheet."""
TEXT_HEIGHT = 14
PAPER, INK = (255, 255, 255), (0, 0, 0)


def draw_sheet(dataset: Dataset, path: Path, rows: int = 10, columns: int = 10, seed: int = 0) -> None:
    """Write a PNG with the first `rows` classes, a row each: its name and `columns` training samples.

    `seed` chooses the samples; a class with fewer fills only a part of its row. Small images are
    enlarged by whole factors, so that their pixels show. One channel is drawn grey, of three and more
    the first three as RGB, of two the first. Raises DataError if the file cannot be written.
    """
    if rows < 1 or columns < 1:
        raise DataError(
            f"a sheet of {rows} rows and {columns} columns was asked for: expected 1 or more of each"
        )
    from PIL import Image, ImageDraw, ImageFont

    height, width = dataset.train.images.shape[1:3]
    longer = max(height, width)
    scale = max(1, SMALLEST // longer) if longer < LARGEST else LARGEST / longer
    tile_width, tile_height = max(1, round(width * scale)), max(1, round(height * scale))
    row_height = max(tile_height, TEXT_HEIGHT) + GAP

    font = ImageFont.load_default(TEXT_HEIGHT)
    names = [_printable(name) for name in dataset.classes[:rows]]
    margin = max(round(font.getlength(name)) for name in names) + 4 * GAP
    sheet = Image.new("RGB", (margin + columns * (tile_width + GAP), len(names) * row_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)

    random = np.random.default_rng(seed)
    labels = np.asarray(dataset.train.labels)
    for label, name in enumerate(names):
        top = GAP + label * row_height
        draw.text((2 * GAP, top + row_height // 2), name, fill=INK, font=font, anchor="lm")
        members = np.flatnonzero(labels == label)
        chosen = (
            random.choice(members, min(columns, len(members)), replace=False) if len(members) else members
        )
        for column, index in enumerate(chosen):
            picture = Image.fromarray(_drawable(dataset.train.images[index]))
            resampling = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
            picture = picture.resize((tile_width, tile_height), resampling)
            sheet.paste(picture, (margin + column * (tile_width + GAP), top))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path, format="PNG")
    except (OSError, ValueError) as error:
        raise DataError(f"the sheet cannot be written to {path}: {one_line(error)}") from error


def _drawable(image: Images) -> Images:
    """[height, width] or [height, width, 3], whatever the channels were."""
    return np.ascontiguousarray(image[..., :3] if image.shape[2] >= 3 else image[..., 0])


def _printable(name: str) -> str:
    """The name with what cannot be drawn replaced, and not longer than a row can bear."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:40]) or "?"
