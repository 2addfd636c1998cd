"""Training images changed at random, against plain references one image at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from rankwise import data, models, synchronise
from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.data.augmentation import GREY, Augmentation
from rankwise.data.dataset import Split
from rankwise.data.feed import Feed, as_input
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import tiny

SHAPE = (1000, 8, 6, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, SHAPE, dtype=np.uint8)
EVERYTHING = np.arange(len(IMAGES))
ALL: dict[str, Any] = {"flip": "alternating", "translate": 2, "cutout": 3}


def augmented(seed: int = 0, epoch: int = 1, indices: np.ndarray = EVERYTHING, **options: Any) -> np.ndarray:
    return Augmentation(seed, epoch, **options)(IMAGES[indices], indices)


def mirrored(images: np.ndarray) -> np.ndarray:
    """Which images are mirror images; each is that or itself."""
    same = (images == IMAGES).all((1, 2, 3))
    other = (images == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ other).all()
    return other


def test_random_flips_mirror_about_half_anew_each_epoch() -> None:
    """With random flips each image is itself or its mirror image, about half of them each, whatever it was in
    the epoch before."""
    first, second = (mirrored(augmented(epoch=epoch, flip="random")) for epoch in (1, 2))
    assert 400 < first.sum() < 600
    assert 400 < (first == second).sum() < 600


def test_alternating_flips_show_both_sides_in_two_epochs() -> None:
    """Alternating flips begin as random ones do; then each image is flipped in every other epoch."""
    epochs = [mirrored(augmented(epoch=epoch, flip="alternating")) for epoch in (1, 2, 3)]
    assert 400 < epochs[0].sum() < 600
    assert (epochs[0] != epochs[1]).all()
    assert (epochs[0] == epochs[2]).all()


@pytest.mark.parametrize("pixels", [1, 4, 9])
def test_translations_are_windows_of_the_reflected_image(pixels: int) -> None:
    """A moved image is a window of the image with a reflected border, and all offsets occur."""
    moved = augmented(translate=pixels)
    found = set()
    for image, result in zip(IMAGES, moved, strict=True):
        frame = np.pad(image, ((pixels, pixels), (pixels, pixels), (0, 0)), "reflect")
        places = [
            (top, left)
            for top in range(2 * pixels + 1)
            for left in range(2 * pixels + 1)
            if (frame[top : top + 8, left : left + 6] == result).all()
        ]
        assert places
        found.update(places)
    assert len(found) > 0.9 * (2 * pixels + 1) ** 2


def test_cutout_leaves_a_grey_square() -> None:
    """What is cut out is a square, or the part of one that is on the image; the rest is as it was."""
    for image, result in zip(IMAGES, augmented(cutout=3), strict=True):
        changed = (result != image).any(2)
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        window = result[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert (window == GREY).all()
        assert max(window.shape[:2]) <= 3
        assert window.shape[0] == 3 or rows[0] == 0 or rows[-1] == 7
        assert window.shape[1] == 3 or columns[0] == 0 or columns[-1] == 5


@given(st.permutations(range(12)), st.integers(1, 12))
def test_what_becomes_of_an_image_depends_on_nothing_else(order: list[int], batch: int) -> None:
    """Seed, epoch and index alone say what becomes of an image: not its batch, nor its place in it."""
    whole = augmented(**ALL)
    indices = np.array(order)
    for start in range(0, 12, batch):
        part = indices[start : start + batch]
        assert (augmented(indices=part, **ALL) == whole[part]).all()


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 2}])
def test_augmentation_is_seeded(other: dict[str, int]) -> None:
    """The same seed and epoch give the same images, others give others."""
    assert (augmented(**ALL) == augmented(**ALL)).all()
    assert (augmented(**ALL) != augmented(**ALL, **other)).any((1, 2, 3)).mean() > 0.9


SPLIT = Split(IMAGES[:203], np.arange(203) % 3)


torch.manual_seed(3)
PROTOTYPE = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 6 * 3, 3)).double()


def make() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A fresh model, always the same: ranks that are threads would draw from one generator in turns."""
    model = copy.deepcopy(PROTOTYPE)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def step_on(feed: Feed, model: torch.nn.Module, indices: np.ndarray) -> None:
    images, labels = feed.take(indices)
    model.zero_grad()
    F.cross_entropy(model(images.double()), labels, label_smoothing=0.1).backward()


