"""Digits and synthetic images: always there, and always the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankwise.data import prepare
from rankwise.data.dataset import Split


def same(one: Split, other: Split) -> bool:
    return np.array_equal(one.images, other.images) and np.array_equal(one.labels, other.labels)


def test_digits_have_the_form_of_cifar(tmp_path: Path) -> None:
    """1,797 digits as 32x32 RGB, each class split alike, no digit in both splits."""
    digits = prepare("digits", cache_dir=tmp_path)
    assert digits.image_shape == (3, 32, 32)
    assert digits.classes == tuple("0123456789")
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    shares = np.bincount(digits.test.labels) / np.bincount(
        np.concatenate([digits.train.labels, digits.test.labels])
    )
    assert np.all(np.abs(shares - 0.2) < 0.01)
    assert digits.train.images[:].max() == 255
    assert digits.train.images[:].min() == 0
    assert np.all(digits.train.images[..., :1] == digits.train.images)
    train, test = ({image.tobytes() for image in split.images} for split in (digits.train, digits.test))
    assert not train & test


def test_digits_look_like_the_originals(tmp_path: Path) -> None:
    """Shrunk again, a digit has its original's values but for the blur of the enlarging."""
    from sklearn.datasets import load_digits

    digits = prepare("digits", cache_dir=tmp_path)
    values, labels = load_digits(return_X_y=True)
    first = (
        values[np.argsort(labels, kind="stable")[0]].reshape(8, 8) * 255 / 16
    )  # the first 0 is for testing
    zero = digits.test.images[np.flatnonzero(digits.test.labels == 0)[0], ..., 0].astype(float)
    shrunk = zero.reshape(8, 4, 8, 4).mean(axis=(1, 3))
    assert np.corrcoef(shrunk.ravel(), first.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("spec", ["digits", "synthetic:300"])
def test_made_anew_the_samples_are_the_same(spec: str, tmp_path: Path) -> None:
    """Each host decodes for itself, so all must come to the same bits."""
    one, other = (prepare(spec, cache_dir=tmp_path / folder) for folder in "ab")
    assert same(one.train, other.train)
    assert same(one.test, other.test)


def test_synthetic_images_are_the_same_for_ever(tmp_path: Path) -> None:
    """A change of the recipe needs a new recipe number, or caches and records would not tell it."""
    dataset = prepare("synthetic:500", cache_dir=tmp_path)
    assert dataset.train.labels[:8].tolist() == [1, 4, 9, 7, 3, 1, 4, 6]
    assert int(dataset.train.images[:].sum(dtype=np.int64)) == 193_384_052


@pytest.mark.parametrize(
    ("spec", "name", "train", "test"),
    [
        ("synthetic:10", "synthetic:10", 10, 10),
        ("synthetic:1_003", "synthetic:1003", 1003, 200),
        ("synthetic:1k", "synthetic:1000", 1000, 200),
        ("synthetic:60k", "synthetic:60000", 60_000, 10_000),
    ],
)
def test_synthetic_has_as_many_samples_as_asked_for(
    spec: str, name: str, train: int, test: int, tmp_path: Path
) -> None:
    """N for training, a fifth (10 to 10,000) for testing, and every class in both."""
    dataset = prepare(spec, cache_dir=tmp_path)
    assert (dataset.name, len(dataset.train), len(dataset.test)) == (name, train, test)
    assert dataset.image_shape == (3, 32, 32)
    for split in (dataset.train, dataset.test):
        counts = np.bincount(split.labels, minlength=10)
        assert len(counts) == 10
        assert counts.min() >= len(split) // 10 - 1


def test_synthetic_samples_differ(tmp_path: Path) -> None:
    """No image occurs twice, in training, in testing or across."""
    dataset = prepare("synthetic:1000", cache_dir=tmp_path)
    images = [image.tobytes() for split in (dataset.train, dataset.test) for image in split.images]
    assert len(set(images)) == len(images) == 1200


def test_synthetic_needs_more_than_a_linear_model(tmp_path: Path) -> None:
    """A linear model stays near chance where one on the spectrum, which ignores place and phase, does not."""
    from sklearn.linear_model import RidgeClassifier

    dataset = prepare("synthetic:2000", cache_dir=tmp_path)

    def pixels(split: Split) -> np.ndarray:
        return split.images.reshape(len(split), -1).astype(np.float32) / 255

    def spectrum(split: Split) -> np.ndarray:
        grey = split.images.mean(axis=3)
        strength = np.abs(np.fft.rfft2(grey - grey.mean(axis=(1, 2), keepdims=True)))
        near = np.concatenate([strength[:, :10, :10], strength[:, -9:, :10]], axis=1)
        return np.log1p(near).reshape(len(split), -1)

    def accuracy(features) -> float:  # type: ignore[no-untyped-def]
        model = RidgeClassifier(alpha=100.0).fit(features(dataset.train), dataset.train.labels)
        return float(model.score(features(dataset.test), dataset.test.labels))

    linear, other = accuracy(pixels), accuracy(spectrum)
    assert linear < 0.3
    assert other > linear + 0.2
