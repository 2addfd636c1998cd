"""What recipes need, each against a plain reference, and all of it together in whole runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from rankwise import data, models, synchronise
from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.data import resizing
from rankwise.data.feed import Feed, as_input
from rankwise.errors import ConfigError, ModelError
from rankwise.launch import preflight
from rankwise.models.airbench import Airbench
from rankwise.models.average import Average
from rankwise.models.evaluation import score
from rankwise.models.muon import COEFFICIENTS, STEPS, Muon, orthogonalised
from rankwise.models.optimizers import hidden_matrices, make_optimizer
from rankwise.models.replica import Replica
from rankwise.models.whitening import whiten
from rankwise.plan import AVERAGE_DECAYS, make_plan
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import effort, tiny
from .conftest import stopped
from .strategies import loops

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]]

ALL: dict[str, Any] = {
    "dataset": "synthetic:600", "model": "tests.test_recipes:Small", "train_limit": 96, "val_limit": 20,
    "batch_size": 4, "lr": 0.1, "nesterov": True, "weight_decay": 1e-3, "norm_bias_lr_scale": 8,
    "label_smoothing": 0.2, "flip": "alternating", "translate": 2, "cutout": 8, "tta": "flip+shift",
    "whitening": 50, "schedule": "triangular", "averaged_weights": "lookahead", "resize": "24:1",
    "freeze": "blocks.0:2",
}  # fmt: skip
"""Every option of a recipe, on few images."""


class Small(Airbench):
    """The network of recipes, narrow."""

    widths = (4, 8, 8)


def blurred(count: int = 300, shape: tuple[int, int, int] = (3, 16, 12)) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, shape[0], shape[1] + 2, shape[2] + 2, generator=generator)
    smooth = F.avg_pool2d(noise, 3, stride=1)
    return smooth + 0.5 * smooth.mean(1, keepdim=True) + 0.3


# ── evaluation ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tta", ["none", "flip", "flip+shift"])
def test_views_are_those_of_a_loop(tta: str) -> None:
    """The scores of several views are the mean that a loop over images and views finds, with the borders of
    moved images reflected."""
    torch.manual_seed(0)
    images = torch.randn(5, 3, 6, 7)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3))
    weights = {"none": {(0, False): 1.0}, "flip": {(0, False): 0.5, (0, True): 0.5}}
    weights["flip+shift"] = {(0, mirrored): 0.25 for mirrored in (False, True)}
    weights["flip+shift"] |= {(by, mirrored): 0.125 for by in (-1, 1) for mirrored in (False, True)}
    with torch.inference_mode():
        for image, found in zip(images, score(model, images, tta), strict=True):  # type: ignore[arg-type]
            expected = torch.zeros(3)
            for (by, mirrored), weight in weights[tta].items():
                frame = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)), "reflect")
                view = frame[:, 1 + by : 7 + by, 1 + by : 8 + by]
                view = view[:, :, ::-1] if mirrored else view
                expected += weight * model(torch.from_numpy(view.copy())[None])[0]
            assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("tta", ["none", "flip", "flip+shift"])
def test_clear_images_are_looked_at_once(tta: str) -> None:
    """Images whose likeliest class has the probability that was asked for keep the scores of one pass, the
    others have those of all views, and only these are looked at again."""
    torch.manual_seed(0)
    images = torch.randn(40, 3, 6, 7)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(80, 3))
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    with torch.inference_mode():
        once, views = score(model, images, "none"), score(model, images, tta)  # type: ignore[arg-type]
        likeliest = once.softmax(1).amax(1)
        below = float(likeliest.quantile(0.7))
        seen.clear()
        found = score(model, images, tta, below)  # type: ignore[arg-type]
    assert torch.allclose(found, torch.where(likeliest[:, None] >= below, once, views), atol=1e-6)
    again = {"none": 0, "flip": 1, "flip+shift": 5}[tta]
    assert seen == [40, *[28] * again]


# ── averaged weights ──────────────────────────────────────────────────────────────────────────────


def test_ema_has_its_closed_form() -> None:
    """After n steps the average is the sum of all weights there were, each times what its step put in and all
    later ones left; running statistics of BatchNorm are averaged alike."""
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = Average(model, "ema", decay=0.6)
    seen = [copy.deepcopy(model.state_dict())]
    for step in range(1, 9):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.normal_()
        seen.append(copy.deepcopy(model.state_dict()))
        average.follow(step, step)
    decays = [0.0, *(min(0.6, (1 + step) / (10 + step)) for step in range(1, 9))]
    for name in ("0.weight", "1.running_mean"):
        parts = [(1 - decay) * np.prod(decays[at + 1 :]) for at, decay in enumerate(decays)]
        expected = sum(part * state[name] for part, state in zip(parts, seen, strict=True))
        assert sum(parts) == pytest.approx(1)
        assert torch.allclose(average.model.state_dict()[name], expected, atol=1e-6)


def test_lookahead_steps_back_every_five_steps() -> None:
    """Every five steps slow weights take a part of the way to the fast ones, which then are the slow ones."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    average = Average(model, "lookahead", decay=0.9, epochs=2)
    slow = fast = 0.0
    for step in range(1, 21):
        with torch.no_grad():
            model.weight += 1
        fast += 1
        average.follow(step, step / 10)
        if step % 5 == 0:
            stays = 0.9**5 * (step / 20) ** 3
            slow = fast = stays * slow + (1 - stays) * fast
        assert model.weight.item() == pytest.approx(fast, rel=1e-5)
        assert average.model.weight.item() == pytest.approx(slow, rel=1e-5)


