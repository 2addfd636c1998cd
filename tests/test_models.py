"""Networks by name, and replicas as flat buffers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rankwise import models
from rankwise.config import TrainConfig
from rankwise.errors import ModelError
from rankwise.models.optimizers import make_optimizer
from rankwise.models.replica import Replica
from rankwise.plan import resolve

from . import effort


class TutorialNet(nn.Module):
    """The network as PyTorch's tutorial, and so the paper, writes it: ReLU before pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))))


def test_paper_cnn_is_the_papers_network() -> None:
    """paper-cnn has 62,006 parameters, and the tutorial's function and gradients, ReLU before pooling."""
    ours, theirs = models.build("paper-cnn", (3, 32, 32), 10), TutorialNet()
    assert sum(p.numel() for p in ours.parameters()) == 62_006
    theirs.load_state_dict(ours.state_dict())
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    for net in (ours, theirs):
        F.cross_entropy(net(images), labels).backward()
    assert torch.allclose(ours(images), theirs(images), atol=1e-6)
    for mine, reference in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine.grad, reference.grad, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "images"),
    effort.rotating(models.MODELS, [((3, 32, 32), 10), ((1, 28, 28), 7), ((3, 48, 40), 100)]),
)
def test_models_take_any_images(name: str, images: tuple[tuple[int, int, int], int]) -> None:
    """Every network takes other sizes, channel counts and numbers of classes."""
    shape, classes = images
    assert models.build(name, shape, classes)(torch.randn(4, *shape)).shape == (4, classes)


def test_a_model_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`module:callable` is found in the current folder, with or without arguments."""
    monkeypatch.chdir(tmp_path)
    Path("own_nets.py").write_text(
        "from torch import nn\n"
        "def sized(shape, classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] ** 2 * 3, classes))\n"
        "def fixed(): return sized((3, 32, 32), 10)\n"
        "def wrong(): return 3\n"
        "def fails(shape, classes): raise RuntimeError('no such luck')\n"
    )
    for name in ("sized", "fixed"):
        assert models.build(f"own_nets:{name}", (3, 32, 32), 10)(torch.randn(1, 3, 32, 32)).shape == (1, 10)
    for name, words in (("wrong", "int"), ("fails", "no such luck"), ("missing", "missing")):
        with pytest.raises(ModelError, match=words):
            models.build(f"own_nets:{name}", (3, 32, 32), 10)
    with pytest.raises(ModelError, match="expected scores"):
        models.build("own_nets:fixed", (3, 32, 32), 7)


@pytest.mark.parametrize(
    ("name", "words"), [("resnet19", "resnet"), ("papercnn", "paper-cnn"), ("a:", "unknown")]
)
def test_unknown_models(name: str, words: str) -> None:
    """An unknown network is answered with the nearest name."""
    with pytest.raises(ModelError, match=words):
        models.check(name)


def test_too_small_images_are_refused_by_name() -> None:
    """Images that a network cannot take are refused when it is built."""
    with pytest.raises(ModelError, match="16x16"):
        models.build("paper-cnn", (3, 8, 8), 10)


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        torch.optim.Adam(model.parameters(), lr=0.1, fused=True),
        torch.optim.AdamW(model.parameters(), lr=0.1),
        torch.optim.RMSprop(model.parameters(), lr=0.1, momentum=0.5),
    ]


def after_five_steps(make: Callable[[nn.Module], torch.optim.Optimizer]) -> torch.Tensor:
    """All weights of a small network that an optimiser has trained."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = make(model)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4)), torch.arange(6) % 3).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", range(6))
def test_state_made_early_changes_nothing(kind: int) -> None:
    """An optimiser whose state a replica created ahead takes the same steps, to the bit."""

    def early(model: nn.Module) -> torch.optim.Optimizer:
        return Replica(model, optimizers(model)[kind]).optimizer

    assert torch.equal(after_five_steps(lambda model: optimizers(model)[kind]), after_five_steps(early))


def batchnorm_replica(share: bool = False) -> Replica:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 2))
    model = model.to(memory_format=torch.channels_last)
    model(torch.randn(5, 3, 8, 8)).sum().backward()
    replica = Replica(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), share_optimizer_state=share
    )
    replica.step()
    return replica


@pytest.mark.parametrize("share", [False, True])
def test_flat_buffers_hold_everything(share: bool) -> None:
    """What is packed from one replica and unpacked into another makes them equal, buffers included, and
    momentum if it is shared; batch counts stay integers."""
    torch.manual_seed(1)
    one, two = batchnorm_replica(share), batchnorm_replica(share)
    flat, buffers, integers = one.pack(tail=3), one.pack_buffers(), one.pack_integers()
    assert (flat.dtype, integers.dtype) == (np.float32, np.int64)
    assert integers.tolist() == [1]
    two.unpack(flat)
    two.unpack_buffers(buffers)
    two.unpack_integers(integers)
    for name, value in one.model.state_dict().items():
        other = two.model.state_dict()[name]
        assert value.dtype == other.dtype
        assert torch.equal(value, other), name
    same = [torch.equal(a, b) for a, b in zip(one.optimizer_tensors(), two.optimizer_tensors(), strict=True)]
    assert all(same) is share


@pytest.mark.parametrize("width", [1, 100])
def test_the_flat_buffer_is_made_once(width: int) -> None:
    """However large a network, it is packed where it was packed before, and its tail stays; only another
    tail needs other memory."""
    model = nn.Linear(width, 7)
    replica = Replica(model, torch.optim.SGD(model.parameters(), lr=0.1))
    first = replica.pack(tail=1)
    first[-1] = 5
    with torch.no_grad():
        model.bias += 1
    assert np.shares_memory(replica.pack(tail=1), first)
    flat = np.concatenate([parameter.detach().numpy().ravel() for parameter in model.parameters()])
    assert np.array_equal(first, [*flat, 5])
    assert np.array_equal(replica.pack(), flat)


