"""Training that loses ranks: nothing is lost with them, and nothing is trained twice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from rankwise.comm import World
from rankwise.comm.threads import Killed, run_in_threads
from rankwise.config import TrainConfig
from rankwise.errors import DivergedError, RankLost
from rankwise.ledger.phases import Ledger
from rankwise.models.replica import Replica
from rankwise.plan import resolve
from rankwise.runs.record import Record
from rankwise.strategies import entry_of
from rankwise.strategies.base import State
from rankwise.training import recovery, synchroniser
from rankwise.training.admission import stand_by
from rankwise.training.build import make_sampler
from rankwise.training.observer import NoObserver, Recovered
from rankwise.training.snapshots import Progress, Snapshots, Work
from rankwise.training.synchroniser import Synchroniser

from . import digits, effort
from .strategies.loops import BATCH, SAMPLES, gradients, make, weights_of

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, Any, Any]]

SYNCHRONOUS = [
    ("parameter-averaging", "master"),
    ("parameter-averaging", "allreduce"),
    ("local-sgd", "allreduce"),
    ("local-sgd", "master"),
    ("allreduce", "allreduce"),
    ("gradient-server", "master"),
    ("slowmo", "allreduce"),
    ("diloco", "master"),
    ("replication", "allreduce"),
]


OUT_OF_STEP = [
    ("gossip", "ring"),
    ("gossip", "exponential"),
    ("gossip", "complete"),
    ("easgd", "master"),
    ("downpour", "master"),
]


@pytest.fixture(autouse=True)
def _logs_are_compared_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that ranks are lost, and come in, between and in these exchanges too."""
    monkeypatch.setattr(synchroniser, "RECONCILE_ROUNDS", 2)


@pytest.mark.parametrize(
    ("strategy", "topology", "lost", "call"),
    effort.rotating(SYNCHRONOUS + OUT_OF_STEP, [0, 1, 2], [63, 101], one_in=2),
)
def test_a_rank_is_lost_and_no_sample(
    config: Make, train_in_threads: Train, strategy: str, topology: str, lost: int, call: int
) -> None:
    """Whichever rank is killed, and whenever, the others finish the run: each sample trains once an epoch,
    the fault and the dead rank stand in the record, and every ledger closes."""
    options = {
        "strategy": strategy,
        "topology": topology,
        "train_limit": 200,
        "val_limit": 50,
        "model": "mlp",
    }
    record, _, _ = train_in_threads(
        config(ranks=3, epochs=3, batch_size=16, on_failure="continue", **options), kill_at={lost: call}
    )
    assert record.outcome == "completed"
    assert [row.epoch for row in record.epochs] == [1, 2, 3]
    assert record.samples.trained == record.samples.expected
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    assert [row.rank for row in record.ranks] == [0, 1, 2]
    for row in record.ranks:
        assert sum(row.phases_ns.values()) == row.wall_ns
        assert (row.died_at_s is not None) == (row.rank in {fault.rank for fault in record.faults})


@effort.only_in_full
@pytest.mark.parametrize(
    "strategy",
    effort.daily(["parameter-averaging", "allreduce", "local-sgd", "slowmo"], ["parameter-averaging"]),
)
def test_a_loss_costs_no_accuracy(config: Make, train_in_threads: Train, strategy: str) -> None:
    """A run that loses two of its four ranks ends within a point of one that loses none."""
    options = {"ranks": 4, "epochs": 15, "strategy": strategy, "topology": "allreduce", "batch_size": 16}
    options |= {"schedule": "cosine", "on_failure": "continue", "lr": 0.05}
    options |= {"dataset": digits.DATASET, "model": digits.MODEL}
    kills = ["kill:rank=0,epoch=5", "kill:rank=2,epoch=9,phase=exchange"]
    whole, _, _ = train_in_threads(config(**options), folder="whole")
    struck, _, _ = train_in_threads(config(**options, fault=kills), folder="struck")
    assert len(struck.faults) == 2
    assert whole.epochs[-1].val_accuracy > 0.9
    assert struck.epochs[-1].val_accuracy > whole.epochs[-1].val_accuracy - 0.01