@pytest.mark.parametrize("kind", ["ema", "lookahead"])
@pytest.mark.parametrize("team", [(1, "single"), (3, "allreduce"), (3, "gradient-server")], ids=str)
def test_averages_are_alike_on_all_ranks(kind: str, team: tuple[int, str]) -> None:
    """All ranks hold the bits of the same average, which is that of one process with the large batch."""
    ranks, strategy = team

    def loop(world: World) -> tuple[np.ndarray, np.ndarray, list[list[np.ndarray]]]:
        model, optimizer = loops.make()
        if world.rank:
            nn.init.zeros_(model[0].weight)
        sync = synchronise(
            model, optimizer, world, samples=203, batch_size=16, epochs=3, strategy=strategy,
            averaged_weights=kind,
        )  # fmt: skip
        seen: list[list[np.ndarray]] = []
        for epoch in (1, 2, 3):
            seen.append([])
            for batch in sync.batches(epoch):
                loops.gradients(model, optimizer, batch.indices)
                sync.step()
                seen[-1].append(batch.indices)
        return loops.weights_of(model), loops.weights_of(sync.replica.evaluated), seen

    results = run_in_threads(ranks, loop)
    model, optimizer = loops.make()
    average = Average(model, kind, decay=AVERAGE_DECAYS[kind], epochs=3)  # type: ignore[arg-type]
    steps = 0
    for epoch in range(3):
        longest = max(len(seen[epoch]) for *_, seen in results)
        sizes = [
            max((len(s) for *_, seen in results for s in seen[epoch][at : at + 1])) for at in range(longest)
        ]
        for at in range(longest):
            batches = [batch for *_, seen in results for batch in seen[epoch][at : at + 1]]
            loops.step_on(model, optimizer, np.concatenate(batches))
            steps += 1
            average.follow(steps, epoch + sum(sizes[: at + 1]) / sum(sizes))
    for weights, averaged, _ in results:
        assert np.array_equal(averaged, results[0][1])
        assert np.allclose(weights, loops.weights_of(model), atol=1e-5)
        assert np.allclose(averaged, loops.weights_of(average.model), atol=1e-5)


# ── whitening ─────────────────────────────────────────────────────────────────────────────────────


def test_whitened_patches_have_the_identity_as_covariance() -> None:
    """The first half of a whitening layer's outputs is uncorrelated, each of variance 1, the largest first;
    the second half is the same with the other sign. Found in parts it is the same."""
    images = blurred()
    layer = nn.Conv2d(3, 24, 2)
    whiten(nn.Sequential(layer), images.split(128))
    with torch.inference_mode():
        out = layer(images).transpose(0, 1).flatten(1).double()
    assert torch.allclose(out[:12], -out[12:], atol=1e-6)
    covariance = torch.cov(out[:12])
    assert torch.allclose(covariance, torch.eye(12, dtype=torch.float64), atol=0.02)
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    variances = 1 / layer.weight[:12].flatten(1).square().sum(1)
    assert (variances.diff() < 0).all()