def test_reset_forgets_the_momentum() -> None:
    """After a reset the optimiser is as if it had just been made."""
    replica = batchnorm_replica()
    assert any(tensor.any() for tensor in replica.optimizer_tensors())
    replica.reset_optimizer()
    assert not any(tensor.any() for tensor in replica.optimizer_tensors())


def test_doubles_stay_doubles_and_complex_is_refused() -> None:
    """A model with float64 travels as float64; one with complex numbers is refused."""
    model = nn.Linear(2, 2).double()
    assert Replica(model, torch.optim.SGD(model.parameters(), lr=1)).pack().dtype == np.float64
    model.register_buffer("phase", torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ModelError, match="complex"):
        Replica(model, torch.optim.SGD(model.parameters(), lr=1))


def test_names_cost_no_torch() -> None:
    """The package, its configuration, strategies and names of models load neither torch nor MPI."""
    code = (
        "import rankwise, rankwise.cli, rankwise.launch, rankwise.strategies, rankwise.models, sys;"
        "print([name for name in ('torch', 'mpi4py', 'mpi4py.MPI') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        (
            {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, fused=True),
        ),
        ({"momentum": 0.0}, lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
        ({"optimizer": "adam"}, lambda p: torch.optim.Adam(p, lr=0.1, fused=True)),
        ({"optimizer": "adamw"}, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, fused=True)),
    ],
    ids=["sgd", "plain-sgd", "adam", "adamw"],
)
def test_optimisers_are_torchs(
    options: dict[str, Any], theirs: Callable[[Iterable[torch.Tensor]], torch.optim.Optimizer]
) -> None:
    """A run's optimiser takes the steps of torch's, to the bit, and its hooks are called."""
    hooked = []

    def watched(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        optimizer.register_step_post_hook(lambda *_: hooked.append(1))
        return optimizer

    plan = resolve(TrainConfig(lr=0.1, **options))
    ours = after_five_steps(lambda model: watched(make_optimizer(plan, model)))
    assert torch.equal(ours, after_five_steps(lambda model: watched(theirs(model.parameters()))))
    assert len(hooked) == 10


@effort.only_in_full
def test_a_step_loads_no_compiler() -> None:
    """What torch.compile needs, a third of a rank's start-up, is not loaded by what does not compile."""
    code = (
        "import sys, torch;"
        "from rankwise.config import TrainConfig;"
        "from rankwise.models.optimizers import make_optimizer;"
        "from rankwise.models.replica import Replica;"
        "from rankwise.plan import resolve\n"
        "for name in ('sgd', 'adam', 'adamw', 'muon'):\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))\n"
        "    replica = Replica(model, make_optimizer(resolve(TrainConfig(optimizer=name)), model))\n"
        "    model(torch.ones(2, 4)).sum().backward()\n"
        "    replica.step()\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@effort.only_in_full
def test_resnet9_learns_at_the_usual_rates() -> None:
    """Its outputs are small enough at first that SGD at 0.05 with momentum goes down, not up."""
    torch.manual_seed(0)
    model = models.build("resnet9", (3, 32, 32), 10)
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 4
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_makes_torchs_steps(momentum: float, nesterov: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The SGD of `--optimizer sgd` steps as torch's fused one does, to the bit, with parameters that get no
    gradient in a step, or are in a group of their own; after the first step by the kernel alone."""
    from rankwise.models import optimizers

    kernel, calls = optimizers._FUSED_SGD, []

    def counted(*tensors: object, **settings: object) -> None:
        calls.append(settings)
        kernel(*tensors, **settings)

    monkeypatch.setattr(optimizers, "_FUSED_SGD", counted)
    # What a `Run` hangs on every optimiser of its process is there once its module is loaded.
    monkeypatch.setattr(optimizers, "_global_optimizer_pre_hooks", {})

    def trained(kind: type[torch.optim.SGD]) -> list[torch.Tensor]:
        drawn = torch.Generator().manual_seed(1)
        parameters = [torch.nn.Parameter(torch.randn(size, generator=drawn)) for size in (1, 17, 1003)]
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.3, "weight_decay": 0.1}]
        optimizer = kind(groups, lr=0.1, momentum=momentum, nesterov=nesterov and momentum > 0, fused=True)
        for step in range(6):
            for number, parameter in enumerate(parameters):  # torch wants all of a group to begin at once
                parameter.grad = torch.randn(parameter.shape, generator=drawn)
                if step and (step + number) % 3 == 0:
                    parameter.grad = None
            optimizer.step()
        return [
            *parameters,
            *(its for state in optimizer.state.values() for its in state.values() if its is not None),
        ]

    expected, found = trained(torch.optim.SGD), trained(optimizers.SGD)
    assert len(expected) == len(found)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert calls


def test_sgd_calls_hooks_and_closures() -> None:
    """Hooks of a step, a user's own or all optimisers', and closures are called as torch's SGD calls them."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    from rankwise.models.optimizers import SGD

    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = SGD([parameter], lr=0.1, momentum=0.9, fused=True)
    optimizer.step()
    seen: list[str] = []
    handles = [
        optimizer.register_step_pre_hook(lambda *_: seen.append("before")),
        optimizer.register_step_post_hook(lambda *_: seen.append("after")),
        register_optimizer_step_pre_hook(lambda *_: seen.append("any")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["any", "before", "after"]
    optimizer.step()
    assert len(seen) == 3
    assert optimizer.step(lambda: 7.0) == 7.0
