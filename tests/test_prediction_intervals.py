"""Intervals of predictions: machines whose truth is known, what was not measured, and who is told of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rankwise.comm.shared_memory import CAPACITY, WHOLE
from rankwise.config import TrainConfig
from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import EPOCH, RankTimeline
from rankwise.plan import resolve
from rankwise.prediction import collectives
from rankwise.prediction.interval import (
    DRIFT,
    DRIFT_COUNT,
    EMPTIED,
    LEVEL,
    NEIGHBOUR,
    PER_STEP,
    Doubt,
    interval,
)
from rankwise.prediction.messages import ASSUMED, _fit
from rankwise.prediction.network import Cluster, Link
from rankwise.prediction.options import PredictionOptions
from rankwise.prediction.points import Point
from rankwise.prediction.predict import Prediction, predict
from rankwise.prediction.source import Compute, Source, _mean_steps
from rankwise.prediction.traffic import traffic
from rankwise.strategies.traffic import ModelSize

from . import effort

Random = np.random.Generator

PAIR = PredictionOptions(ranks="2", strategy="allreduce", threads=1, cores_per_host=2)
STEP_S = 0.002
MACHINES = 240 if effort.FULL else 60


def steps(mean_s: float = STEP_S, seed: int = 0, **more: Any) -> Compute:
    """Steps of a rank alone on its host, of 16 samples, three quarters of each in its passes."""
    drawn = np.random.default_rng(seed).gamma(50, 1 / 50, 150)
    known = {
        "threads": 1,
        "batch": 16,
        "meets": False,
        "per_sample_s": 0.75 * mean_s / 16,
        "backward_s": 0.5 * mean_s,
        "optimizer_s": 0.1 * mean_s,
        "evaluation_s": 50 * mean_s,
        "epochs_s": (mean_s,) * 4,
    }
    return Compute(steps_s=drawn * (mean_s / drawn.mean()), **(known | more))


def machine(*compute: Compute, **more: Any) -> Source:
    """What is known of a machine of two cores."""
    config = resolve(TrainConfig(dataset="digits", batch_size=16, threads=1))
    model = ModelSize(((100, 200), (200,), (200, 10), (10,)))
    source = Source("made", config, model, 5000, 2, compute, ASSUMED, 0.0, 0.0, 0.0, 10**8)
    return replace(source, **more)


def point(source: Source, wishes: PredictionOptions = PAIR) -> Point:
    (found,) = predict(source, wishes).points
    return found


def run_of(random: Random, true: Compute) -> Compute:
    """What one run shows of its steps: the machine has drifted meanwhile, and its epochs differ."""
    drift = np.exp(random.normal(0, DRIFT))
    spread, count = random.uniform(0, 0.06), random.integers(2, 6)
    epochs_s = true.mean_s * drift * np.exp(random.normal(0, spread, count))
    factor = float(np.median(epochs_s)) / true.mean_s
    return replace(
        true,
        steps_s=true.steps_s * factor,
        evaluation_s=true.evaluation_s * factor,
        per_sample_s=true.per_sample_s * factor,
        optimizer_s=true.optimizer_s * factor,
        epochs_s=tuple(epochs_s.tolist()),
    )


def all_measured(random: Random) -> tuple[Point, float]:
    """Two ranks from a run of two."""
    true = machine(steps(meets=True, busy=2), messages=replace(ASSUMED, knows_sums=True, knows_messages=True))
    return point(replace(true, compute=(run_of(random, true.compute[0]),))), point(true).epoch_s


def from_one_rank(random: Random) -> tuple[Point, float]:
    """Two ranks from a run of one: they hold each other up, and exchanges take what they take."""
    alone = steps()
    longer = 1 + random.uniform(0, NEIGHBOUR)
    both = steps(STEP_S * (longer + random.uniform(0, EMPTIED)), meets=True, busy=2)
    much = np.exp(random.uniform(-np.log(2), np.log(2)))
    link = Link(much * ASSUMED.shared.latency_s, much * ASSUMED.shared.s_per_byte)
    both = replace(both, evaluation_s=longer * alone.evaluation_s)
    true = machine(both, messages=replace(ASSUMED, shared=link, knows_sums=True))
    return point(machine(run_of(random, alone))), point(true).epoch_s


def on_other_threads(random: Random) -> tuple[Point, float]:
    """One rank of two threads from one of one: between no use of the second and its full use."""
    wishes = PredictionOptions(ranks="1", threads=2, cores_per_host=2)
    part = random.uniform(0.5, 1)
    true = replace(steps(part * STEP_S, threads=2, busy=2), evaluation_s=part * 50 * STEP_S)
    return point(machine(run_of(random, steps())), wishes), point(machine(true), wishes).epoch_s


def of_another_batch(random: Random) -> tuple[Point, float]:
    """One rank with four times the batch: some of its passes does not grow with it."""
    wishes = PredictionOptions(ranks="1", threads=1, batch_size=64)
    alone = steps()
    grows = 0.75 * (1 - random.uniform(0, PER_STEP))
    true = replace(steps(STEP_S * (1 + 3 * grows), batch=64), evaluation_s=alone.evaluation_s)
    return point(machine(run_of(random, alone)), wishes), point(machine(true), wishes).epoch_s


@pytest.mark.parametrize("kind", [all_measured, from_one_rank, on_other_threads, of_another_batch])
def test_intervals_hold_what_they_promise(kind: Callable[[Random], tuple[Point, float]]) -> None:
    """Of machines that are as far from their runs as is assumed nine tenths of the runs that are made then
    lie between from and to, but for what chance allows; where all was measured the interval is no wider than
    a fifth to each side, and half of it holds too few."""
    cases = []
    for seed in range(MACHINES):
        random = np.random.default_rng(seed)
        its, truth = kind(random)
        cases.append((its, truth * np.exp(random.normal(0, DRIFT))))
    hits = sum(its.low_s <= truth <= its.high_s for its, truth in cases)
    fewest = stats.binom.ppf(0.05, MACHINES, LEVEL)
    assert hits >= fewest
    if kind is all_measured:
        assert np.median([(its.high_s - its.low_s) / 2 / its.epoch_s for its, _ in cases]) <= 0.2
        inner = [((its.low_s + its.epoch_s) / 2, (its.high_s + its.epoch_s) / 2) for its, _ in cases]
        held = sum(low_s <= truth <= high_s for (low_s, high_s), (_, truth) in zip(inner, cases, strict=True))
        assert held < fewest


def told(source: Source, **wishes: Any) -> tuple[set[str], Prediction]:
    found = predict(source, PredictionOptions(**{"threads": 1, "cores_per_host": 2} | wishes))
    return {doubt.name for its in found.points for doubt in its.doubts}, found


def test_what_was_not_measured_widens_the_interval_and_is_told() -> None:
    """Each thing that the source lacks is a reason by its name, and a line says which run would narrow it;
    with such a run the reason is gone or smaller, and so is the interval."""
    alone, pair = steps(), steps(meets=True, busy=2)
    knows = replace(ASSUMED, knows_sums=True, knows_messages=True)
    one = machine(alone)
    both = machine(alone, pair, messages=knows)
    for source, fuller, wishes, name, option in (
        (one, both, {"ranks": "2", "strategy": "allreduce"}, "neighbours", "--ranks 2"),
        (one, both, {"ranks": "2", "strategy": "allreduce"}, "exchanges", "--strategy allreduce"),
        (one, machine(alone, steps(threads=2)), {"ranks": "1", "threads": 2}, "threads", "--threads 2"),
        (
            one,
            machine(alone, steps(3 * STEP_S, batch=64)),
            {"ranks": "1", "batch_size": 64},
            "batch",
            "--batch-size 64",
        ),
        (one, one, {"ranks": "4", "strategy": "allreduce"}, "shared cores", "--ranks 4"),
        (
            both,
            both,
            {"ranks": "4", "strategy": "allreduce", "network": "1gbe", "ranks_per_host": 2},
            "network",
            "doctor --hosts",
        ),
    ):
        names, found = told(source, **wishes)
        assert name in names
        assert any(option in line for line in found.narrower), (name, found.narrower)
        if fuller is not source:
            its, wider = told(fuller, **wishes)[1].points[0], found.points[0]
            assert (its.high_s - its.low_s) / its.epoch_s < (wider.high_s - wider.low_s) / wider.epoch_s
    names, found = told(both, ranks="2", strategy="allreduce")
    assert names == {"repeats", "drift", "model", "exchanges"}
    assert found.narrower == ()


def drift(source: Source) -> float:
    """How far the machine's drift may take an epoch, as a logarithm."""
    found = point(source, PredictionOptions(ranks="1", threads=1))
    (its,) = (doubt for doubt in found.doubts if doubt.name == "drift")
    return float(np.log1p(its.above_s / found.epoch_s))


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.5])
def test_one_more_run_of_the_same_tells_of_the_drift(factor: float) -> None:
    """Runs with the same options count together, by their means; how far they are apart counts, and a new run
    drifts itself, however many were seen: Student's interval for one more."""
    first, second = (machine(steps(its * STEP_S)) for its in (1.0, factor))
    both = first.with_compute_of(second)
    (known,) = both.compute
    assert known.runs == 2
    assert known.mean_s == pytest.approx((1 + factor) / 2 * STEP_S)
    assert len(known.epochs_s) == 8
    freedom = DRIFT_COUNT + 1
    variance = (DRIFT_COUNT * DRIFT**2 + np.log(factor) ** 2 / 2) / freedom
    assert drift(both) == pytest.approx(stats.t.ppf(0.95, freedom) * np.sqrt(1.5 * variance))
    assert (drift(both) < drift(first)) == (factor < 1.2)