def test_whitening_takes_what_filters_there_are() -> None:
    """With few filters the directions of largest variance are taken; with many the rest stays as it was."""
    full, few, many = nn.Conv2d(3, 24, 2), nn.Conv2d(3, 7, 2), nn.Conv2d(3, 30, 2)
    before = few.weight.clone(), many.weight.clone()
    for layer in (full, few, many):
        whiten(layer, [blurred()])
    assert torch.equal(few.weight[:3], full.weight[:3])
    assert torch.equal(few.weight[6], before[0][6])
    assert torch.equal(many.weight[:24], full.weight)
    assert torch.equal(many.weight[24:], before[1][24:])
    with pytest.raises(ModelError, match="--whitening"):
        whiten(nn.Linear(3, 3), [blurred()])


# ── smaller images ────────────────────────────────────────────────────────────────────────────────


def test_stages_of_smaller_images(config: Make) -> None:
    """Stages follow each other for their epochs; after the last one images are as they are."""
    staged = config(resize="16:1,24:2")
    assert [staged.resizing.height_in(epoch) for epoch in range(1, 6)] == [16, 24, 24, None, None]
    assert config().resizing.height_in(1) is None


def test_halved_images_are_weighted_means() -> None:
    """Scaling by half weighs the four pixels of each row and column that are nearest 1:3:3:1, inside the
    frame; an image of one colour stays one; labels and order stay theirs."""
    split = data.prepare("synthetic:300").train
    order = np.arange(5)
    images, labels = Feed(split, order, height=16).take(order)
    whole, same = Feed(split, order).take(order)
    assert images.shape == (5, 3, 16, 16)
    assert torch.equal(labels, same)
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernel = torch.outer(weights, weights).expand(3, 1, 4, 4)
    expected = F.conv2d(whole, kernel, stride=2, padding=1, groups=3)
    assert torch.allclose(images[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=1e-5)
    grey = resizing.scaled(torch.full((1, 1, 32, 20), 0.3), 24)
    assert torch.allclose(grey, torch.full((1, 1, 24, 15), 0.3))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"resize": "24"}, "HEIGHT:EPOCHS"),
        ({"resize": "24:0"}, "HEIGHT:EPOCHS"),
        ({"resize": "0:2"}, "HEIGHT:EPOCHS"),
        ({"resize": "24:1,x:2"}, "HEIGHT:EPOCHS"),
        ({"resize": "32:1"}, "height of 32"),
    ],
)
def test_sizes_that_do_not_fit(config: Make, given: dict[str, Any], told: str) -> None:
    """What is no stage, or no smaller image, is refused before a rank is started."""
    with pytest.raises(ConfigError, match=told):
        preflight.prepare(make_plan(config(dataset="synthetic:300", **given)))


def test_a_network_for_one_size_refuses_another(config: Make, train_in_threads: Train) -> None:
    """A network whose size of images is fixed says so before it trains."""
    with pytest.raises(ModelError, match=r"paper-cnn cannot take images of shape \(3, 24, 24\)"):
        train_in_threads(config(dataset="synthetic:300", model="paper-cnn", resize="24:1"))


# ── networks and optimisers ───────────────────────────────────────────────────────────────────────


def test_airbench_is_the_papers_network() -> None:
    """It computes what its paper describes: whitening, blocks of convolution, pooling, normalisation and
    GELU, a maximum over what is left, and a ninth of a linear map; convolutions begin as the identity."""
    torch.manual_seed(0)
    net = Airbench()
    shapes = [tuple(p.shape) for p in net.parameters() if p.dim() == 4]
    widths = [(24, 3, 2), (64, 24, 3), (64, 64, 3), (256, 64, 3), (256, 256, 3), (256, 256, 3), (256, 256, 3)]
    assert shapes == [(o, i, k, k) for o, i, k in widths]
    images = torch.randn(4, 3, 32, 32)
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    biases = [m.bias for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for bias in biases:
        nn.init.normal_(bias)
    x = F.gelu(convolutions[0](images))
    for block in range(3):
        for place in range(2):
            x = F.conv2d(x, convolutions[1 + 2 * block + place].weight, padding=1)
            x = F.max_pool2d(x, 2) if place == 0 else x
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), keepdim=True, correction=0)
            x = F.gelu((x - mean) / (variance + 1e-12).sqrt() + biases[2 * block + place][:, None, None])
    expected = net.head(F.max_pool2d(x, 3).flatten(1)) / 9
    assert torch.allclose(net(images), expected, atol=1e-4)
    x = torch.randn(1, 64, 8, 8)
    assert torch.allclose(convolutions[2](x), x, atol=1e-6)
    assert torch.allclose(convolutions[3](x)[:, :64], x, atol=1e-6)


