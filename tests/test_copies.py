"""What only one rank has, kept by a second one: nothing of it is lost with the first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from rankwise.comm import World
from rankwise.comm.threads import Killed, run_in_threads
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.models.replica import Replica
from rankwise.plan import RunPlan, choose_on_failure, resolve
from rankwise.prediction.traffic import traffic
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.strategies import entry_of
from rankwise.strategies.base import State
from rankwise.strategies.traffic import Messages, ModelSize
from rankwise.training.build import make_sampler
from rankwise.training.copies import Standing, Taker, _partners, meeting_point, takers
from rankwise.training.observer import NoObserver, Recovered
from rankwise.training.recovery import RankRecovery
from rankwise.training.snapshots import Progress
from rankwise.training.synchroniser import Synchroniser

from . import effort
from .strategies.loops import BATCH, SAMPLES, gradients, make, weights_of
from .test_stops import FOLDERS, same

Make = Callable[..., RunPlan]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]

KEEPS = {"topology": "allreduce", "on_failure": "continue", "ranks": 3, "spares": 1, "keep_copies": True}
CASES = [
    ("local-sgd", "none"),
    ("local-sgd", "topk:0.1"),
    ("parameter-averaging", "sign"),
    ("slowmo", "powersgd:2"),
    ("diloco", "none"),
    ("post-local-sgd", "int8"),
    ("allreduce", "topk:0.1"),
    ("allreduce", "powersgd:2"),
]


def plan_of(config: Make, strategy: str, compress: str, **more: Any) -> RunPlan:
    """Of shards that can be dealt anew as they were."""
    sync = {} if strategy == "allreduce" else {"sync_every": 2}
    options = {"strategy": strategy, "compress": compress, "optimizer": "adam", "train_limit": 192, **sync}
    return config(epochs=3, **{**KEEPS, **options, **more})


@pytest.mark.parametrize(("strategy", "compress"), effort.daily(CASES, [CASES[1], CASES[7]]))
@given(call=st.integers(21, 87))  # training has begun
@effort.examples(1, 40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_spare_goes_on_with_what_the_lost_rank_had(
    config: Make, train_in_threads: Train, strategy: str, compress: str, call: int
) -> None:
    """A run whose last rank is killed, whenever that is, and replaced by a spare ends with the bits of one
    that lost none: momenta, and what compression had left out, go on where they were."""
    plan, number = plan_of(config, strategy, compress), next(FOLDERS)
    _, _, whole = train_in_threads(plan, folder=f"whole-{number}")
    record, _, struck = train_in_threads(plan, folder=f"struck-{number}", kill_at={2: call})
    assert [fault.rank for fault in record.faults] == [2]
    assert record.samples.trained == record.samples.expected
    assert same(whole, struck)


def test_without_a_copy_a_spare_goes_on_with_anothers(config: Make, train_in_threads: Train) -> None:
    """What the test above compares does differ if no copies are kept: a spare begins with the momenta of
    another rank, and nothing left out."""
    for compress in ("none", "topk:0.1"):
        plan = plan_of(config, "local-sgd", compress, keep_copies=False)
        _, _, whole = train_in_threads(plan, folder=f"whole-{compress}")
        _, _, struck = train_in_threads(plan, folder=f"struck-{compress}", kill_at={2: 40})
        assert not same(whole, struck)


@pytest.mark.parametrize("strategy", ["local-sgd", "allreduce"])
@given(lost=st.integers(0, 2), call=st.integers(25, 80))
@effort.examples(5, 60)
def test_what_compression_left_out_is_not_lost(strategy: str, lost: int, call: int) -> None:
    """Where no spare comes in, the ranks that are left have together left out what all had at the commit
    from which they go on, that of the lost rank included."""
    sync = {"sync_every": 2} if strategy != "allreduce" else {}
    config = resolve(
        TrainConfig(ranks=3, batch_size=BATCH, epochs=2, strategy=strategy, compress="sign", **sync)
    )
    at_commit: dict[int, dict[Progress, Any]] = {rank: {Progress(): np.float32(0)} for rank in range(3)}
    after: dict[int, tuple[Progress, Any]] = {}
    real = RankRecovery.committed

    def left_out(state: State) -> Any:
        return state.memory.get("residual", np.float32(0))

    def note(self: RankRecovery) -> None:
        at_commit[self._world.number][self._work.progress] = left_out(self._work.state)
        real(self)

    class AfterLoss(NoObserver):
        def __init__(self, world: World) -> None:
            self.world = world
            self.together: Synchroniser | None = None

        def recovered(self, event: Recovered) -> None:
            assert self.together is not None
            after[self.world.number] = event.progress, left_out(self.together.state)

    def program(world: World) -> np.ndarray:
        model, optimizer = make()
        observer = AfterLoss(world)
        observer.together = together = Synchroniser(
            Replica(model, optimizer),
            entry_of(strategy).build(config),
            make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank),
            world,
            survives=True,
            keeps_copies=True,
            observer=observer,
        )

        def train(epoch: int) -> None:
            for batch in together.batches(epoch):
                gradients(together.model, optimizer, batch.indices)
                together.step()

        for epoch in (1, 2):
            together.retry_until_all(partial(train, epoch))
        return weights_of(model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankRecovery, "committed", note)
        results = run_in_threads(3, program, kill_at={lost: call})
    left = [its for its in results if its is not Killed]
    assert all(np.array_equal(its, left[0]) for its in left)
    if len(left) == 3:  # it was through before that call
        return
    (progress,) = {progress for progress, _ in after.values()}
    before = [max(its for its in found if its <= progress) for found in at_commit.values()]
    expected = sum(at_commit[rank][commit] for rank, commit in enumerate(before))
    np.testing.assert_allclose(sum(its for _, its in after.values()), expected, rtol=0, atol=1e-6)


AT = [Progress(1, rounds, closed=False) for rounds in range(4)]


def test_ranks_go_back_to_where_a_copy_is() -> None:
    """If a rank was lost before it had sent its last copy, all go on from the commit before, as long as
    they can; a copy goes to the first newcomer, or where there is none to the rank that keeps it."""
    members = [0, 1, 2]
    mine = Standing([(AT[2], 8), (AT[3], 0)], members, {1: [AT[1], AT[2]]})
    other = Standing([(AT[2], 8), (AT[3], 4)], members, {})
    assert meeting_point([mine, other], [0, 2]) == AT[2]
    assert meeting_point([mine, Standing([(AT[3], 4)], members, {})], [0, 2]) == AT[3]
    # One that never sent any has nothing of its own yet at the commit before its first.
    assert meeting_point([replace(mine, held={}), other], [0, 2]) == AT[2]
    assert meeting_point([replace(its, held=None) for its in (mine, other)], [0, 2]) == AT[3]
    assert meeting_point([mine, other], [0, 1, 2]) == AT[3]
    assert takers([mine, other], [0, 2], AT[2]) == [Taker(1, 0, None)]
    assert takers([mine, other, None], [0, 2, 3], AT[2]) == [Taker(1, 0, 2)]
    assert takers([mine, other, None], [0, 2, 3], AT[3]) == []
    # As an epoch begins, the last copy is of the epoch before, of whichever rank keeps the newer one.
    newer = Standing([(AT[3], 0)], members, {1: [AT[2], AT[3]]})
    assert takers([mine, newer], [0, 2], Progress(2, 0, closed=False)) == [Taker(1, 1, None)]
    assert takers([mine, newer], [0, 2], Progress(1, 3)) == [Taker(1, 1, None)]


@pytest.mark.parametrize("hosts", [[0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 2, 1, 2], [0, 0, 1], [0, 1]])
def test_a_copy_is_on_another_host(hosts: list[int]) -> None:
    """Each rank gives its copy to one rank and keeps that of one, on another host unless one host has more
    ranks than all others together."""
    pairs = run_in_threads(len(hosts), _partners, hosts=hosts)
    assert sorted(to for to, _ in pairs) == sorted(source for _, source in pairs) == [*range(len(hosts))]
    assert all(pairs[to][1] == rank != to for rank, (to, _) in enumerate(pairs))
    if 2 * max(map(hosts.count, hosts)) <= len(hosts):
        assert all(hosts[to] != hosts[rank] for rank, (to, _) in enumerate(pairs))


def test_what_a_copy_costs_is_told(config: Make, train_in_threads: Train) -> None:
    """The bytes that a rank has sent stand in the record, nearly as many as are predicted, and in its
    traffic; without copies there are none."""
    kept, _, _ = train_in_threads(plan_of(config, "local-sgd", "topk:0.1"), folder="kept")
    plain, _, _ = train_in_threads(
        plan_of(config, "local-sgd", "topk:0.1", keep_copies=False), folder="plain"
    )
    for row, without in zip(kept.ranks[:3], plain.ranks, strict=False):
        assert row.measured["copy_bytes"] > 0 == without.measured.get("copy_bytes", 0)
        assert row.bytes_sent - without.bytes_sent >= row.measured["copy_bytes"]
    size = ModelSize(((100, 10), (10,)))
    plan = config(strategy="local-sgd", compress="topk:0.1", optimizer="adam", **KEEPS)
    predicted = traffic(plan, size, [3])
    assert predicted.said.each_round[-1] == Messages("neighbours", 4 * 3 * 1010, count=1)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"topology": "master"}, "not with --strategy local-sgd --topology master: take"),
        ({"topology": None, "strategy": "easgd"}, "not with --strategy easgd --topology master: take"),
        ({"topology": None, "strategy": "gossip"}, "not with --strategy gossip --topology ring: take"),
        ({"strategy": "allreduce"}, "no rank has anything of its own"),
        ({"spares": 0}, "no rank has anything of its own"),
        ({"optimizer_state": "average"}, "no rank has anything of its own"),
        ({"on_failure": "stop", "spares": 0}, "it is for --on-failure continue"),
        ({"strategy": "ddp", "on_failure": "restart", "spares": 0}, "it is for --on-failure continue"),
        ({"strategy": None, "topology": None, "ranks": 1, "spares": 0, "on_failure": "stop"}, "2 ranks"),
    ],
)
def test_where_there_is_nothing_to_keep(options: dict[str, Any], line: str) -> None:
    """Copies are refused, in one line, where a strategy cannot or no rank has anything of its own."""
    config = TrainConfig(**{"strategy": "local-sgd", **KEEPS, **options})
    with pytest.raises(ConfigError, match=f"--keep-copies was given, but .*{line}"):
        choose_on_failure(resolve(config), config.on_failure, lambda: True)
