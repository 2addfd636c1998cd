"""Predictions: closed forms against events, order statistics, bytes against real runs, and the command
line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, UsageError
from rankwise.plan import resolve
from rankwise.prediction import collectives
from rankwise.prediction.network import NETWORKS, Cluster, Link, coefficients, read_network
from rankwise.prediction.options import PredictionOptions
from rankwise.prediction.predict import predict, read_ranks
from rankwise.prediction.simulation import gossip, serve_all
from rankwise.prediction.slowest import expected_maximum, sums
from rankwise.prediction.source import OversubscribedRun, Source, read_source
from rankwise.prediction.steps import SLICE_S, compute_at
from rankwise.prediction.traffic import SUMMARY, traffic
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.strategies import entry_of
from rankwise.strategies.gossip import distances, neighbours
from rankwise.strategies.traffic import ModelSize
from rankwise.training.build import synchronise

from . import effort
from .conftest import Command
from .test_cli import call

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]

LINK = Link(10e-6, 1e-9)

BUSY = {"dataset": "digits", "model": "mlp", "batch_size": 16, "train_limit": 640, "val_limit": 100}
"""Steps that take a millisecond: of shorter ones what is measured is mostly what lies between them."""


def on_one_host(ranks: int) -> Cluster:
    """So many ranks, each with a core."""
    return Cluster(ranks, ranks, ranks, LINK, LINK, LINK, 0.0)


# ---- Closed forms against events


def simulated(ranks: int, partner: Callable[[int, int], tuple[int, int]], sizes: list[float]) -> float:
    """The makespan of an exchange by messages: in turn k rank i sends `sizes[k]` to `partner(i, k)[0]`, and
    goes on when it has what `partner(i, k)[1]` sent."""
    env = simpy.Environment()
    boxes = {(turn, rank): env.event() for turn in range(len(sizes)) for rank in range(ranks)}

    def rank_of(rank: int) -> Any:
        for turn, size in enumerate(sizes):
            to, _ = partner(rank, turn)
            yield env.timeout(LINK.latency_s + size * LINK.s_per_byte)
            boxes[turn, to].succeed()
            yield boxes[turn, rank]

    for rank in range(ranks):
        env.process(rank_of(rank))
    env.run()
    return float(env.now)


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
@pytest.mark.parametrize("size", [1_000, 20_000])
def test_a_ring_costs_what_its_messages_do(ranks: int, size: int) -> None:
    """The closed form of a ring is the makespan of its messages in an event simulation."""
    turns = [size / ranks] * (2 * (ranks - 1))
    events_s = simulated(ranks, lambda rank, _: ((rank + 1) % ranks, (rank - 1) % ranks), turns)
    assert on_one_host(ranks).seconds(collectives.ring(ranks, size)) == pytest.approx(events_s)


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_doubling_costs_what_its_messages_do(ranks: int) -> None:
    """The closed forms of recursive doubling and of Rabenseifner's algorithm are the makespans of their
    messages."""
    steps = ranks.bit_length() - 1

    def partner(rank: int, turn: int) -> tuple[int, int]:
        other = rank ^ (1 << (turn if turn < steps else 2 * steps - 1 - turn))
        return other, other

    doubling = on_one_host(ranks).seconds(collectives._recursive_doubling(ranks, 4000))
    assert doubling == pytest.approx(simulated(ranks, partner, [4000.0] * steps))
    halves = [4000 / 2 ** (turn + 1) for turn in range(steps)]
    rabenseifner = on_one_host(ranks).seconds(collectives._rabenseifner(ranks, 4000))
    assert rabenseifner == pytest.approx(simulated(ranks, partner, [*halves, *reversed(halves)]))


def test_open_mpi_s_decisions() -> None:
    """The algorithm is that of Open MPI's table at the sizes that rankwise sends: the paper's network on few
    and on many ranks, and the few numbers of an epoch's end."""
    assert collectives.algorithm(collectives.ALLREDUCE, 2, 248_028) == "segmented ring"
    assert collectives.algorithm(collectives.ALLREDUCE, 8, 248_028) == "rabenseifner"
    assert collectives.algorithm(collectives.ALLREDUCE, 100, 248_028) == "recursive doubling"
    assert collectives.algorithm(collectives.ALLREDUCE, 3, 32) == "recursive doubling"
    assert collectives.algorithm(collectives.ALLREDUCE, 10_000, 32) == "nonoverlapping"
    assert collectives.algorithm(collectives.ALLGATHER, 2, 7) == "two processes"
    assert collectives.algorithm(collectives.ALLGATHER, 40, 70_000) == "ring"