@given(
    st.floats(0.1, 1e4),
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 5)), max_size=6),
    st.tuples(st.floats(0, 2), st.floats(0, 5)),
)
def test_a_reason_more_never_narrows(
    total_s: float, reasons: list[tuple[float, float]], more: tuple[float, float]
) -> None:
    """An interval holds the prediction, begins above 0, and one more reason widens it or leaves it."""
    doubts = [Doubt("some", below * total_s, above * total_s) for below, above in reasons]
    low_s, high_s = interval(total_s, doubts)
    assert 0 < low_s <= total_s <= high_s
    wider = interval(total_s, [*doubts, Doubt("more", more[0] * total_s, more[1] * total_s)])
    assert wider[0] <= low_s
    assert wider[1] >= high_s


def test_ranks_of_a_host_add_up_without_messages() -> None:
    """On one host a sum of all is one meeting of two ranks, or of any number for few bytes, and two meetings
    otherwise, in which each rank adds up its part; between hosts, and beyond what the memory takes, it is
    Open MPI's. A meeting costs what shared memory costs, not what messages do."""
    few, many = WHOLE, 4 * WHOLE
    for ranks, size, meetings, added in (
        (2, many, 1, many),
        (5, few, 1, 4 * few),
        (5, many, 2, 4 * many / 5),
    ):
        hops = collectives.sum_of_all([ranks], size)
        assert [hop.shared for hop in hops] == [True] * meetings
        assert sum(hop.reduced for hop in hops) == added
        shared, messages = Link(1.0, 0.0), Link(100.0, 0.0)
        assert Cluster(ranks, ranks, ranks, messages, shared, messages, 0.0).seconds(hops) == meetings
    assert collectives.sum_of_all([2, 3], many) == collectives.allreduce(5, many)
    assert collectives.sum_of_all([5], CAPACITY + 1) == collectives.allreduce(5, CAPACITY + 1)
    config = resolve(TrainConfig(ranks=4, strategy="allreduce"))
    for hosts, shared in (([4], True), ([2, 2], False)):
        hops = traffic(config, ModelSize(((100, 100),)), hosts).each_round.hops
        assert {hop.shared for hop in hops} == {shared}


