"""What every strategy must do, whatever its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.errors import DivergedError
from rankwise.models.replica import Replica
from rankwise.plan import resolve
from rankwise.strategies import STRATEGIES
from rankwise.training import synchroniser
from rankwise.training.build import make_sampler
from rankwise.training.snapshots import Progress
from rankwise.training.synchroniser import Synchroniser

from .. import effort
from .loops import BATCH, LABELS, SAMPLES, gradients, make, train_all, weights_of

COMPRESSIONS = ["fp16", "bf16", "int8", "topk:0.1", "sign", "powersgd:2"]
NAMES = [name for name in STRATEGIES if name not in ("single", "ddp")]
"""ddp needs processes, and is tested under mpiexec."""

CAREFUL = [name for name in NAMES if name != "paper-stopwatch"]
"""The paper's own exchange sends whatever there is."""

COMPRESSING = [name for name in NAMES if STRATEGIES[name].takes("compress")]


def few(name: str) -> int:
    """The smallest number of ranks that a strategy takes."""
    needs_two = name == "gossip" or STRATEGIES[name].topologies[:1] == ("master",)
    return 2 if needs_two else 1


TEAMS = [(name, ranks) for name in NAMES for ranks in (1, 2, 3, 5) if ranks >= few(name)]


@pytest.mark.parametrize(("name", "ranks", "samples"), effort.rotating(TEAMS, [5, 16, 49, SAMPLES]))
def test_each_sample_is_committed_once(name: str, ranks: int, samples: int) -> None:
    """With any number of ranks and samples, ragged shards and ranks that run out of batches included, all
    come to the end, and each sample is committed once an epoch."""
    results = train_all(ranks, 3, strategy=name, samples=samples)
    workers = ranks - (resolve(TrainConfig(ranks=ranks, strategy=name)).topology == "master")
    copies = workers if STRATEGIES[name].replicates else 1
    states = [result.ranks.state for result in results]
    assert sum(state.committed for state in states) == 3 * samples * copies
    assert all(state.pending == 0 for state in states)


@pytest.mark.parametrize(
    ("name", "compress"),
    [*((name, None) for name in CAREFUL), *effort.rotating(COMPRESSING, COMPRESSIONS, daily_each=3)],
)
def test_what_is_no_number_is_told_and_stays_where_it_is(name: str, compress: str | None) -> None:
    """A gradient that is no number ends the run with epoch and step, however it is sent, and the other ranks'
    weights are numbers still."""
    options = {"strategy": name} if compress is None else {"strategy": name, "compress": compress}
    models = [make() for _ in range(3)]

    def program(world: World) -> None:
        model, optimizer = models[world.rank]
        ranks = synchronise(model, optimizer, world, samples=SAMPLES, batch_size=BATCH, epochs=2, **options)
        for epoch in (1, 2):
            for batch in ranks.batches(epoch):
                gradients(ranks.model, optimizer, batch.indices)
                if world.rank == 2 and batch.step == 3:
                    model[0].weight.grad[1] = np.nan
                ranks.step()

    with pytest.raises(DivergedError, match=r"not finite in epoch 1, step \d+"):
        run_in_threads(3, program)
    assert all(np.isfinite(weights_of(model)).all() for model, _ in models[:2])


@pytest.mark.parametrize(("name", "every"), effort.rotating(NAMES, [1, 3]))
def test_logs_are_compared_every_so_many_rounds(
    monkeypatch: pytest.MonkeyPatch, name: str, every: int
) -> None:
    """So that no log grows with the run, on each rank after the same rounds of each epoch."""
    monkeypatch.setattr(synchroniser, "RECONCILE_ROUNDS", every)
    settled: list[tuple[int, int, int]] = []

    def program(world: World) -> list[tuple[int, int]]:
        def reconcile() -> None:
            settled.append((world.rank, ranks.progress.epoch, ranks.progress.rounds))

        world.reconcile = reconcile
        model, optimizer = make()
        ranks = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=4, epochs=2, strategy=name, **options
        )
        rounds = []
        for epoch in (1, 2):
            for batch in ranks.batches(epoch):
                gradients(ranks.model, optimizer, batch.indices)
                ranks.step()
            rounds += [(epoch, number) for number in range(1, len(ranks.sampler.rounds(epoch)) + 1)]
        return rounds

    options = {"sync_every": 2} if STRATEGIES[name].takes("sync_every") else {}
    for rank, rounds in enumerate(run_in_threads(3, program)):
        due = [(epoch, number) for epoch, number in rounds if number % every == 0]
        assert [(epoch, number) for its, epoch, number in settled if its == rank] == due
        assert due or every > 1


@pytest.mark.parametrize("name", NAMES)
def test_uneven_shards_end_together(name: str) -> None:
    """A worker with one sample and one with hundreds take part in the same number of rounds."""

    def program(world: World) -> int:
        config = resolve(
            TrainConfig(ranks=world.size, strategy=name, shards="dirichlet:0.05", batch_size=4, epochs=2)
        )
        model, optimizer = make()
        labels = LABELS.numpy()
        sampler = make_sampler(config, np.arange(SAMPLES), labels, world.rank)
        replica = Replica(model, optimizer)
        ranks = Synchroniser(replica, STRATEGIES[name].build(config), sampler, world)
        for epoch in (1, 2):
            for batch in ranks.batches(epoch):
                gradients(model, optimizer, batch.indices)
                ranks.step()
        return ranks.state.committed

    config = resolve(TrainConfig(ranks=4, strategy=name))
    copies = config.workers if STRATEGIES[name].replicates else 1
    assert sum(run_in_threads(4, program)) == 2 * SAMPLES * copies