@given(st.integers(2, 3000), st.integers(1, 10**8))
def test_exchanges_move_what_they_must(ranks: int, size: int) -> None:
    """Whatever the algorithm: each rank must send its size at least 2 (p - 1) / p times in a sum, and receive
    all others' in an allgather; more bytes never take less time on the same algorithm."""
    cluster = on_one_host(ranks)
    least_s = 2 * (ranks - 1) / ranks * size * LINK.s_per_byte
    assert cluster.seconds(collectives.allreduce(ranks, size)) >= 0.999 * least_s
    assert cluster.seconds(collectives.allgather(ranks, size)) >= 0.999 * (ranks - 1) * size * LINK.s_per_byte
    for rules, form in (
        (collectives.ALLREDUCE, collectives.allreduce),
        (collectives.ALLGATHER, collectives.allgather),
    ):
        if collectives.algorithm(rules, ranks, size) == collectives.algorithm(rules, ranks, size + 4):
            small, large = (cluster.seconds(form(ranks, its)) for its in (size, size + 4))
            assert large >= small or size < 4 * ranks  # below, a ring has too few numbers


def test_a_fit_takes_apart_what_was_put_together() -> None:
    """Time inside one host is linear in latency and in bytes, by the coefficients that the fit uses."""
    for ranks in (2, 3, 5, 8):
        for hops in (
            collectives.allreduce(ranks, 5000),
            collectives.gather(ranks, 70),
            collectives.broadcast(ranks, 9),
        ):
            latency, size, _ = coefficients(hops)
            assert on_one_host(ranks).seconds(hops) == pytest.approx(
                latency * LINK.latency_s + size * LINK.s_per_byte
            )


def test_a_slower_network_never_helps() -> None:
    """Over hosts every exchange takes as long as within one, or longer; and longer on a slower network."""
    for hops in (
        collectives.allreduce(8, 10**6),
        collectives.allgather(8, 10**6),
        collectives.gather(8, 10**6),
    ):
        near = Cluster(8, 8, 8, LINK, LINK, LINK, 0.0).seconds(hops)
        fast = Cluster(8, 2, 2, LINK, LINK, Link.of(20, 5), 0.0).seconds(hops)
        slow = Cluster(8, 2, 2, LINK, LINK, NETWORKS["1gbe"].link, 0.0).seconds(hops)
        assert near < fast < slow


# ---- The slowest of N


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=40), st.integers(1, 50))
def test_order_statistics(values: list[float], count: int) -> None:
    """The mean of the largest of N draws is the integral of 1 - F**N; it lies between mean and maximum, and
    grows with N."""
    samples = np.array(values)
    ordered = np.sort(samples)
    steps = np.diff(np.concatenate([[0], ordered]))
    below = np.arange(len(ordered)) / len(ordered)
    assert expected_maximum(samples, count) == pytest.approx(float(steps @ (1 - below**count)))
    assert expected_maximum(samples, 1) == pytest.approx(samples.mean())
    assert (
        expected_maximum(samples, count)
        <= expected_maximum(samples, count + 1) + 1e-12
        <= samples.max() + 1e-9
    )


def test_sums_of_steps() -> None:
    """A round's time has the mean and variance of so many independent steps, few or many, whole or not."""
    samples = np.random.default_rng(1).gamma(4, 1, 500)
    for terms in (1, 7, 7.5, 500):
        drawn = sums(samples, terms, seed=0)
        assert drawn.mean() == pytest.approx(terms * samples.mean(), rel=0.03)
        assert drawn.std() == pytest.approx(np.sqrt(int(terms) + (terms % 1) ** 2) * samples.std(), rel=0.08)


# ---- Events


def test_an_asynchronous_master() -> None:
    """With constant steps the simulation is what can be said by hand: workers that seldom come do not wait,
    and a master that is always busy sets the pace, with all it does or, where answers go out behind its back,
    without these."""
    idle = serve_all(1, 10, np.array([1.0]), transfer_s=0.1, serve_s=0.05, seed=0)
    assert idle.makespan_s == pytest.approx(10 * 1.25)
    assert idle.master_wait_s == pytest.approx(10.0)
    busy = serve_all(50, 10, np.array([1.0]), transfer_s=0.1, serve_s=0.05, seed=0)
    assert busy.makespan_s == pytest.approx(1 + 500 * 0.25)
    behind = serve_all(50, 10, np.array([1.0]), transfer_s=0.1, serve_s=0.05, seed=0, answers_behind=True)
    assert behind.makespan_s == pytest.approx(1 + 500 * 0.15 + 0.1)
    slow = serve_all(1, 10, np.array([1.0]), transfer_s=0.1, serve_s=0.05, seed=0, answers_behind=True)
    assert slow.makespan_s == pytest.approx(10 * 1.25)
    tight = serve_all(4, 20, np.array([1.0, 5.0]), transfer_s=0, serve_s=0, seed=0, max_staleness=0)
    loose = serve_all(4, 20, np.array([1.0, 5.0]), transfer_s=0, serve_s=0, seed=0)
    assert tight.worker_wait_s > loose.worker_wait_s == pytest.approx(0)