def test_what_exchanges_do_not_tell_apart_stays_near_what_is_assumed() -> None:
    """Exchanges of two sizes tell latency and bandwidth; those of one size tell how long it takes, and no
    other size is taken for free."""
    latency_s, s_per_byte = 5e-6, 1e-9
    rows = [
        (1.0, 1 / time_s, size / time_s)
        for size in (8, 250_000)
        for time_s in [latency_s + size * s_per_byte]
    ]
    both = _fit(rows, ASSUMED.shared)
    assert both.latency_s == pytest.approx(latency_s, rel=0.02)
    assert both.s_per_byte == pytest.approx(s_per_byte, rel=0.02)
    for row, size in zip(rows, (8, 250_000), strict=True):
        alone = _fit([row], ASSUMED.shared)
        assert alone.message_s(size, one_way=True) == pytest.approx(latency_s + size * s_per_byte, rel=0.02)
        assert alone.s_per_byte > 0.01 * ASSUMED.shared.s_per_byte


def test_a_mean_step_is_that_of_whole_epochs() -> None:
    """How long a step takes in the mean is what an epoch's phases say of all its steps, and not what the few
    say that a timeline keeps; the first epoch, which warms up, does not count, nor what lies outside of
    steps."""
    rows = np.zeros(3, EPOCH)
    rows["samples"] = 160
    rows["forward"] = [90e9, 6e9, 9e9]
    rows["backward"] = [90e9, 4e9, 6e9]
    rows["wait"] = rows["evaluation"] = 7e9
    rows["other"] = 1e9
    line = cast(RankTimeline, SimpleNamespace(role="worker", epochs=rows))
    master = cast(RankTimeline, SimpleNamespace(role="master", epochs=rows))
    means_s, parts = _mean_steps([line, master], 16, outside_s=1.0)
    assert means_s == pytest.approx((1.0, 1.5))
    assert parts["forward"] == pytest.approx(0.75)
    assert set(parts) == set(PHASES)
