"""From uint8 images to batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rankwise.data.dataset import Split
from rankwise.data.feed import feed


@pytest.fixture
def split() -> Split:
    rng = np.random.default_rng(0)
    return Split(rng.integers(0, 256, (1000, 8, 6, 3), dtype=np.uint8), np.arange(1000))


@pytest.mark.parametrize("batch_size", [1, 3, 16, 255, 256, 600])
def test_batches_are_the_samples_in_order(split: Split, batch_size: int) -> None:
    """Whatever the batch size, each sample comes once, in order, with its label, scaled as in the paper."""
    order = np.random.default_rng(1).permutation(1000)[:777]
    seen = 0
    for images, labels in feed(split, order, batch_size):
        chosen = order[seen : seen + batch_size]
        expected = (split.images[chosen].astype(np.float32) / 255 - 0.5) / 0.5
        assert np.allclose(images.numpy().transpose(0, 2, 3, 1), expected, atol=1e-6)
        assert labels.tolist() == chosen.tolist()
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        seen += len(labels)
    assert seen == len(order)


def test_flips_mirror_about_half(split: Split) -> None:
    """With flips each image is itself or its mirror image, about half of them each."""
    plain, _ = next(feed(split, np.arange(1000), 1000))
    generator = torch.Generator().manual_seed(0)
    flipped, _ = next(feed(split, np.arange(1000), 1000, flip=True, generator=generator))
    same = (flipped == plain).flatten(1).all(1)
    mirrored = (flipped == plain.flip(3)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert 400 < int(mirrored.sum()) < 600


def test_crops_are_windows_of_the_padded_image(split: Split) -> None:
    """A padded crop is a window of the image with a border of zeros, and all offsets occur."""
    plain, _ = next(feed(split, np.arange(200), 200))
    generator = torch.Generator().manual_seed(0)
    cropped, _ = next(feed(split, np.arange(200), 200, crop_padding=1, generator=generator))
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1))
    found = set()
    for image, frame in zip(cropped, padded, strict=True):
        places = [
            (top, left)
            for top in range(3)
            for left in range(3)
            if torch.equal(frame[:, top : top + 8, left : left + 6], image)
        ]
        assert places
        found.update(places)
    assert len(found) == 9


def test_augmentation_is_seeded(split: Split) -> None:
    """The same seed gives the same bits, another seed others."""

    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        batches = feed(split, np.arange(500), 64, flip=True, crop_padding=2, generator=generator)
        return torch.cat([images for images, _ in batches])

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