@pytest.mark.parametrize("topology", ["ring", "exponential", "complete"])
def test_gossip_is_its_events(topology: str) -> None:
    """The recurrence of gossip gives what its events do, one by one."""
    ranks, rounds = 6, 5
    samples = np.array([1.0, 2.0, 4.0])
    random = np.random.default_rng(3)
    drawn = [random.choice(samples, ranks) for _ in range(rounds)]
    env = simpy.Environment()
    came = {(number, rank): env.event() for number in range(rounds) for rank in range(ranks)}

    def rank_of(rank: int) -> Any:
        for number in range(rounds):
            yield env.timeout(drawn[number][rank])
            came[number, rank].succeed()
            _, sources = neighbours(topology, rank, ranks, number)
            yield simpy.AllOf(env, [came[number, rank], *(came[number, source] for source in sources)])
            yield env.timeout(0.5)

    for rank in range(ranks):
        env.process(rank_of(rank))
    env.run()
    outcome = gossip(partial(distances, topology), ranks, rounds, samples, exchange_s=0.5, seed=3)
    assert outcome.makespan_s == pytest.approx(env.now)


# ---- Bytes

EXAMPLE = "majority_vote:MajorityVote"

TEAMS = [
    {"strategy": EXAMPLE},
    {"strategy": "parameter-averaging", "topology": "master", "sync_every": 3},
    {"strategy": "parameter-averaging", "topology": "allreduce", "optimizer_state": "average"},
    {"strategy": "allreduce"},
    {"strategy": "allreduce", "bucket_mb": 0.0001},
    {"strategy": "gradient-server"},
    {"strategy": "local-sgd", "sync_every": 4},
    {"strategy": "slowmo", "topology": "master"},
    {"strategy": "easgd"},
    {"strategy": "downpour", "sync_every": 2},
    {"strategy": "gossip"},
    {"strategy": "gossip", "topology": "exponential"},
    {"strategy": "gossip", "topology": "complete"},
    {"strategy": "two-level", "sync_across_hosts": 3},
    {"strategy": "two-level", "sync_across_hosts": 3, "compress": "int8"},
    {"strategy": "two-level", "sync_across_hosts": 3, "optimizer_state": "average"},
    *(
        {"strategy": "allreduce", "compress": name}
        for name in ("fp16", "bf16", "int8", "topk:0.1", "sign", "powersgd:1")
    ),
    *({"strategy": "gradient-server", "compress": name} for name in ("fp16", "int8", "powersgd:1")),
]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The strategy of docs/extending.md is found as in a user's folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")