def loop(
    world: World,
    options: dict[str, Any],
    *,
    spares: int = 0,
    epochs: int = 3,
    step: Callable[[Any, Any, np.ndarray], None] = gradients,
    made: Callable[[], tuple[Any, Any]] = make,
) -> tuple[Any, list[Any]] | None:
    """A plain loop with what was `made`, whose batches `step` gives gradients; returns the weights, and how
    often each sample was trained in each epoch that this rank saw the end of, or None for a spare that was
    not needed."""
    ranks = world.size - spares
    world.set_aside(ranks)
    join_state = None
    if world.rank < 0:
        join_state = stand_by(world)
        if join_state is None:
            return None
    config = resolve(TrainConfig(ranks=ranks, batch_size=BATCH, epochs=epochs, **options))
    model, optimizer = made()
    synchroniser = Synchroniser(
        Replica(model, optimizer),
        entry_of(config.strategy).build(config),
        make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank),
        world,
        survives=True,
        spares=spares,
        join_state=join_state,
    )
    counts = []
    for epoch in range(join_state.progress.epoch if join_state else 1, epochs + 1):

        def train(epoch: int = epoch) -> Any:
            for batch in synchroniser.batches(epoch):
                step(synchroniser.model, optimizer, batch.indices)
                synchroniser.step()
            trained = np.bincount(synchroniser.trained(), minlength=SAMPLES)
            world.allreduce(trained)
            return trained

        counts.append(synchroniser.retry_until_all(train))
    return weights_of(model), counts


@pytest.mark.parametrize("size", [2, 3, 4])
@effort.examples(5, 30)
@given(st.data())
def test_what_lost_ranks_brought_in_is_told_once(size: int, data: st.DataObject) -> None:
    """However many are left, one of them tells what a lost one had committed, so that no sample is missing
    and none is counted twice."""
    kill_at = {data.draw(st.integers(0, size - 1)): data.draw(st.integers(15, 40))}
    options = {"strategy": "local-sgd", "sync_every": 1}
    for found in run_in_threads(size, lambda world: loop(world, options), kill_at=kill_at):
        assert found is Killed or all((trained == 1).all() for trained in found[1])


@pytest.mark.parametrize("within", [False, True])
def test_a_loss_is_told_and_then_when_a_round_is_committed_again(within: bool) -> None:
    """A loss within an epoch is over, on each rank, when the next round is committed; before the first epoch
    there is no round to be made again."""

    def program(world: World) -> tuple[list[list[int]], int]:
        model, optimizer = make()
        dies = world.rank == 1
        config = resolve(TrainConfig(ranks=3, batch_size=BATCH, strategy="local-sgd", sync_every=1))
        sampler = make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank)
        strategy = entry_of("local-sgd").build(config)
        losses: list[list[int]] = []
        commits: list[float] = []

        class Notes(NoObserver):
            def recovered(self, event: Recovered) -> None:
                losses.append(event.lost)

            def committed(self, seconds: float) -> None:
                commits.append(seconds)

        together = Synchroniser(
            Replica(model, optimizer), strategy, sampler, world, survives=True, observer=Notes()
        )

        def meet() -> None:
            if dies and not within:
                raise Killed
            world.barrier()

        together.retry_until_all(meet)
        for batch in together.batches(1):
            if dies and batch.step == 2:
                raise Killed
            gradients(model, optimizer, batch.indices)
            together.step()
        assert all(seconds >= 0 for seconds in commits)
        return losses, len(commits)

    results = run_in_threads(3, program)
    assert results == [([[1]], int(within)), Killed, ([[1]], int(within))]


def test_exchanges_that_fail_for_no_reason_end_the_run() -> None:
    """If exchanges fail though no rank is lost, ranks repair their world a few times, and then give up."""
    failed = []

    def program(world: World) -> None:
        def fail(*_: Any) -> None:
            failed.append(world.rank)
            assert len(failed) < 100, "goes on for ever"
            raise RankLost("an exchange failed")

        model, optimizer = make()
        config = resolve(TrainConfig(ranks=2, batch_size=BATCH, strategy="local-sgd"))
        strategy = entry_of("local-sgd").build(config)
        object.__setattr__(strategy, "prepare", fail)
        sampler = make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank)
        together = Synchroniser(Replica(model, optimizer), strategy, sampler, world, survives=True)
        for batch in together.batches(1):
            gradients(model, optimizer, batch.indices)
            together.step()

    with pytest.raises(RankLost, match="again and again"):
        run_in_threads(2, program)
    assert failed.count(0) == failed.count(1) == 1 + recovery.MOST_FRUITLESS