def test_orthogonalisation_brings_singular_values_near_one() -> None:
    """Newton-Schulz keeps the directions of a matrix, and its singular values become 0.65 to 1.25."""
    torch.manual_seed(0)
    for shape in ((16, 40), (40, 16), (10, 30)):
        matrix = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        core = u.T @ orthogonalised(matrix) @ v.T
        assert torch.allclose(core, core.diagonal().diag(), atol=1e-3)
        assert core.diagonal().min() > 0.65
        assert core.diagonal().max() < 1.25


@pytest.mark.parametrize("shape", [(8, 17), (24, 216), (216, 24)])
def test_the_short_way_of_wide_matrices_is_the_iteration(shape: tuple[int, int]) -> None:
    """A matrix at least twice as wide as high, or turned, becomes what the iteration makes of it in float64,
    singular values of next to nothing included."""
    torch.manual_seed(0)
    low = min(shape)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = left @ torch.logspace(0, -6, low, dtype=torch.float64).diag() @ right
    expected = matrix / matrix.norm()
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = expected @ expected.T
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    assert torch.allclose(orthogonalised(matrix.float()).double(), expected, atol=1e-3)


def test_hidden_matrices_keep_the_norm_of_orthogonal_ones() -> None:
    """With fixed_norm a step begins by scaling the matrix to the norm of an orthogonal one, the square root
    of its rows, so that a rate of 1 is a step as large as the weights; other parameters are not scaled."""
    torch.manual_seed(0)
    matrix, vector = torch.randn(6, 20, requires_grad=True), torch.randn(6, requires_grad=True)
    matrix.grad, vector.grad = torch.randn(6, 20), torch.randn(6)
    scaled = matrix.detach() / matrix.detach().norm() * 6**0.5
    moved = vector.detach() - 0.5 * vector.grad
    groups = [{"params": [matrix], "orthogonalise": True, "fixed_norm": True}, {"params": [vector]}]
    Muon(groups, lr=0.5, momentum=0.0).step()
    assert torch.allclose(matrix, scaled - 0.5 * orthogonalised(matrix.grad), atol=1e-5)
    assert torch.allclose(vector, moved)


def test_muon_is_torchs_on_a_matrix() -> None:
    """On a matrix it takes torch.optim.Muon's steps, but for torch's bfloat16; on the rest it takes SGD's."""
    torch.manual_seed(0)
    start = {"matrix": torch.randn(12, 30), "rest": torch.randn(7)}
    mine, theirs = ({k: v.clone().requires_grad_() for k, v in start.items()} for _ in range(2))
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
    groups = [{"params": [mine["rest"]]}, {"params": [mine["matrix"]], "orthogonalise": True}]
    ours = Muon(groups, **options)
    others = [torch.optim.Muon([theirs["matrix"]], **options), torch.optim.SGD([theirs["rest"]], **options)]
    for _ in range(5):
        for name in start:
            mine[name].grad = torch.randn(start[name].shape)
            theirs[name].grad = mine[name].grad.clone()
        ours.step()
        for other in others:
            other.step()
    assert torch.allclose(mine["rest"], theirs["rest"], atol=1e-6)
    moved = (theirs["matrix"] - start["matrix"]).norm().item()
    assert (mine["matrix"] - theirs["matrix"]).norm().item() < 0.05 * moved