@pytest.mark.parametrize("options", TEAMS, ids=lambda options: " ".join(map(str, options.values())))
@pytest.mark.usefixtures("examples")
def test_bytes_are_those_of_real_runs(options: dict[str, Any]) -> None:
    """The predicted bytes of an epoch are those that real ranks hand to each other, to the byte."""
    ranks, samples, hosts = 4, 90, [0, 0, 1, 1]

    def train(world: World) -> int:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        synchroniser = synchronise(model, optimizer, world, samples=samples, batch_size=8, **options)
        before = world.traffic.bytes_sent
        for batch in synchroniser.batches(1):
            optimizer.zero_grad()
            model(torch.randn(max(2, len(batch)), 8)).sum().backward()
            synchroniser.step()
        return world.traffic.bytes_sent - before

    on_hosts = hosts if options["strategy"] == "two-level" else None
    sent = sum(run_in_threads(ranks, train, hosts=on_hosts))
    config = resolve(TrainConfig(ranks=ranks, batch_size=8, momentum=0.9, **options))
    model = ModelSize(((6, 8), (6,), (6,), (6,), (3, 6), (3,)), buffers=12, integers=1, buffer_tensors=2)
    its = traffic(config, model, [2, 2] if on_hosts else [ranks])
    shard = -(-samples // config.workers)
    steps = -(-shard // 8)
    every = config.sync_every if isinstance(config.sync_every, int) else steps
    rounds = -(-steps // every)
    summary = sum(SUMMARY) * ranks
    closing = its.each_epoch.bytes_sent - summary
    assert sent == steps * its.each_step.bytes_sent + rounds * its.each_round.bytes_sent + closing


@pytest.mark.usefixtures("examples")
def test_a_strategy_of_one_s_own_is_predicted(train_in_threads: Train, config: Make) -> None:
    """A user's strategy that says what it sends is predicted from a run of it: its bytes are those of an
    epoch of that run, but for the logs that ranks compare; and as many from a run of another strategy."""
    sent = {}
    options = {**BUSY, "train_limit": 480}
    for epochs in (2, 3):
        mine = config(**options, ranks=3, epochs=epochs, strategy=EXAMPLE)
        record, folder, _ = train_in_threads(mine, folder=f"{epochs}-epochs")
        sent[epochs] = sum(row.bytes_sent for row in record.ranks)
    source = read_source([folder.path])
    assert source.messages.measured
    own = predict(source, PredictionOptions(ranks="3"))
    assert EXAMPLE in own.about
    assert own.points[0].bytes_sent == pytest.approx(sent[3] - sent[2], rel=1e-3)
    _, other, _ = train_in_threads(config(**options, ranks=1, epochs=2), folder="other")
    (there,) = predict(read_source([other.path]), PredictionOptions(ranks="3", strategy=EXAMPLE)).points
    assert there.bytes_sent == own.points[0].bytes_sent


@pytest.mark.usefixtures("examples")
def test_a_strategy_that_does_not_say_what_it_sends(
    train_in_threads: Train, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's strategy without `traffic` is refused in one line that names the method to write: as what is
    to be predicted, and as a source."""
    options = {**BUSY, "train_limit": 480, "epochs": 2}
    _, alone, _ = train_in_threads(config(**options, ranks=1), folder="alone")
    _, own, _ = train_in_threads(config(**options, ranks=2, strategy=EXAMPLE), folder="own")
    monkeypatch.delattr(entry_of(EXAMPLE).strategy, "traffic")
    source = read_source([alone.path])
    for refused in (
        lambda: predict(source, PredictionOptions(ranks="2", strategy=EXAMPLE)),
        lambda: read_source([own.path]),
    ):
        with pytest.raises(ConfigError, match=r"MajorityVote .* write its method traffic\(model, hosts\)"):
            refused()


@pytest.mark.parametrize(
    ("options", "server_steps", "unpacked"),
    [
        ({"strategy": "gradient-server"}, True, 1),
        ({"strategy": "gradient-server", "compress": "int8"}, False, 1),
        ({"strategy": "allreduce", "compress": "int8"}, False, 4),
        ({"strategy": "allreduce", "compress": "fp16"}, False, 1),
        ({"strategy": "allreduce", "compress": "powersgd:1"}, False, 1),
    ],
    ids=lambda its: " ".join(map(str, its.values())) if isinstance(its, dict) else "",
)
def test_who_steps_and_what_is_unpacked(options: dict[str, Any], server_steps: bool, unpacked: int) -> None:
    """Only a server that gets plain gradients steps for all; only payloads that go to all ranks as they are
    are unpacked by each."""
    config = resolve(TrainConfig(ranks=4, **options))
    said = traffic(config, ModelSize(((20, 30), (20,))), [4]).said
    assert (said.server_steps, said.unpacked) == (server_steps, unpacked)


# ---- Points


@pytest.fixture
def source(train_in_threads: Train, config: Make) -> Source:
    """What a short run of one rank tells."""
    _, folder, _ = train_in_threads(config(**BUSY, ranks=1, epochs=2))
    return read_source([folder.path])


def test_what_not_every_epoch_has(train_in_threads: Train, config: Make) -> None:
    """Evaluations and checkpoints are read from the epochs that have one, and shared out among those that
    one is for; that steps were not all alike is said."""
    options = {**BUSY, "ranks": 1, "epochs": 7, "train_limit": 320}
    _, folder, _ = train_in_threads(config(**options, evaluate_every=3, checkpoint_every=3, freeze="1:6"))
    source = read_source([folder.path])
    record = RunFolder(folder.path).read()
    told = {row.epoch: row.evaluation_s or 0.0 for row in record.epochs}
    (compute,) = source.compute
    assert compute.evaluation_s == pytest.approx(sorted(told[epoch] for epoch in (3, 6, 7))[1], rel=0.3)
    assert source.checkpoint_s > 0
    found = predict(source, PredictionOptions(ranks="1"))
    assert found.points[0].parts.evaluation == pytest.approx(compute.evaluation_s / 3)
    assert any("frozen parameters" in remark for remark in found.remarks)


def test_a_turn_of_another_rank(source: Source) -> None:
    """Where ranks share cores each exchange waits for a turn of another one, and nowhere else."""

    def transfer_s(cores: int) -> float:
        wishes = PredictionOptions(ranks="4", strategy="allreduce", threads=1, cores_per_host=cores)
        return predict(source, wishes).points[0].parts.transfer

    rounds = source.samples // (4 * 16)
    assert transfer_s(2) >= transfer_s(4) + rounds * SLICE_S
    assert transfer_s(4) == pytest.approx(transfer_s(8))


def test_ten_thousand_ranks(source: Source) -> None:
    """Whatever strategy, up to 10,000 ranks can be predicted, each number is finite, and shares are
    shares."""
    large = replace(source, samples=50_000)
    for strategy in (
        "parameter-averaging",
        "allreduce",
        "gradient-server",
        "post-local-sgd",
        "two-level",
        "easgd",
        "gossip",
    ):
        found = predict(large, PredictionOptions(ranks="1,2,100,10000", strategy=strategy, network="10gbe"))
        assert [point.ranks for point in found.points] == [1, 2, 100, 10_000]
        for point in found.points:
            assert 0 < point.low_s <= point.epoch_s <= point.high_s < np.inf
            assert 0 <= point.wait_fraction <= 1
            assert point.parts.total == pytest.approx(point.epoch_s)
        assert found.points[0].efficiency == pytest.approx(1)


@pytest.mark.parametrize(("threads", "ranks", "said"), [(1, 4, False), (2, 1, False), (2, 2, True)])
def test_what_is_only_a_lower_bound_is_called_one(
    source: Source, threads: int, ranks: int, said: bool
) -> None:
    """Ranks of several threads that share cores are said to take longer than predicted, and no others."""
    found = predict(
        source, PredictionOptions(ranks=str(ranks), threads=threads, cores_per_host=2, strategy="allreduce")
    )
    assert any("share cores hold each other up" in line for line in found.narrower) == said


def test_what_must_grow_grows(source: Source) -> None:
    """A slower network, more bytes, or a core that is shared never make an epoch shorter."""

    def epoch_s(**wishes: Any) -> float:
        defaults = {"ranks": "8", "strategy": "allreduce", "cores_per_host": 8, "threads": 1}
        return predict(source, PredictionOptions(**defaults | wishes)).points[0].epoch_s

    assert epoch_s(network="1gbe", ranks_per_host=2) > epoch_s(network="100gbe", ranks_per_host=2) > epoch_s()
    assert epoch_s(cores_per_host=2) > epoch_s(cores_per_host=4) > epoch_s()
    assert epoch_s(sync_every=1) > epoch_s(sync_every=8)


def test_the_json(
    source: Source, train_in_threads: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """stdout holds JSON only, with the keys that others read, and the page is one HTML file."""
    page = tmp_path / "page.html"
    words = ["--from", str(tmp_path / "run"), "--ranks", "1,2,4", "--strategy", "allreduce"]
    assert call("predict", *words, "--format", "json", "--output", str(page)) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {
        "ranks",
        "epoch_s",
        "images_per_s",
        "efficiency",
        "wait_fraction",
        "bytes_sent",
        "low_s",
        "high_s",
    }
    assert [point["ranks"] for point in found["points"]] == [1, 2, 4]
    assert all(keys <= point.keys() for point in found["points"])
    assert "<title>" in page.read_text()
    assert call("predict", *words) == 0
    assert "not known: other users' load" in " ".join(capsys.readouterr().out.split())


SEVERAL = [
    {"strategy": "parameter-averaging", "sync_every": 8},
    {"strategy": "gradient-server"},
    {"strategy": "allreduce", "compress": "int8"},
    {"strategy": "easgd"},
    {"strategy": "gossip"},
]


@pytest.mark.parametrize(
    "options",
    effort.daily(SEVERAL, [SEVERAL[0], SEVERAL[3]]),
    ids=lambda options: options["strategy"],
)
def test_runs_of_several_ranks_tell_of_messages(
    options: dict[str, Any], train_in_threads: Train, config: Make
) -> None:
    """From a run of several ranks costs of messages are measured, not assumed, and its own strategy, batch
    and samples are what is predicted unless something else is wished for."""
    record, folder, _ = train_in_threads(config(**BUSY, ranks=3, epochs=3, **options))
    found = read_source([folder.path])
    assert found.messages.measured
    assert found.messages.local.s_per_byte > 0
    assert found.samples == record.epochs[0].train_samples
    own = predict(found, PredictionOptions(ranks="3"))
    assert str(options["strategy"]) in own.about
    assert "batches of 16" in own.about
    more, most = (
        predict(found, PredictionOptions(ranks="3", samples=times * found.samples)) for times in (10, 100)
    )
    # What an epoch has once, however many samples, weighs less and less.
    assert more.points[0].images_per_s > 0.9 * own.points[0].images_per_s
    assert most.points[0].images_per_s == pytest.approx(more.points[0].images_per_s, rel=0.5)
    assert more.points[0].bytes_sent > 5 * own.points[0].bytes_sent


def test_several_sources(train_in_threads: Train, config: Make) -> None:
    """A second run with another batch tells how steps grow with it; one of another dataset is refused."""
    _, first, _ = train_in_threads(config(**BUSY, ranks=1), folder="first")
    _, second, _ = train_in_threads(config(**BUSY | {"batch_size": 64}, ranks=1, epochs=3), folder="second")
    both = read_source([first.path, second.path])
    means = {its.batch: its.mean_s for its in both.compute}
    _, between = compute_at(both, 1, 40)
    assert between.mean() == pytest.approx((means[16] + means[64]) / 2)
    other_data = config(**BUSY | {"dataset": "synthetic:3000"}, ranks=1, epochs=3)
    _, other, _ = train_in_threads(other_data, folder="other")
    with pytest.raises(UsageError, match="another network or dataset"):
        read_source([first.path, other.path])


@pytest.mark.parametrize(
    "strategy",
    effort.daily(["allreduce", "local-sgd", "post-local-sgd", "gradient-server"], ["allreduce", "local-sgd"]),
)
def test_runs_on_shared_cores_tell_how_long_ranks_wait_for_one(
    source: Source, config: Make, strategy: str
) -> None:
    """What each exchange of a run on shared cores took longer than the model says is what others wait on
    shared cores; where each rank has a core nobody does, and no run makes an exchange shorter."""

    def epoch_s(known: Source, ranks: int, cores: int) -> float:
        wishes = PredictionOptions(ranks=str(ranks), strategy=strategy, threads=1, cores_per_host=cores)
        point = predict(known, wishes).points[0]
        return point.epoch_s - point.parts.evaluation - point.parts.checkpoint

    options = config(ranks=5, strategy=strategy, batch_size=16)
    known = replace(source, cores=2)
    without_s = epoch_s(replace(known, crowds=(OversubscribedRun(2.0, options, source.samples, 0.0),)), 5, 2)
    steps = -(-source.samples // (options.workers * 16))
    assert epoch_s(known, 5, 2) > without_s
    longer_s = 0.01 * steps
    told = replace(known, crowds=(OversubscribedRun(2.0, options, source.samples, without_s + longer_s),))
    assert epoch_s(told, 5, 2) == pytest.approx(without_s + longer_s, rel=0.02)
    assert epoch_s(told, 5, 5) == pytest.approx(epoch_s(known, 5, 5))


def test_steps_behind_an_exchange(source: Source) -> None:
    """Where runs tell what an exchange adds to the next step, that is added to each step of ranks that meet
    in each or share cores, to the first one of a round of others, and to no step of a rank that is alone."""
    (alone,) = source.compute
    met = replace(alone, meets=True, steps_s=alone.steps_s + 0.01)
    larger = replace(alone, batch=64, steps_s=4 * alone.steps_s)
    both = replace(source, compute=(alone, met, larger))
    for batch, plain_s in ((16, alone.mean_s), (64, 4 * alone.mean_s), (40, 2.5 * alone.mean_s)):
        assert compute_at(both, 1, batch)[1].mean() == pytest.approx(plain_s)
        assert compute_at(both, 1, batch, meets=True)[1].mean() == pytest.approx(plain_s + 0.01)

    def compute_s(known: Source, **wishes: Any) -> float:
        wishes = {"ranks": "2", "threads": 1, "cores_per_host": 2} | wishes
        return predict(known, PredictionOptions(**wishes)).points[0].parts.compute

    steps = source.samples / 2 / 16
    for every, count in ((1, steps), (8, -(-steps // 8))):
        wishes = {"strategy": "local-sgd", "sync_every": every}
        more_s = compute_s(both, **wishes) - compute_s(replace(both, compute=(alone, larger)), **wishes)
        assert more_s == pytest.approx(0.01 * count, rel=0.05)
    wishes = {"strategy": "local-sgd", "sync_every": 8, "cores_per_host": 1}
    more_s = compute_s(both, **wishes) - compute_s(replace(both, compute=(alone, larger)), **wishes)
    assert more_s == pytest.approx(0.01 * steps, rel=0.05)
    assert compute_s(both, ranks="1") == pytest.approx(compute_s(source, ranks="1"))


def test_ranges_of_ranks() -> None:
    """Lists and ranges can be mixed, and a long range is told by a few numbers with both ends among them."""
    assert read_ranks("1-4,8", 100) == [1, 2, 3, 4, 8]
    long = read_ranks("1-10000", 50_000)
    assert (long[0], long[-1]) == (1, 10_000)
    assert len(long) <= 64


# ---- Bad input


def test_bad_wishes(source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PredictionOptions that do not fit end with code 2 and one line that says what was given and what is
    expected."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "slow.toml").write_text("latency_us = 5\n")
    (tmp_path / "odd.toml").write_text("latency_us = 5\nbandwidth_gbit_s = 0\n")
    (tmp_path / "empty.json").write_text('{"links": []}')
    (tmp_path / "more.toml").write_text("latency_us = 5\nbandwidth_gbit_s = 1\nlatency = 3\n")
    run = ["--from", str(tmp_path / "run")]
    for words, expected in (
        ([*run, "--ranks", "0"], "--ranks 0"),
        ([*run, "--ranks", "4-2"], "--ranks 4-2"),
        ([*run, "--ranks", "many"], "1,2,4"),
        ([*run, "--ranks", "2000"], "640 samples"),
        ([*run, "--strategy", "alreduce"], "allreduce"),
        ([*run, "--strategy", "ddp"], "ddp"),
        ([*run, "--strategy", "allreduce", "--topology", "master"], "--topology"),
        ([*run, "--compress", "zip"], "--compress"),
        ([*run, "--batch-size", "0"], "--batch-size"),
        ([*run, "--network", "2gbe"], "10gbe"),
        ([*run, "--network", str(tmp_path / "slow.toml")], "missing bandwidth_gbit_s"),
        ([*run, "--network", str(tmp_path / "odd.toml")], "above 0"),
        ([*run, "--network", str(tmp_path / "more.toml")], "latency_us"),
        ([*run, "--network", str(tmp_path / "none.toml")], "cannot read"),
        ([*run, "--network", str(tmp_path / "empty.json")], "doctor --hosts"),
        ([*run, "--network", str(tmp_path / "none.json")], "cannot read"),
        ([*run, "--ranks-per-host", "2"], "--network"),
        ([*run, "--dataset", "digits"], "--measure"),
        (["--from", str(tmp_path / "empty")], "record.json"),
        ([], "--from"),
    ):
        assert call("predict", *words) == 2, words
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        assert expected in shown.err, shown.err


def test_runs_that_tell_too_little(
    train_in_threads: Train, config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that is too short, still runs, or has no checkpoint is refused in one line that says so."""
    record, folder, _ = train_in_threads(config(epochs=1, train_limit=100), folder="short")
    assert call("predict", "--from", str(folder.path)) == 2
    assert "too short" in capsys.readouterr().err
    folder.write(record.model_copy(update={"outcome": "running"}))
    assert call("predict", "--from", str(folder.path)) == 2
    assert "is running" in capsys.readouterr().err


def test_a_network_file(tmp_path: Path) -> None:
    """A network file says latency in us, bandwidth in Gbit/s, and may say how fast hosts add up."""
    path = tmp_path / "lan.toml"
    path.write_text("latency_us = 50\nbandwidth_gbit_s = 8\nreduce_gb_s = 4\n")
    found = read_network(str(path))
    assert found.link.latency_s == pytest.approx(50e-6)
    assert found.link.s_per_byte == pytest.approx(1e-9)
    assert found.reduce_s_per_byte == pytest.approx(0.25e-9)


def test_a_network_that_was_measured(tmp_path: Path) -> None:
    """What `rankwise doctor --hosts` printed serves as a network file: the slowest of its links counts.
    Messages of sizes that were measured take as long as then, those between them what lies between, larger
    ones by the bandwidth."""
    messages = [
        {"bytes": 10_000, "one_way_s": 1e-4, "both_ways_s": 2e-4},
        {"bytes": 20_000, "one_way_s": 3e-4, "both_ways_s": 3e-4},
    ]
    links = [
        {"latency_s": 2e-5, "bytes_per_s": 1e9, "both_bytes_per_s": 9e8, "messages": []},
        {"latency_s": 5e-5, "bytes_per_s": 5e8, "both_bytes_per_s": 4e8, "messages": messages},
    ]
    path = tmp_path / "hosts.json"
    path.write_text(json.dumps({"links": links}))
    found = read_network(str(path))
    assert (found.name, found.reduce_s_per_byte) == ("hosts", None)
    assert found.link.latency_s == pytest.approx(5e-5)
    for size, one_way_s, both_ways_s in (
        (0, 5e-5, 5e-5),
        (5_000, 7.5e-5, 12.5e-5),
        (10_000, 1e-4, 2e-4),
        (15_000, 2e-4, 2.5e-4),
        (1e6, 5e-5 + 1e6 / 5e8, 5e-5 + 1e6 / 4e8),
    ):
        assert found.link.message_s(size, one_way=True) == pytest.approx(one_way_s)
        assert found.link.message_s(size, one_way=False) == pytest.approx(both_ways_s)
    behind = found.link.behind(Link(1.0, 1e-7))
    assert behind.message_s(10_000, one_way=True) == pytest.approx(1 + 1e-3)
    assert behind.message_s(10_000, one_way=False) == pytest.approx(1 + 1e-3)
    fan = Cluster(4, 1, 1, LINK, LINK, found.link, 0.0).seconds(collectives.gather(4, 10_000))
    assert fan == pytest.approx(2 * 5e-5 + 3 * (1e-4 - 5e-5))
    for damaged in (
        {"messages": [{"bytes": 1}]},
        {"latency_s": -1},
        {"bytes_per_s": 0},
        {"messages": "many"},
    ):
        path.write_text(json.dumps({"links": [links[1] | damaged]}))
        with pytest.raises(ConfigError, match="holds no links"):
            read_network(str(path))


def test_only_messages_that_pass_each_other_go_at_the_speed_of_both_ways() -> None:
    """Sums in pairs and circles pay the bandwidth that is left while both sides send; gathers, broadcasts and
    trees the whole one. Between hosts the slower of network and software counts, either way."""
    link = Link(0.0, 1e-9, 3e-9)
    plain = Cluster(8, 1, 1, LINK, LINK, Link(0.0, 1e-9), 0.0)
    slow = Cluster(8, 1, 1, LINK, LINK, link, 0.0)
    for hops, times in (
        (collectives.ring(8, 8000), 3),
        (collectives.allreduce(8, 10**6), 3),
        (collectives.allgather(8, 10**6), 3),
        (collectives.gather(8, 10**6), 1),
        (collectives.broadcast(8, 10**6), 1),
        (collectives.background_allreduce(8, 10**6), 1),
    ):
        assert slow.seconds(hops) == pytest.approx(times * plain.seconds(hops))
    assert link.behind(Link(1.0, 2e-9)) == Link(1.0, 2e-9, 3e-9)


@pytest.mark.mpi
@pytest.mark.timeout(240)
def test_a_run_predicts_itself(command: Command) -> None:
    """What a real run of two ranks tells predicts its own epochs in the right order of magnitude."""
    words = [
        "--dataset",
        "digits",
        "--model",
        "mlp",
        "--epochs",
        "2",
        "--lr",
        "0.02",
        "--ranks",
        "2",
        "--threads",
        "1",
    ]
    done = command.rankwise("train", *words, "--strategy", "allreduce", "--out", "run", "--format", "json")
    assert done.code == 0, done
    epoch_s = float(np.median([row["wall_s"] for row in done.json["epochs"]]))
    found = command.rankwise("predict", "--from", "run", "--ranks", "2", "--format", "json")
    assert found.code == 0, found
    assert epoch_s / 5 < found.json["points"][0]["epoch_s"] < 5 * epoch_s


@pytest.mark.mpi
@pytest.mark.timeout(240)
def test_measuring(command: Command) -> None:
    """Without a run, --measure makes short ones, leaves nothing behind, and predicts the options of train
    that it was given."""
    words = [
        "--dataset",
        "digits",
        "--model",
        "mlp",
        "--batch-size",
        "32",
        "--ranks",
        "1,2,50",
        "--threads",
        "1",
    ]
    found = command.rankwise("predict", "--measure", *words, "--format", "json")
    assert found.code == 0, found
    assert found.json["about"] == "mlp on digits, parameter-averaging, master, batches of 32"
    assert [point["ranks"] for point in found.json["points"]] == [1, 2, 50]
    assert command(sys.executable, "-c", "import os; print(os.listdir())").out.strip() == "[]"