def test_two_commits_are_kept_for_who_comes_in() -> None:
    """Whoever comes in begins with the weights of the commit that the others say, the last or the one before
    it, whatever they are by now; a round that begins again does so with the last."""
    replica = Replica(*make())
    snapshots = Snapshots(replica, Ledger(), begins_again=True, keeps_commits=True)
    start = replica.pack().copy()
    for rounds in range(1, 6):
        replica.unpack(start + rounds)
        snapshots.round_begins(Progress(1, rounds))
        replica.unpack(start - rounds)
        for back in range(min(rounds, 2)):
            snapshots.commit_at(Progress(1, rounds - back)).restore()
            assert np.array_equal(replica.pack(), start + (rounds - back))
        replica.unpack(start - rounds)
        snapshots.commit_at(Progress(2, rounds)).restore()
        assert np.array_equal(replica.pack(), start - rounds)
        snapshots.begin_again()
        assert np.array_equal(replica.pack(), start + rounds)


def test_an_exchange_that_is_not_made_is_not_taken_back() -> None:
    """Only the last one is forgotten: those before, which others may not have come through, can be undone."""
    replica = Replica(*make())
    snapshots = Snapshots(replica, Ledger(), begins_again=False, keeps_commits=False)
    start = replica.pack().copy()
    for rounds in range(3):
        replica.unpack(start + rounds)
        snapshots.exchange_begins(State(pending=10 + rounds), Progress(1, rounds))
    snapshots.exchange_is_off()
    assert snapshots.reached() == [(Progress(1, 0), 10), (Progress(1, 1), 11)]
    for rounds in (1, 0):
        assert snapshots.undo() == (State(pending=10 + rounds), Progress(1, rounds))
        assert np.array_equal(replica.pack(), start + rounds)
    with pytest.raises(RuntimeError, match="no step to undo"):
        snapshots.undo()


