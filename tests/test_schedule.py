"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise import synchronise
from rankwise.comm import World, run_in_threads, solo_world
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.plan import resolve
from rankwise.training.schedule import rate_factor, scheduler

from .strategies.loops import BATCH, SAMPLES, gradients, make


def factor(position: float, **options: object) -> float:
    plan = resolve(TrainConfig(**{"epochs": 10, **options}))
    return rate_factor(plan, position, plan.workers)


def test_by_default_the_rate_is_left_alone() -> None:
    """Without options nobody touches the optimiser's rate."""
    assert scheduler(resolve(TrainConfig())) is None
    assert scheduler(resolve(TrainConfig(warmup=1))) is not None


def test_cosine_is_torchs() -> None:
    """The cosine falls as torch's CosineAnnealingLR does."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for epoch in range(10):
        assert factor(epoch, schedule="cosine") == pytest.approx(theirs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        theirs.step()


def test_one_cycle_is_torchs() -> None:
    """One cycle rises and falls as torch's OneCycleLR does, but to 0 at its end."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, cycle_momentum=False)
    for step in range(100):
        # torch's peak is at step 0.3 * 101 - 1, ours at 0.3 of the run: up to a hundredth of it apart.
        assert factor(step / 10, schedule="one-cycle") == pytest.approx(theirs.get_last_lr()[0], abs=0.06)
        optimizer.step()
        theirs.step()


def test_triangular_is_two_lines() -> None:
    """The rate rises along a line from a fifth of its peak, and falls along another; where the peak is and
    where it ends can be said, of the curved schedules too."""
    places = np.linspace(0, 10, 41)
    found = [factor(position, schedule="triangular") for position in places]
    assert found == pytest.approx(np.interp(places, [0, 2.3, 10], [0.2, 1, 0.07]))
    found = [factor(p, schedule="triangular", peak_at=0.5, final_lr_fraction=0.1) for p in places]
    assert found == pytest.approx(np.interp(places, [0, 5, 10], [0.2, 1, 0.1]))
    curved = [factor(p, schedule="one-cycle", peak_at=0.5, final_lr_fraction=0.1) for p in (5, 7.5, 10)]
    assert curved == pytest.approx([1, 0.55, 0.1])
    assert factor(10, schedule="cosine", final_lr_fraction=0.2) == pytest.approx(0.2)


def test_steps() -> None:
    """The rate is divided by 10 after half, and again after three quarters."""
    found = [factor(position, schedule="step") for position in (0, 4.9, 5.1, 7.4, 7.6, 10)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


@given(
    st.floats(0, 10),
    st.integers(2, 64),
    st.sampled_from(["constant", "cosine", "one-cycle", "step", "triangular"]),
)
def test_scaling_multiplies_everything(position: float, ranks: int, schedule: str) -> None:
    """Scaling is by the workers, a master not counted, and leaves the form of the schedule."""
    plain = factor(position, schedule=schedule, ranks=ranks)
    linear = factor(position, schedule=schedule, ranks=ranks, lr_scaling="linear", topology="master")
    root = factor(position, schedule=schedule, ranks=ranks, lr_scaling="sqrt", topology="allreduce")
    assert linear == pytest.approx(plain * (ranks - 1))
    assert root == pytest.approx(plain * math.sqrt(ranks))
    assert 0 <= plain <= 1


def test_warm_up_rises_evenly() -> None:
    """In the warm-up the rate rises evenly from 0 to what the schedule says."""
    found = [factor(position, warmup=2) for position in (0, 0.5, 1, 2, 3)]
    assert found == pytest.approx([0, 0.25, 0.5, 1, 1])


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "step", "triangular"])
def test_loops_count_from_0_or_from_1(schedule: str) -> None:
    """A loop over range(epochs) has the rates and batches of one that counts from 1, none negative."""

    def loop(epochs: range) -> list[tuple[int, float, list[int]]]:
        model, optimizer = make()
        options: dict[str, Any] = {"schedule": schedule, "epochs": 4, "warmup": 1}
        ranks = synchronise(model, optimizer, solo_world(), samples=SAMPLES, batch_size=BATCH, **options)
        seen = []
        for epoch in epochs:
            for batch in ranks.batches(epoch):
                gradients(model, optimizer, batch.indices)
                seen.append((batch.epoch, optimizer.param_groups[0]["lr"], batch.indices.tolist()))
                ranks.step()
        return seen

    from_0 = loop(range(4))
    assert from_0 == loop(range(1, 5))
    assert all(rate >= 0 for _, rate, _ in from_0)
    with pytest.raises(ConfigError, match="batches\\(-1\\)"):
        loop(range(-1, 3))


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "allreduce", "sync_every": 3},
        {"strategy": "gradient-server", "sync_every": 3},
        {"strategy": "slowmo", "sync_every": 3, "topology": "allreduce"},
        {"strategy": "local-sgd", "sync_every": 4, "topology": "master"},
    ],
    ids=lambda options: f"{options['strategy']}",
)
@pytest.mark.parametrize("samples", [91, 97])
def test_ragged_rounds_end_at_one_rate(options: dict[str, Any], samples: int) -> None:
    """However many steps each rank has in a round, and whether it trains at all, all use one learning rate at
    the round's end, where they step together or take an outer step: that of the rank with the most."""

    def program(world: World) -> list[float]:
        model, optimizer = make()
        ranks = synchronise(
            model, optimizer, world, samples=samples, batch_size=6, schedule="cosine", epochs=3, **options
        )
        at_ends: list[float] = []
        commit = ranks._strategy.commit

        def noted(*its: Any) -> Any:
            at_ends.append(optimizer.param_groups[0]["lr"])
            return commit(*its)

        object.__setattr__(ranks._strategy, "commit", noted)
        for epoch in (1, 2, 3):
            for batch in ranks.batches(epoch):
                gradients(model, optimizer, batch.indices)
                ranks.step()
        return at_ends

    found = run_in_threads(3, program)
    assert found[0] == found[1] == found[2]
    assert found[0] == sorted(found[0], reverse=True)
    assert len(set(found[0])) == len(found[0]) >= 6
