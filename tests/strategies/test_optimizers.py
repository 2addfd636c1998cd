"""Optimisers on ranks, and after going back, against the plain loop of one process."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn import functional as F

from rankwise import synchronise
from rankwise.comm import World, run_in_threads, solo_world
from rankwise.errors import ModelError
from rankwise.models.replica import Replica

from .. import effort
from .loops import BATCH, FEATURES, LABELS, SAMPLES
from .optimizers import OPTIMIZERS, REFUSED, Make, of


def test_none_of_torchs_is_left_out() -> None:
    """Each optimiser of torch is tried or refused below."""
    tried = {name.split()[0].rstrip(",") for name in (*OPTIMIZERS, *REFUSED)}
    assert {name for name in optim.__all__ if name[0].isupper()} - tried == {"Optimizer"}


class Net(nn.Sequential):
    """A small network in float64, with a scale that is a single number."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.scale = nn.Parameter(torch.ones(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


torch.manual_seed(3)
PROTOTYPE = Net()


def gradients(model: nn.Module, optimizer: optim.Optimizer, indices: np.ndarray) -> None:
    """Those of some samples, in the mode in which the optimiser steps."""
    if callable(train := getattr(optimizer, "train", None)):
        train()
    optimizer.zero_grad()
    F.cross_entropy(model(FEATURES[indices].double()), LABELS[indices]).backward()


def weights_of(model: nn.Module) -> np.ndarray:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy().copy()


def plain(make: Make, batches: list[np.ndarray]) -> np.ndarray:
    """What one process ends with."""
    model = copy.deepcopy(PROTOTYPE)
    optimizer = make(model.parameters())
    for indices in batches:
        gradients(model, optimizer, indices)
        optimizer.step()
    return weights_of(model)


def on_ranks(world: World, make: Make, **options: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """What a rank ends with after three epochs, and its batches."""
    model = copy.deepcopy(PROTOTYPE)
    optimizer = make(model.parameters())
    ranks = synchronise(model, optimizer, world, samples=SAMPLES, batch_size=BATCH, **options)
    seen = []
    for epoch in (1, 2, 3):
        for batch in ranks.batches(epoch):
            gradients(model, optimizer, batch.indices)
            ranks.step()
            seen.append(batch.indices)
    return weights_of(model), seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_rank_is_a_plain_loop(name: str) -> None:
    """To the bit: an optimiser begins as it itself begins, whatever its state is made of."""
    ended, seen = on_ranks(solo_world(), OPTIMIZERS[name])
    assert np.array_equal(ended, plain(OPTIMIZERS[name], seen))
    assert not np.array_equal(ended, weights_of(PROTOTYPE))


@pytest.mark.parametrize(("name", "ranks"), effort.rotating(OPTIMIZERS, [2, 3]))
def test_ranks_are_a_plain_loop_with_the_large_batch(name: str, ranks: int) -> None:
    """Ranks that exchange gradients end, all alike, where one process ends with their batches together."""
    results = run_in_threads(ranks, lambda world: on_ranks(world, OPTIMIZERS[name], strategy="allreduce"))
    turns = zip(*(seen for _, seen in results), strict=True)
    expected = plain(OPTIMIZERS[name], [np.concatenate(turn) for turn in turns])
    for ended, _ in results:
        assert np.array_equal(ended, results[0][0])
        np.testing.assert_allclose(ended, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 1, 4])
