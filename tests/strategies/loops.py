"""A small problem, a user's loop that any strategy keeps in step, and plain loops to compare it with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.training.synchroniser import Synchroniser

SAMPLES = 203  # ragged: no worker count of the tests divides it
FEATURES = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (SAMPLES,), generator=torch.Generator().manual_seed(1))
BATCH = 16
RATE = 0.1

torch.manual_seed(7)
PROTOTYPE = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def make(momentum: float = 0.9) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A fresh model, always the same, and its optimiser."""
    model = copy.deepcopy(PROTOTYPE)
    return model, torch.optim.SGD(model.parameters(), lr=RATE, momentum=momentum)


def weights_of(model: nn.Module) -> np.ndarray:
    """All parameters as one array."""
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()


def set_weights(model: nn.Module, flat: np.ndarray) -> None:
    """Overwrite all parameters."""
    nn.utils.vector_to_parameters(torch.from_numpy(flat.copy()), model.parameters())


def gradients(model: nn.Module, optimizer: torch.optim.Optimizer, indices: np.ndarray) -> None:
    """The gradients of some samples, and no step."""
    optimizer.zero_grad()
    F.cross_entropy(model(FEATURES[indices]), LABELS[indices]).backward()


def step_on(model: nn.Module, optimizer: torch.optim.Optimizer, indices: np.ndarray) -> None:
    """A plain step on some samples."""
    gradients(model, optimizer, indices)
    if optimizer.param_groups:
        optimizer.step()


@dataclass(frozen=True)
class Trained:
    """What a rank has after a loop; `seen` are the indices of each of its batches."""

    weights: np.ndarray
    momentum: np.ndarray
    ranks: Synchroniser
    seen: list[np.ndarray]


def train(
    world: World, epochs: int = 2, *, momentum: float = 0.9, samples: int = SAMPLES, **options: Any
) -> Trained:
    """A user's loop."""
    model, optimizer = make(momentum)
    if world.rank:  # ranks that start apart must be brought together
        nn.init.zeros_(model[0].weight)
    ranks = synchronise(model, optimizer, world, samples=samples, batch_size=BATCH, epochs=epochs, **options)
    seen = []
    for epoch in range(1, epochs + 1):
        for batch in ranks.batches(epoch):
            gradients(ranks.model, optimizer, batch.indices)
            ranks.step()
            seen.append(batch.indices)
    state = [tensor.flatten() for tensor in ranks.replica.optimizer_tensors()]
    return Trained(weights_of(model), torch.cat(state).numpy().copy() if state else np.empty(0), ranks, seen)


def train_all(
    size: int, epochs: int = 2, *, hosts: Sequence[int] | None = None, **options: Any
) -> list[Trained]:
    """The loop on several ranks, which are threads, of hosts [ranks]."""
    return run_in_threads(size, lambda world: train(world, epochs, **options), hosts=hosts)


def assert_alike(results: list[Trained]) -> None:
    """All ranks hold the same bits."""
    for result in results[1:]:
        assert np.array_equal(result.weights, results[0].weights)
