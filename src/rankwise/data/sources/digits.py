"""The handwritten digits that come with scikit-learn: a real dataset that needs no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rankwise.data.dataset import Decoded, Images, Report, Samples, Source
from rankwise.errors import DataError, one_line

SIDE = 32
TEST_EVERY = 5


class Digits(Source):
    """1,797 digits of 8x8 grey values, brought to 32x32 RGB so that networks for CIFAR-10 take them.

    Of each class every fifth sample is for testing: 1,437 for training and 360 for testing.
    """

    name = "digits"

    def check(self) -> None:
        """Nothing can be missing: the digits are installed with scikit-learn."""

    def key(self) -> dict[str, object]:
        return {"side": SIDE, "test_every": TEST_EVERY}

    def decode(self, report: Report, downloads: Path) -> Decoded:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # takes a second, which a prepared dataset does without

        try:
            values, labels = load_digits(return_X_y=True)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the digits of scikit-learn cannot be read: {one_line(error)}; install scikit-learn anew"
            ) from error
        images = _enlarge(np.asarray(values).reshape(-1, 8, 8).astype(np.int64))
        labels = np.asarray(labels, np.int64)

        by_class = np.argsort(labels, kind="stable")
        for_test = np.zeros(len(labels), np.bool_)
        for_test[by_class[::TEST_EVERY]] = True
        train, test = (
            Samples(int(chosen.sum()), (SIDE, SIDE, 3), [(images[chosen], labels[chosen])])
            for chosen in (~for_test, for_test)
        )
        return Decoded(tuple("0123456789"), train, test, "load_digits of scikit-learn")


def _enlarge(values: NDArray[np.int64]) -> Images:
    """Grey values 0..16 [n, 8, 8] as uint8 images [n, SIDE, SIDE, 3], bilinear.

    In whole numbers, so that every machine gets the same bits: the weights are eighths.
    """
    place = ((np.arange(SIDE) + 0.5) / 4 - 0.5).clip(0, 7)
    eighths = np.array([np.interp(place, np.arange(8), row) for row in np.eye(8)]).T * 8
    weights = np.rint(eighths).astype(np.int64)  # [SIDE, 8]
    enlarged = weights @ values @ weights.T  # 0 .. 16 * 64
    grey = ((enlarged * 255 + 512) // 1024).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=3)