def test_steps_are_taken_back(name: str, before: int) -> None:
    """What goes back to a copy, from before its first step too, and makes the steps once more, ends with the
    bits of what made them once."""
    batches = np.array_split(np.arange(SAMPLES), 7)
    model = copy.deepcopy(PROTOTYPE)
    replica = Replica(model, OPTIMIZERS[name](model.parameters()))

    def step(indices: np.ndarray) -> None:
        gradients(model, replica.optimizer, indices)
        replica.step()

    for indices in batches[:before]:
        step(indices)
    snapshot = replica.snapshot()
    for indices in batches[before : before + 2]:
        step(indices)
    snapshot.restore()
    for indices in batches[before:]:
        step(indices)
    assert np.array_equal(weights_of(model), plain(OPTIMIZERS[name], batches))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_state_goes_on_in_another_process(name: str, before: int) -> None:
    """What is saved of an optimiser, and of the weights, goes on elsewhere as if it had never stopped."""
    batches = np.array_split(np.arange(SAMPLES), 7)
    model = copy.deepcopy(PROTOTYPE)
    replica = Replica(model, OPTIMIZERS[name](model.parameters()))
    for indices in batches[:before]:
        gradients(model, replica.optimizer, indices)
        replica.step()
    saved = {key: value.clone() for key, value in replica.optimizer_state().items()}
    another = copy.deepcopy(PROTOTYPE)
    later = Replica(another, OPTIMIZERS[name](another.parameters()))
    another.load_state_dict(model.state_dict())
    later.load_optimizer_state(saved)
    for indices in batches[before:]:
        gradients(another, later.optimizer, indices)
        later.step()
    assert np.array_equal(weights_of(another), plain(OPTIMIZERS[name], batches))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_reset_is_a_new_optimizer(name: str) -> None:
    """After a reset the optimiser goes on as one that has just been made for these weights."""
    batches = np.array_split(np.arange(SAMPLES), 7)
    model = copy.deepcopy(PROTOTYPE)
    replica = Replica(model, OPTIMIZERS[name](model.parameters()))
    for indices in batches[:3]:
        gradients(model, replica.optimizer, indices)
        replica.step()
    twin = copy.deepcopy(model)
    new = OPTIMIZERS[name](twin.parameters())
    replica.reset_optimizer()
    for indices in batches[3:]:
        gradients(model, replica.optimizer, indices)
        replica.step()
        gradients(twin, new, indices)
        new.step()
    assert np.array_equal(weights_of(model), weights_of(twin))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scheduler_hides_no_state(name: str) -> None:
    """What an optimiser keeps is found behind a scheduler of torch too, which puts a function in the place of
    its step; and to look for it moves no weight."""
    model = copy.deepcopy(PROTOTYPE)
    alone = Replica(model, OPTIMIZERS[name](model.parameters()))
    scheduled = OPTIMIZERS[name](model.parameters())
    optim.lr_scheduler.ExponentialLR(scheduled, 0.9)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    behind = Replica(model, scheduled)
    assert {n: its.shape for n, its in behind.optimizer_state().items()} == {
        n: its.shape for n, its in alone.optimizer_state().items()
    }
    assert np.array_equal(weights_of(model), weights_of(PROTOTYPE))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_lies_alike_whatever_the_weights(name: str) -> None:
    """Ranks that begin with other weights, also with zeros, of which Prodigy keeps less, have places of the
    same shapes for what their optimisers keep."""
    zeros = copy.deepcopy(PROTOTYPE)
    for parameter in zeros.parameters():
        nn.init.zeros_(parameter)
    one, other = (
        {n: its.shape for n, its in Replica(m, OPTIMIZERS[name](m.parameters())).optimizer_state().items()}
        for m in (copy.deepcopy(PROTOTYPE), zeros)
    )
    assert one == other


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_mean_over_one_rank_changes_nothing(name: str) -> None:
    """To the bit: taking the mean of weights and optimiser state over a single rank leaves a plain loop, its
    count of steps and the like included."""
    options = {"strategy": "parameter-averaging", "topology": "allreduce", "optimizer_state": "average"}
    ended, seen = on_ranks(solo_world(), OPTIMIZERS[name], sync_every=2, **options)
    assert np.array_equal(ended, plain(OPTIMIZERS[name], seen))


def test_state_of_older_checkpoints_is_taken() -> None:
    """Where nothing is saved of which parameters had begun, all of them had."""
    batches = np.array_split(np.arange(SAMPLES), 7)
    model, another = copy.deepcopy(PROTOTYPE), copy.deepcopy(PROTOTYPE)
    make = OPTIMIZERS["SGD with momentum"]
    replica, later = (Replica(net, make(net.parameters())) for net in (model, another))
    for indices in batches[:3]:
        gradients(model, replica.optimizer, indices)
        replica.step()
    another.load_state_dict(model.state_dict())
    later.load_optimizer_state({k: v for k, v in replica.optimizer_state().items() if k != "begun"})
    for indices in batches[3:]:
        gradients(another, later.optimizer, indices)
        later.step()
    assert np.array_equal(weights_of(another), plain(make, batches))


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_more_than_gradients_is_refused(name: str) -> None:
    """By name, in one line, before anything is trained."""
    make, word = REFUSED[name]
    with pytest.raises(ModelError, match=f"{name}.*{word}") as caught:
        on_ranks(solo_world(), make)
    assert "\n" not in str(caught.value)


def test_momenta_of_single_numbers_are_averaged_and_steps_are_not() -> None:
    """What is shaped like its parameter is shared; for a parameter that is one number that is its momentum
    alone."""
    model = copy.deepcopy(PROTOTYPE)
    replica = Replica(model, optim.NAdam(model.parameters()), share_optimizer_state=True)
    assert len(replica.optimizer_tensors()) == 2 * len(list(model.parameters()))


class Noisy(optim.SGD):
    """Draws random numbers for its steps."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad += 0.01 * torch.randn(parameter.shape).double()
        super().step(closure)


def test_what_is_tried_draws_no_random_numbers() -> None:
    """An optimiser that draws random numbers, whose state is asked for before, trains as in a plain loop."""
    batches = np.array_split(np.arange(SAMPLES), 3)
    torch.manual_seed(5)
    expected = plain(of(Noisy, lr=0.1, momentum=0.9), batches)
    model = copy.deepcopy(PROTOTYPE)
    torch.manual_seed(5)
    replica = Replica(model, Noisy(model.parameters(), lr=0.1, momentum=0.9))
    for indices in batches:
        gradients(model, replica.optimizer, indices)
        replica.step()
    assert np.array_equal(weights_of(model), expected)
