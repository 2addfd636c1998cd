"""Ranks that stand by in a program, and come into a user's loop for those that are lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.errors import ConfigError
from rankwise.training.admission import NotNeeded, come_in
from tests import effort
from tests.test_run import LOOPS, Counted, noted, sgd
from tests.user_loops import Alone, dataset, flat, network, on_ranks

SET_UP = 27
"""Calls of the transport before a run trains, in which a lost rank ends it."""


def between_passes(run: Any) -> np.ndarray:
    """What a loop does around its passes: rates that are set as an epoch begins, means before, between and
    behind passes, gradients that stay over turns, a generator of its own, and turns after all epochs."""
    model = run.model(network())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    by_epoch = torch.optim.lr_scheduler.MultiplicativeLR(optimizer, lambda _: 0.5)
    run.keep(optimizer=optimizer, by_epoch=by_epoch)
    drawn = torch.Generator().manual_seed(5)
    first = run.loader(DataLoader(dataset(9), batch_size=2, shuffle=True, generator=drawn))
    second = run.loader(DataLoader(dataset(5), batch_size=2))
    means = []
    for _ in run.epochs(2):
        by_epoch.step()
        means.append(run.mean(optimizer.param_groups[0]["lr"]))
        for x, y in first:
            F.mse_loss(model(x), y).backward()
            if run.turn % 2:
                optimizer.step()
                optimizer.zero_grad()
        by_epoch.step()
        means.append(run.mean(optimizer.param_groups[0]["lr"]))
        for x, y in second:
            run.mean(1.0)
            F.mse_loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        by_epoch.step()
        run.mean(2.0)
        run.mean(3.0)
    run.mean(4.0)
    for step in run.steps(2):
        F.mse_loss(model(dataset(4).tensors[0]), dataset(4).tensors[1] + step).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.mean(5.0)
    return np.append(flat(model), optimizer.param_groups[0]["lr"])


def of_steps(run: Any) -> np.ndarray:
    """Turns without epochs, and means between them."""
    model = run.model(network())
    optimizer = sgd(model)
    run.keep(optimizer=optimizer)
    for _ in range(3):
        for step in run.steps(3):
            optimizer.zero_grad()
            F.mse_loss(model(dataset(4).tensors[0]), dataset(4).tensors[1] + step).backward()
            optimizer.step()
        run.mean(1.0)
        run.mean(2.0)
    return flat(model)


WITH_SPARES = {**LOOPS, "between passes": between_passes, "of steps": of_steps}


@pytest.mark.parametrize(("name", "lost"), effort.rotating(WITH_SPARES, [0, 1]))
def test_a_spare_takes_the_place_of_a_lost_rank(name: str, lost: int) -> None:
    """Whenever a rank is killed, a spare goes through the program from its beginning, comes in where the
    others are, and as many ranks as there were end where one process does."""
    loop = WITH_SPARES[name]
    expected = loop(Alone(2))
    for call in range(SET_UP + lost, SET_UP + 90, 1 if effort.FULL else 23):
        results = on_ranks(3, loop, kill_at={lost: call}, spares=1)
        assert len(results) == 2
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10, err_msg=f"killed at {call}")


@pytest.mark.parametrize("strategy", ["allreduce", "local-sgd", "diloco", "parameter-averaging"])
def test_each_sample_once(strategy: str) -> None:
    """With each strategy the samples of an epoch in which a spare comes in are counted once each, and all
    ranks end with the same weights."""

    def loop(world: World) -> Any:
        try:
            book = Counted(come_in(world, 3))
        except NotNeeded:
            return Killed
        run = noted(world, book, ranks=3, strategy=strategy, spares=1, on_failure="continue")
        model = run.model(network())
        optimizer = sgd(model)
        run.keep(optimizer=optimizer)
        loader = run.loader(DataLoader(dataset(23), batch_size=2))
        for _ in run.epochs(2):
            for x, y in loader:
                optimizer.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
        return flat(model), book

    for call in range(SET_UP + 3, SET_UP + 50, 4 if effort.FULL else 12):
        results = [its for its in run_in_threads(4, loop, kill_at={1: call}) if its is not Killed]
        assert len(results) == 3
        for weights, book in results:
            np.testing.assert_array_equal(weights, results[0][0])
            assert [(its.expected, its.trained, its.lost) for its in book.counts] == [(23, 23, 0)] * len(
                book.counts
            )
        assert len(results[0][1].counts) >= 2  # the end of an epoch may be reached again


def test_several_are_lost_and_come_in() -> None:
    """Two spares take two places, one after the other, and with a third loss the others go on without."""
    loop = between_passes
    expected = loop(Alone(2))
    results = on_ranks(4, loop, kill_at={0: 40, 1: 70}, spares=2)
    assert len(results) == 2
    for result in results:
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10)
    results = on_ranks(3, loop, kill_at={0: 40, 1: 70}, spares=1, on_shrink="keep-global-batch")
    assert len(results) == 1
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=1e-10)


def test_spares_alone() -> None:
    """Spares of which none is left to train are refused in one line; of a single process they say nothing."""
    with pytest.raises(ConfigError, match="--spares 2 of 2 ranks leaves none to train"):
        on_ranks(2, lambda run: None, spares=2)
    (result,) = on_ranks(1, of_steps, spares=2)
    np.testing.assert_allclose(result, of_steps(Alone(1)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["between passes", "of steps"])
@pytest.mark.parametrize("lost", [0, 1])
def test_what_is_around_passes_without_spares(name: str, lost: int) -> None:
    """Whenever a rank is killed, the others make what is around their passes once: rates that are set as an
    epoch begins, steps behind a pass that had none, and as many turns of `run.steps` as were asked for."""
    loop = WITH_SPARES[name]
    expected = loop(Alone(2))
    for call in range(SET_UP + lost, SET_UP + 90, 1 if effort.FULL else 13):
        results = on_ranks(2, loop, kill_at={lost: call}, on_shrink="keep-global-batch")
        assert results
        for result in results:
            np.testing.assert_allclose(result, expected, rtol=0, atol=1e-10, err_msg=f"killed at {call}")