def test_convolutions_are_matrices_to_muon() -> None:
    """A convolution's step is that of the matrix with a row for each output, however it lies in memory; the
    last layer and frozen ones are none of its business."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)
    before = convolution.weight.detach().clone()
    convolution.weight.grad = torch.randn_like(before)
    Muon([{"params": [convolution.weight], "orthogonalise": True}], lr=0.5, momentum=0.0).step()
    step = orthogonalised(convolution.weight.grad.reshape(6, 36)).view(6, 4, 3, 3)
    assert torch.allclose(before - convolution.weight, 0.5 * step, atol=1e-5)
    net = Airbench()
    net.whitening.weight.requires_grad_(False)
    assert [tuple(p.shape[:2]) for p in hidden_matrices(net)] == [
        (64, 24), (64, 64), (256, 64), (256, 256), (256, 256), (256, 256),
    ]  # fmt: skip


def test_biases_of_normalisation_have_a_rate_of_their_own(config: Make) -> None:
    """They get the scaled rate and decay as fast as without; every trained parameter is in one group."""
    net = models.build("airbench", (3, 32, 32), 10)
    for optimizer in ("sgd", "muon", "adamw"):
        made = make_optimizer(
            config(optimizer=optimizer, lr=0.1, weight_decay=0.01, norm_bias_lr_scale=64), net
        )
        biases = made.param_groups[1]
        assert {tuple(p.shape) for p in biases["params"]} == {(64,), (256,)}
        assert biases["lr"] == pytest.approx(6.4)
        assert biases["lr"] * biases["weight_decay"] == pytest.approx(0.1 * 0.01)
        grouped = [id(p) for group in made.param_groups for p in group["params"]]
        assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)
        Replica(net, made)


# ── whole runs ────────────────────────────────────────────────────────────────────────────────────

TEAMS = [
    {"ranks": 1},
    {"ranks": 3, "strategy": "allreduce"},
    {"ranks": 3, "strategy": "gradient-server", "optimizer": "muon"},
    {"ranks": 2, "strategy": "local-sgd", "averaged_weights": "ema"},
]


def average_in(folder: RunFolder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(max(folder.checkpoints.glob("epoch-*")) / "average.safetensors")


@pytest.mark.parametrize("team", effort.daily(TEAMS, TEAMS[2:]), ids=str)
def test_resume_to_the_bit_with_everything_on(
    config: Make, train_in_threads: Train, team: dict[str, Any]
) -> None:
    """A run with a whole recipe that was stopped and goes on ends with the bits of one that was not, average
    included, and its whitening is never trained."""
    options = {**ALL, **team, "epochs": 2}
    whole = train_in_threads(config(**options), folder="whole")
    stopped(whole[1])
    parts = train_in_threads(config(**options), folder="parts", resume=True)
    assert parts[0].resumed_from_epoch == 1
    for mine, other in ((whole[2], parts[2]), (average_in(whole[1]), average_in(parts[1]))):
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    first = safetensors.torch.load_file(whole[1].checkpoints / "epoch-0001" / "model.safetensors")
    assert torch.equal(first["whitening.weight"], whole[2]["whitening.weight"])
    assert [e.val_loss for e in whole[0].epochs] == [e.val_loss for e in parts[0].epochs]


FREEZING = [
    {"ranks": 1, "momentum": 0.9, "weight_decay": 0.1},
    {"ranks": 1, "optimizer": "adamw", "weight_decay": 0.1},
    {"ranks": 2, "strategy": "allreduce", "bucket_mb": 0.01, "momentum": 0.9},
    {"ranks": 3, "strategy": "allreduce", "compress": "topk:0.1", "optimizer": "muon"},
    {"ranks": 3, "strategy": "gradient-server", "momentum": 0.9},
    {"ranks": 3, "strategy": "local-sgd", "sync_every": 3, "momentum": 0.9},
    {"ranks": 3, "strategy": "parameter-averaging", "topology": "master", "optimizer": "adam"},
]


@pytest.mark.parametrize("team", effort.daily(FREEZING, FREEZING[1::2]), ids=str)
def test_frozen_parameters_stay(config: Make, train_in_threads: Train, team: dict[str, Any]) -> None:
    """From the epoch that --freeze names its parameters stay, whatever momentum, weight decay or an exchange
    left behind (to the last bit or two, where weights that are alike are averaged), and all others learn."""
    _, folder, last = train_in_threads(
        config(**team, model="mlp", epochs=3, checkpoint_keep=3, freeze="1:2,3:3")
    )
    first, second = (
        safetensors.torch.load_file(folder.checkpoints / f"epoch-000{epoch}" / "model.safetensors")
        for epoch in (1, 2)
    )
    for name in last:
        assert torch.allclose(first[name], second[name], 1e-6, 1e-8) == name.startswith("1."), name
        assert torch.allclose(second[name], last[name], 1e-6, 1e-8) == name.startswith(("1.", "3.")), name


@pytest.mark.parametrize("workers", [2, 3])
def test_freezing_is_the_same_by_master_and_in_buckets(
    config: Make, train_in_threads: Train, workers: int
) -> None:
    """With frozen parameters, workers whose gradients go out in buckets during the backward pass learn what
    they learn by a master that gets all gradients at once."""
    options = {
        "model": "mlp", "epochs": 3, "train_limit": 192, "freeze": "1:2", "momentum": 0.9,
        "weight_decay": 0.01,
    }  # fmt: skip
    buckets = {"strategy": "allreduce", "ranks": workers, "bucket_mb": 0.01}
    master = {"strategy": "gradient-server", "ranks": workers + 1}
    _, _, one = train_in_threads(config(**options, **buckets), folder="buckets")
    _, _, two = train_in_threads(config(**options, **master), folder="master")
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"freeze": "1"}, "NAME:EPOCH"),
        ({"freeze": "1:0"}, "NAME:EPOCH"),
        ({"freeze": ":2"}, "NAME:EPOCH"),
        ({"freeze": "1:2,"}, "NAME:EPOCH"),
        ({"freeze": "head:2"}, r"no parameter whose name begins with head; it trains 1\.weight"),
        ({"freeze": "1:2,3:2,5:2"}, "leaves nothing of mlp"),
        ({"freeze": "1:2", "ranks": 2, "strategy": "ddp"}, "--strategy ddp"),
    ],
)
def test_what_cannot_be_frozen_is_refused(
    config: Make, train_in_threads: Train, given: dict[str, Any], told: str
) -> None:
    """A stage that is none, a name that fits nothing, a network of which nothing is left, one clear line."""
    with pytest.raises(ConfigError, match=told):
        train_in_threads(make_plan(config(model="mlp", **given)))


def test_what_is_evaluated_is_the_average(config: Make, train_in_threads: Train) -> None:
    """The accuracy and loss in the record are those of the averaged weights, with the views asked for."""
    record, folder, weights = train_in_threads(
        config(averaged_weights="ema", average_decay=0.9, tta="flip", ranks=2, strategy="allreduce")
    )
    dataset = data.prepare(tiny.DATASET)
    labels = torch.from_numpy(np.array(dataset.test.labels))
    losses = []
    for state in (average_in(folder), weights):
        model = models.build(tiny.MODEL, dataset.image_shape, tiny.CLASSES).eval()
        model.load_state_dict(state)
        with torch.inference_mode():
            scores = score(model, as_input(np.array(dataset.test.images)), "flip")
        losses.append(F.cross_entropy(scores, labels).item())
    assert record.epochs[-1].val_loss == pytest.approx(losses[0], rel=1e-4)
    assert record.epochs[-1].val_loss != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "kind", "spares"),
    effort.rotating([("allreduce", "lookahead"), ("local-sgd", "ema")], [0, 1]),
)
def test_a_rank_is_lost_with_everything_on(
    config: Make, train_in_threads: Train, strategy: str, kind: str, spares: int
) -> None:
    """With a whole recipe a rank may be lost, or replaced: no sample is lost or trained twice, and the
    average that is left is close to that of the run that lost none."""
    options = {**ALL, "strategy": strategy, "averaged_weights": kind, "ranks": 3, "epochs": 2, "lr": 0.01}
    whole = train_in_threads(config(**options), folder="whole")
    options |= {"fault": ("kill:rank=1,epoch=2,phase=exchange",), "on_failure": "continue", "spares": spares}
    record, folder, _ = train_in_threads(config(**options), folder="struck")
    assert record.outcome == "completed"
    assert record.samples.trained == record.samples.expected == 2 * 96
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert [fault.rank for fault in record.faults] == [1]
    theirs = average_in(whole[1])
    for name, value in average_in(folder).items():
        if value.is_floating_point() and "running" not in name:
            assert torch.allclose(value, theirs[name], atol=0.05), name


def test_a_recipe_for_other_classes_is_refused(config: Make) -> None:
    """A recipe says for how many classes it is, and another dataset gets one clear line."""
    with pytest.raises(ConfigError, match=r"--classes 7 .* has 10"):
        preflight.prepare(config(classes=7))
    assert preflight.prepare(config(classes=10)).samples_per_epoch == tiny.TRAIN
