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