def test_ranks_are_one_process_with_the_large_batch() -> None:
    """3 ranks with batch 8 hold the weights of one process with batch 24, with all augmentations on. In
    float64, so that rounding, which every processor does in its own order, has no say."""

    def loop(world: World) -> tuple[torch.nn.Module, list[list[np.ndarray]]]:
        model, optimizer = make()
        ranks = synchronise(
            model, optimizer, world, samples=203, batch_size=8, epochs=3, strategy="allreduce"
        )
        seen: list[list[np.ndarray]] = []
        for epoch in (1, 2, 3):
            feed = Feed(SPLIT, ranks.sampler.shard(epoch), augmentation=Augmentation(0, epoch, **ALL))
            seen.append([])
            for batch in ranks.batches(epoch):
                step_on(feed, model, batch.indices)
                ranks.step()
                seen[-1].append(batch.indices)
        return model, seen

    results = run_in_threads(3, loop)
    model, optimizer = make()
    for epoch in (1, 2, 3):
        feed = Feed(SPLIT, np.empty(0, np.int64), augmentation=Augmentation(0, epoch, **ALL))
        steps = max(len(seen[epoch - 1]) for _, seen in results)
        for step in range(steps):
            step_on(
                feed,
                model,
                np.concatenate([s for _, seen in results for s in seen[epoch - 1][step : step + 1]]),
            )
            optimizer.step()
    for mine, theirs in zip(model.parameters(), results[0][0].parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("split", [None, 0.3])
def test_validation_is_never_augmented(
    config: Callable[..., TrainConfig],
    train_in_threads: Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
    split: float | None,
) -> None:
    """With all augmentations on, what is evaluated are the images as they are, test set or held out, and what
    is held out is never trained."""
    changed: list[int] = []
    original = Augmentation.__call__

    def watch(self: Augmentation, images: np.ndarray, indices: np.ndarray) -> np.ndarray:
        changed.extend(indices)
        return original(self, images, indices)

    monkeypatch.setattr(Augmentation, "__call__", watch)
    options = {"lr": 1e-9, "epochs": 1, "validation_split": split, "val_limit": 100}
    plain = train_in_threads(config(**options), folder="plain")[0].epochs[0]
    changed.clear()
    tossed = train_in_threads(config(**options, **ALL), folder="tossed")[0].epochs[0]
    assert tossed.val_loss == pytest.approx(plain.val_loss, rel=1e-5)
    assert tossed.train_loss != pytest.approx(plain.train_loss, rel=1e-5)
    assert len(changed) == len(set(changed)) == tossed.train_samples
    if split:
        assert tossed.train_samples == round(tiny.TRAIN * (1 - split))


def test_label_smoothing_is_torchs(
    config: Callable[..., TrainConfig],
    train_in_threads: Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]],
) -> None:
    """The training loss is that against targets of which a part is spread over all classes; the validation
    loss is that of the labels."""
    options = {"lr": 1e-9, "epochs": 1}
    record, _, weights = train_in_threads(config(**options, label_smoothing=0.3))
    plain, _, _ = train_in_threads(config(**options), folder="plain")
    dataset = data.prepare(tiny.DATASET)
    model = models.build(tiny.MODEL, dataset.image_shape, tiny.CLASSES)
    model.load_state_dict(weights)
    scores = model(as_input(np.array(dataset.train.images))).log_softmax(1).detach()
    targets = 0.7 * F.one_hot(torch.from_numpy(np.array(dataset.train.labels)), 10) + 0.03
    assert record.epochs[0].train_loss == pytest.approx(float(-(scores * targets).sum(1).mean()), rel=1e-4)
    assert record.epochs[0].val_loss == pytest.approx(plain.epochs[0].val_loss, rel=1e-4)