@pytest.mark.parametrize("name", NAMES)
def test_one_step_can_be_undone(name: str) -> None:
    """After `undo` weights, buffers, optimiser and state are those before the last commit, to the bit, and
    what was trained for it has not been brought in."""

    def program(world: World) -> None:
        config = resolve(TrainConfig(ranks=world.size, strategy=name, sync_every=1, batch_size=BATCH))
        model, _ = make()
        model.add_module("norm", nn.BatchNorm1d(3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        replica = Replica(model, optimizer)
        sampler = make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank)
        ranks = Synchroniser(replica, STRATEGIES[name].build(config), sampler, world, survives=True)
        seen = []
        original = ranks._strategy.prepare

        def prepare(state: Any, *rest: Any) -> Any:
            seen.append((state, {k: v.clone() for k, v in model.state_dict().items()},
                         {k: v.clone() for k, v in replica.optimizer_state().items()}))  # fmt: skip
            return original(state, *rest)

        object.__setattr__(ranks._strategy, "prepare", prepare)
        # An epoch's end is a commit too; what is to be taken back here is the round before it.
        ranks._commits.close = lambda _: setattr(
            ranks._work, "progress", replace(ranks.progress, closed=True)
        )
        for batch in ranks.batches(1):
            gradients(model, optimizer, batch.indices)
            ranks.step()
        before = ranks.trained()
        ranks.undo()
        assert ranks.progress == Progress(1, len(sampler.rounds(1)) - 1, closed=False)
        last = sampler.rounds(1)[-1].parts[world.rank]
        assert np.array_equal(ranks.trained(), before[: len(before) - len(last)])
        assert np.array_equal(np.concatenate(ranks._work.under_way), last)
        state, weights, momentum = seen[-1]
        assert ranks.state is state
        for key, value in model.state_dict().items():
            assert torch.equal(value, weights[key]), key
        for key, value in replica.optimizer_state().items():
            assert torch.equal(value, momentum[key]), key
        with pytest.raises(RuntimeError, match="no step to undo"):
            ranks.undo()

    run_in_threads(3, program)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_of_an_epoch_can_be_undone(name: str) -> None:
    """`undo` takes back the end of an epoch alone: all rounds are committed still, with what was trained."""

    def program(world: World) -> None:
        config = resolve(TrainConfig(ranks=world.size, strategy=name, batch_size=BATCH))
        model, optimizer = make()
        sampler = make_sampler(config, np.arange(SAMPLES), np.zeros(SAMPLES, np.int64), world.rank)
        build = STRATEGIES[name].build(config)
        ranks = Synchroniser(Replica(model, optimizer), build, sampler, world, survives=True)
        for batch in ranks.batches(1):
            gradients(model, optimizer, batch.indices)
            ranks.step()
        before = ranks.trained()
        ranks.undo()
        assert ranks.progress == Progress(1, len(sampler.rounds(1)), closed=False)
        assert np.array_equal(ranks.trained(), before)
        assert not ranks._work.under_way

    assert run_in_threads(3, program) == [None] * 3


@pytest.mark.parametrize(("name", "compress"), effort.rotating(COMPRESSING, COMPRESSIONS, daily_each=2))
def test_compression_keeps_ranks_alike(name: str, compress: str) -> None:
    """With any compression all ranks end with the same bits, and the record has sizes and their ratio."""
    results = train_all(3, 2, strategy=name, compress=compress)
    for result in results[1:]:
        assert np.array_equal(result.weights, results[0].weights)
    senders = results[:1] if name == "two-level" else results[-1:]  # of a host, its leader
    measured = senders[0].ranks.state.measured
    assert measured["compression_ratio"] == pytest.approx(
        measured["uncompressed_bytes"] / measured["compressed_bytes"]
    )
    assert measured["compression_ratio"] > (1.2 if compress != "powersgd:2" else 0.9)


@pytest.mark.parametrize("compress", ["topk:1", "powersgd:8"])
@pytest.mark.parametrize("name", ["allreduce", "gradient-server", "local-sgd", "parameter-averaging"])
def test_nothing_left_out_changes_nothing(name: str, compress: str) -> None:
    """All values kept, or full rank, give what float32 gives."""
    plain = train_all(3, 3, strategy=name)
    full = train_all(3, 3, strategy=name, compress=compress)
    assert np.allclose(plain[0].weights, full[0].weights, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_ledger_closes(name: str) -> None:
    """Phases add up to the wall time and waiting to whom it was for, on every rank."""
    for result in train_all(3, 2, strategy=name):
        world = result.ranks.world
        totals = world.ledger.close()
        assert sum(totals.phases_ns.values()) == totals.wall_ns
        assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]


def test_learning_rates_follow_the_schedule() -> None:
    """A user's optimiser gets the rates of the schedule, scaled, on every rank, group by group."""

    def program(world: World) -> list[list[float]]:
        model, _ = make()
        groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        ranks = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=BATCH, strategy="allreduce",
            epochs=4, schedule="step", lr_scaling="linear", warmup=1,
        )  # fmt: skip
        rates = []
        for epoch in range(1, 5):
            for batch in ranks.batches(epoch):
                gradients(model, optimizer, batch.indices)
                ranks.step()
                rates.append([group["lr"] for group in optimizer.param_groups])
        return rates

    first, second = run_in_threads(2, program)
    assert first == second
    rates = np.array(first)
    assert np.allclose(rates[:, 0], 10 * rates[:, 1])
    steps = len(rates) // 4
    assert np.all(np.diff(rates[:steps, 0]) > 0)
    assert np.allclose(rates[steps : 2 * steps, 0], 0.2)
    assert np.allclose(rates[2 * steps : 3 * steps, 0], 0.02)
    assert np.allclose(rates[3 * steps :, 0], 0.002)