@pytest.fixture
def _other_orders() -> Iterator[None]:
    """Threads take turns fifty times as often, so that ranks come in orders in which they seldom do."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 50)
    yield
    sys.setswitchinterval(usual)


@pytest.mark.usefixtures("_other_orders")
def test_a_rank_that_is_ahead_again_and_again() -> None:
    """Three ranks are lost in one round, and one that is left had committed it before the first loss, and
    what it was dealt then before the second: at the third all of it counts, and nobody is dealt it again."""
    lost = {0: 39, 1: 12, 2: 25}
    results = run_in_threads(5, lambda world: loop(world, {"strategy": "gossip"}), kill_at=lost)
    for _, counts in (result for result in results if result is not Killed and result is not None):
        assert all((trained == 1).all() for trained in counts)


def test_what_was_committed_ahead_is_of_the_round_that_is_committed_next() -> None:
    """After a loss a rank may have committed more rounds than all have: with its next commit these and the
    new one are one round, so that it has as many as it has committed."""
    work = Work(State())
    work.open_epoch(1)
    for number in range(4):
        work.under_way = [np.array([number])]
        work.commit()
    work.progress = replace(work.progress, rounds=2)  # as far as all are
    work.under_way = [np.array([4]), np.array([5])]
    work.commit()
    assert [its.tolist() for its in work.trained] == [[0], [1], [2, 3, 4, 5]]
    assert work.progress.rounds == 3


@effort.examples(10, 60)
@given(st.integers(0, 3), st.integers(8, 40))
def test_rounds_are_counted_alike_after_a_loss(lost: int, call: int) -> None:
    """Ranks that gossip are rounds apart when one is lost; those that are left count alike afterwards, since
    by that number they choose whom they send to."""
    config = resolve(TrainConfig(ranks=4, batch_size=8, epochs=1, strategy="gossip", topology="exponential"))

    def program(world: World) -> tuple[int, int]:
        model, optimizer = make()
        sampler = make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank)
        together = Synchroniser(
            Replica(model, optimizer), entry_of("gossip").build(config), sampler, world, survives=True
        )

        def train() -> None:
            for batch in together.batches(1):
                gradients(model, optimizer, batch.indices)
                together.step()

        together.retry_until_all(train)
        return together.state.rounds, together.progress.rounds

    results = run_in_threads(4, program, kill_at={lost: call})
    left = [found for found in results if found is not Killed]
    assert all(rounds == position == left[0][0] > 0 for rounds, position in left)


@pytest.mark.usefixtures("_other_orders")
@pytest.mark.parametrize(
    ("strategy", "shrink"),
    effort.rotating(
        [
            "parameter-averaging",
            "local-sgd",
            "allreduce",
            "gradient-server",
            "slowmo",
            "gossip",
            "easgd",
            "downpour",
        ],
        ["keep-local-batch", "keep-global-batch"],
    ),
)
@effort.examples(4, 60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(2, 5), data=st.data())
def test_ranks_are_lost_at_any_call(strategy: str, shrink: str, size: int, data: st.DataObject) -> None:
    """Whichever ranks are killed, at whichever calls, also inside a recovery: those that are left come to the
    end with the same weights (but for workers of an asynchronous master), and every sample was trained once
    an epoch."""
    dead = data.draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    kill_at = {rank: data.draw(st.integers(6, 90)) for rank in sorted(dead)}
    options = {"strategy": strategy, "on_shrink": shrink}
    if strategy == "parameter-averaging":
        options["sync_every"] = 3
    results = run_in_threads(size, lambda world: loop(world, options), kill_at=kill_at)
    left = [result for result in results if result is not Killed and result is not None]
    assert len(left) >= size - len(dead)
    for weights, counts in left:
        assert strategy in ("easgd", "downpour") or np.array_equal(weights, left[0][0])
        assert all((trained == 1).all() for trained in counts)


@pytest.mark.parametrize(("strategy", "topology", "rank"), effort.rotating(SYNCHRONOUS, [0, 1, 2], one_in=2))
def test_what_is_no_number_is_not_averaged_in(
    config: Make, train_in_threads: Train, strategy: str, topology: str, rank: int
) -> None:
    """A poisoned gradient is found before it reaches the others; its round is trained again, and the run
    ends with all samples and finite losses."""
    options = {"strategy": strategy, "topology": topology, "train_limit": 200, "val_limit": 50}
    made = config(ranks=3, on_failure="continue", fault=[f"nan:rank={rank},epoch=2,step=2"], **options)
    record, _, _ = train_in_threads(made)
    assert record.outcome == "completed"
    assert record.samples.trained == record.samples.expected
    assert all(np.isfinite(row.val_loss) for row in record.epochs)
    trains = record.ranks[rank].role == "worker"
    assert [(fault.rank, fault.kind, fault.action) for fault in record.faults] == [(rank, "nan", "dropped")]
    assert any(row.measured.get("dropped") for row in record.ranks) == trains


@pytest.mark.parametrize("strategy", ["parameter-averaging", "allreduce"])
def test_three_times_no_number_ends_the_run(config: Make, train_in_threads: Train, strategy: str) -> None:
    """A run that diverges is not tried for ever: it ends with the reason."""
    made = config(ranks=3, on_failure="continue", strategy=strategy, lr=1e30, train_limit=200)
    with pytest.raises(DivergedError) as error:
        train_in_threads(made)
    assert "epoch 1" in str(error.value)


@pytest.mark.parametrize(("shrink", "batch"), [("keep-local-batch", 16), ("keep-global-batch", 24)])
def test_batches_after_a_loss(config: Make, shrink: str, batch: int) -> None:
    """What stays when a worker is lost is the batch of each, or that of all together, as was asked for."""
    made = config(ranks=4, topology="master", batch_size=16, on_shrink=shrink, strategy="local-sgd")
    sampler = make_sampler(made, np.arange(960), np.zeros(960, np.int64), 3)
    assert len(next(sampler.batches(1))) == 16
    sampler.redistribute(1, 2, [0, 1, 3], [0, 0, 0])
    assert len(next(sampler.batches(1, 2))) == batch
    assert len(next(sampler.batches(2))) == batch
