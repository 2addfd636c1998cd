"""Whole runs on ranks that are threads: what is trained, recorded, saved and resumed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from rankwise import strategies
from rankwise.comm import World, run_in_threads
from rankwise.config import TrainConfig
from rankwise.data.dataset import Split
from rankwise.errors import ConfigError, DivergedError, Interrupted, ResumeError, StorageError
from rankwise.ledger.phases import RECORDED
from rankwise.runs import checkpoint
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.training import loop
from rankwise.training.agreement import require_same_options
from rankwise.training.counting import count_samples
from rankwise.training.history import SampleCounts
from rankwise.training.rank import run

from . import effort, tiny
from .conftest import stopped

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]]

TEAMS = [
    {"ranks": 1},
    {"ranks": 3, "topology": "master"},
    {"ranks": 3, "topology": "allreduce"},
    {"ranks": 5, "topology": "master", "shards": "dirichlet:0.3"},
    {"ranks": 4, "topology": "allreduce", "shards": "fixed", "sync_every": 4},
    {"ranks": 3, "strategy": "replication"},
]


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights have the same bits."""
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def results(record: Record) -> list[tuple[Any, ...]]:
    """What an epoch came to, without its times."""
    return [
        (e.epoch, e.train_loss, e.val_loss, e.val_accuracy, e.train_samples, e.steps) for e in record.epochs
    ]


@pytest.mark.parametrize("team", TEAMS, ids=str)
def test_a_record_tells_the_run(config: Make, train_in_threads: Train, team: dict[str, Any]) -> None:
    """Any team trains every sample once an epoch (replication once a worker), and the record says so: all
    keys, closed ledgers, as many epochs in record and metrics."""
    record, folder, _ = train_in_threads(config(**team))
    workers = record.config["ranks"] - (record.config["topology"] == "master")
    copies = workers if team.get("strategy") == "replication" else 1
    assert record.outcome == "completed"
    assert record.samples.model_dump() == {
        "expected": 2 * tiny.TRAIN * copies,
        "trained": 2 * tiny.TRAIN * copies,
        "duplicated": 0,
        "lost": 0,
    }
    assert [row.role for row in record.ranks].count("worker") == workers
    for row in record.ranks:
        assert set(row.phases_ns) == set(RECORDED)
        assert row.phases_ns["compute"] == 0  # of a program that trains in no loop that is known
        assert sum(row.phases_ns.values()) == row.wall_ns
        assert sum(row.wait_on_ns.values()) == row.phases_ns["wait"]
        assert str(row.rank) not in row.wait_on_ns
    stored = json.loads(folder.record.read_bytes())
    assert set(stored) == set(Record.model_fields)
    assert set(stored["config"]) == set(TrainConfig.model_fields)
    assert RunFolder(folder.path).read() == record
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert lines == stored["epochs"]
    assert not folder.progress.exists()


def test_identical_seeds_give_identical_bits(config: Make, train_in_threads: Train) -> None:
    """The same options and seed give the same weights and losses to the bit; another seed does not."""
    options = {"ranks": 3, "flip": "random", "translate": 2, "dataset": "digits", "model": "paper-cnn"}
    options |= {"train_limit": 200, "val_limit": 50}
    one = train_in_threads(config(**options), folder="one")
    two = train_in_threads(config(**options), folder="two")
    other = train_in_threads(config(**options, seed=1), folder="other")
    assert same(one[2], two[2])
    assert results(one[0]) == results(two[0])
    assert not same(one[2], other[2])


def test_one_worker_trains_as_single(config: Make, train_in_threads: Train) -> None:
    """A run of a master with one worker ends with the bits of a run of one rank."""
    alone = train_in_threads(config(flip="random"), folder="alone")
    pair = train_in_threads(config(flip="random", ranks=2, topology="master"), folder="pair")
    assert same(alone[2], pair[2])
    assert [r[:2] + r[3:] for r in results(alone[0])] == [r[:2] + r[3:] for r in results(pair[0])]


def test_master_and_allreduce_agree(config: Make, train_in_threads: Train) -> None:
    """Two workers under a master, and two that average among themselves, do the same but for rounding."""
    master = train_in_threads(config(ranks=3, topology="master"), folder="master")
    peers = train_in_threads(config(ranks=2, topology="allreduce"), folder="peers")
    for name, value in master[2].items():
        assert torch.allclose(value, peers[2][name], atol=1e-4), name


def test_train_loss_is_the_mean_over_samples(config: Make, train_in_threads: Train) -> None:
    """Before anything is learnt, the loss of 10 classes is near log 10, however many ranks or tensors."""
    for ranks in (1, 4):
        record, _, _ = train_in_threads(config(ranks=ranks, epochs=1, lr=1e-9), folder=f"run-{ranks}")
        assert record.epochs[0].train_loss == pytest.approx(np.log(10), abs=0.1)


def test_evaluation_is_split_without_loss(config: Make, train_in_threads: Train) -> None:
    """Evaluation split over 5 ranks gives what one rank finds on the same weights."""
    options = {"epochs": 1, "lr": 1e-9, "val_limit": 123}
    one = train_in_threads(config(**options), folder="one")[0].epochs[0]
    five = train_in_threads(config(ranks=5, topology="allreduce", **options), folder="five")[0].epochs[0]
    assert one.val_accuracy == five.val_accuracy
    assert one.val_loss == pytest.approx(five.val_loss, rel=1e-6)


@pytest.mark.parametrize(("side", "size"), [(8, 500), (32, 500), (33, 470), (64, 125), (160, 20), (1000, 1)])
def test_evaluation_takes_as_many_pixels_at_once(side: int, size: int) -> None:
    """A forward pass of the evaluation has at most 500 images, and of large ones as many fewer as they are
    larger, so that neither its memory nor its time grows with them."""
    split = Split(np.zeros((3, side, side, 1), np.uint8), np.zeros(3, np.int64))
    assert loop.evaluation_batch(split) == size
    assert size == 1 or size * side**2 <= 500 * 32**2


KEPT = {"epochs": 3, "checkpoint_keep": 4}
"""A run with the checkpoints of all its epochs, from which it can be resumed."""


@pytest.mark.parametrize("strategy", effort.daily(["allreduce", "slowmo", "gossip"], ["slowmo"]))
def test_what_is_cut_back_is_what_a_stop_leaves(
    config: Make, train_in_threads: Train, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    """The copies of whole runs that are resumed below are, but for times, what a run leaves that is stopped
    in its second epoch: the same files, checkpoints of the same bits, the same metrics, record and notes."""
    options = {**KEPT, "ranks": 3, "strategy": strategy, "optimizer_state": "keep"}
    copy = stopped(train_in_threads(config(**options), folder="whole")[1])
    real = loop.train_epoch

    def stop_in_the_second(job: loop.ImageJob, epoch: int) -> None:
        job.synchroniser.world.stopping = epoch == 2
        real(job, epoch)

    monkeypatch.setattr(loop, "train_epoch", stop_in_the_second)
    with pytest.raises(Interrupted):
        train_in_threads(config(**options), folder="stopped")
    left = RunFolder(copy.path.with_name("stopped"))
    shutil.rmtree(left.checkpoints / "epoch-0001-part-0001")  # tests/test_stops.py is about it
    files = {path.relative_to(copy.path) for path in copy.path.rglob("*") if path.is_file()}
    assert files == {path.relative_to(left.path) for path in left.path.rglob("*") if path.is_file()}
    tensors = [name for name in files if name.suffix == ".safetensors"]
    assert len(tensors) >= 2 * 2  # model and optimiser, at the start and after the first epoch
    for name in tensors:
        assert (copy.path / name).read_bytes() == (left.path / name).read_bytes(), name
    for name in [name for name in files if name.name == "manifest.json"]:
        mine, theirs = (json.loads((folder.path / name).read_bytes()) for folder in (copy, left))
        for manifest in (mine, theirs):
            manifest["notes"]["epochs"] = [without_times(row) for row in manifest["notes"]["epochs"]]
            assert manifest["notes"].pop("saved_at")
        assert mine == theirs
    assert [without_times(row) for row in copy.read_metrics()] == [
        without_times(row) for row in left.read_metrics()
    ]
    mine, theirs = copy.read(), left.read()
    assert results(mine) == results(theirs)
    for name in ("outcome", "config", "environment", "samples", "faults", "target", "resumed_from_epoch"):
        assert getattr(mine, name) == getattr(theirs, name), name


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    """An epoch's row, but for what a clock told."""
    return {key: value for key, value in row.items() if not key.endswith("_s")}


@pytest.mark.parametrize(
    ("optimizer", "optimizer_state", "team"),
    effort.rotating(
        [(optimizer, state) for optimizer in ("sgd", "adam") for state in ("keep", "average", "reset")],
        [{"ranks": 1}, {"ranks": 3}, {"ranks": 2, "topology": "allreduce"}],
    ),
    ids=str,
)
def test_resume_to_the_bit(
    config: Make, train_in_threads: Train, team: dict[str, Any], optimizer: str, optimizer_state: str
) -> None:
    """A run that was stopped and goes on ends with the bits of one that was not, augmentation and
    optimiser state included."""
    lr = 0.02 if optimizer == "sgd" else 0.001
    options = {
        **KEPT, **team, "optimizer": optimizer, "optimizer_state": optimizer_state, "lr": lr,
        "flip": "random",
    }  # fmt: skip
    whole = train_in_threads(config(**options), folder="whole")
    stopped(whole[1])
    parts = train_in_threads(config(**options), folder="parts", resume=True)
    assert same(whole[2], parts[2])
    assert results(whole[0]) == results(parts[0])
    assert parts[0].resumed_from_epoch == 1
    assert parts[0].samples == whole[0].samples


COMPRESSED = [
    {"strategy": name, "compress": compress}
    for compress in ("bf16", "int8", "topk:0.05", "sign", "powersgd:2")
    for name in ("allreduce", "gradient-server", "local-sgd", "slowmo")
]
IN_STEP = [
    {"strategy": name} | ({"local_after": 1.0} if name == "post-local-sgd" else {})
    for name in strategies.STRATEGIES
    if name not in ("single", "ddp", "easgd", "downpour")
]


# Every day each compression has its turn, with one strategy after the other.
@pytest.mark.parametrize(
    "options", effort.daily([*IN_STEP, *COMPRESSED], [*IN_STEP[::2], *COMPRESSED[::5]]), ids=str
)
def test_every_strategy_resumes_to_the_bit(
    config: Make, train_in_threads: Train, options: dict[str, Any]
) -> None:
    """Strategies in which ranks meet go on as if never stopped: outer momentum, residuals, weights of their
    own, and the choice of neighbours and of random numbers included."""
    options = {**KEPT, "ranks": 3, **options}
    whole = train_in_threads(config(**options), folder="whole")
    stopped(whole[1])
    parts = train_in_threads(config(**options), folder="parts", resume=True)
    assert same(whole[2], parts[2])
    assert results(whole[0]) == results(parts[0])


@pytest.mark.parametrize("name", effort.daily(["easgd", "downpour"], ["easgd"]))
def test_asynchronous_strategies_go_on(config: Make, train_in_threads: Train, name: str) -> None:
    """After a resume each worker has its own weights again, no sample is lost, and the loss goes on down."""
    options = {"ranks": 3, "strategy": name, "lr": 0.002}
    train_in_threads(config(**options, epochs=2))
    before = train_in_threads(config(**options, epochs=2), folder="same")[0].epochs[-1]
    record, folder, _ = train_in_threads(config(**options, epochs=5), resume=True)
    assert record.samples.trained == record.samples.expected == 5 * tiny.TRAIN
    assert record.epochs[-1].val_loss < before.val_loss
    memory = [checkpoint.newest(folder.checkpoints, print).memory_of(rank) for rank in range(3)]
    assert [set(kept) for kept in memory] == [set(), {"weights"}, {"weights"}]


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_resume_on_other_ranks(config: Make, train_in_threads: Train, ranks: int) -> None:
    """A run of 3 ranks goes on with fewer or more, and still counts every sample."""
    train_in_threads(config(ranks=3, epochs=1))
    record, _, _ = train_in_threads(config(ranks=ranks, epochs=3), resume=True)
    assert len(record.ranks) == ranks
    assert record.samples.trained == record.samples.expected == 3 * tiny.TRAIN
    assert record.epochs[-1].val_accuracy > record.epochs[0].val_accuracy


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    config: Make, train_in_threads: Train, tmp_path: Path
) -> None:
    """Whatever part of the newest checkpoint is damaged, it is refused by name and the one before serves;
    with none left the run cannot be resumed."""
    _, folder, _ = train_in_threads(config(ranks=2, epochs=3, optimizer_state="keep"))
    good = folder.checkpoints
    names = [path.name for path in (good / "epoch-0003").iterdir()]
    assert sorted(names) == ["manifest.json", "model.safetensors", "worker-0000.safetensors"]
    for name in names:
        for damage in ("cut", "flip", "gone"):
            work = tmp_path / f"{name}-{damage}"
            shutil.copytree(good, work)
            victim = work / "epoch-0003" / name
            content = bytearray(victim.read_bytes())
            content[len(content) // 2] ^= 0xFF
            if damage == "gone":
                victim.unlink()
            else:
                victim.write_bytes(content if damage == "flip" else content[: len(content) // 2])
            said: list[str] = []
            assert checkpoint.newest(work, said.append).epoch == 2
            assert len(said) == 1
            assert "epoch-0003" in said[0]
    shutil.rmtree(good / "epoch-0003")
    shutil.rmtree(good / "epoch-0002")
    with pytest.raises(ResumeError, match="no checkpoint"):
        checkpoint.newest(good, print)


def test_old_checkpoints_are_removed(config: Make, train_in_threads: Train) -> None:
    """The newest checkpoints are kept, as many as asked for, and the last epoch always has one."""
    _, folder, _ = train_in_threads(config(epochs=7, checkpoint_every=2, checkpoint_keep=3, train_limit=64))
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "epoch-0004",
        "epoch-0006",
        "epoch-0007",
    ]


@pytest.mark.disk
def test_a_full_disk_keeps_the_last_good_checkpoint(
    config: Make, train_in_threads: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk fills up during a checkpoint, the run fails by name, and the one before is good."""
    import os

    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) > 40:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        train_in_threads(config(epochs=50, train_limit=64), folder="full")
    monkeypatch.undo()
    saved = checkpoint.newest(tmp_path / "full" / "checkpoints", print)
    assert saved.epoch == len(saved.notes["epochs"]) >= 1


def test_a_loss_that_is_no_number_stops_the_run(
    config: Make, train_in_threads: Train, tmp_path: Path
) -> None:
    """A NaN loss ends the run with epoch and step, and the last good checkpoint stays."""
    with pytest.raises(DivergedError, match=r"epoch \d+, step \d+"):
        train_in_threads(config(lr=1e12, ranks=3, epochs=3))
    assert checkpoint.newest(tmp_path / "run" / "checkpoints", print).epoch == 0


def test_ranks_with_different_options_are_refused() -> None:
    """Ranks that a user started with different options are told which one, before anything is made."""

    def program(world: World) -> None:
        require_same_options(world, TrainConfig(ranks=3, lr=0.1 + (world.rank == 2)).model_dump())

    with pytest.raises(ConfigError, match=r"--lr is .* on rank"):
        run_in_threads(3, program)


def test_more_workers_than_samples_are_refused(config: Make, tmp_path: Path) -> None:
    """More workers than samples are refused, naming both numbers."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    with pytest.raises(ConfigError, match=r"4 workers .* 3 training samples"):
        run_in_threads(5, lambda world: run(config(ranks=5, train_limit=3), world, folder, say=print))


@pytest.mark.parametrize("team", [TEAMS[0], TEAMS[2]], ids=str)
def test_epochs_between_are_not_evaluated(
    config: Make, train_in_threads: Train, team: dict[str, Any]
) -> None:
    """With --evaluate-every 2 the second, the fourth and the last epoch are evaluated, to the same figures as
    where all are; the others say that they were not, and training itself is the same to the bit."""
    options = {**team, "epochs": 5, "train_limit": 200}
    all_of_them, _, weights = train_in_threads(config(**options))
    some, folder, weights_of_some = train_in_threads(config(**options, evaluate_every=2), folder="some")
    assert same(weights, weights_of_some)
    assert [row.epoch for row in some.evaluated] == [2, 4, 5]
    for row, whole in zip(some.epochs, all_of_them.epochs, strict=True):
        assert row.train_loss == whole.train_loss
        told = (None, None) if row.epoch in (1, 3) else (whole.val_loss, whole.val_accuracy)
        assert (row.val_loss, row.val_accuracy) == told
    assert [line["val_accuracy"] for line in folder.read_metrics()] == [
        row.val_accuracy for row in some.epochs
    ]
    assert RunFolder(folder.path).read() == some


def test_a_target_is_met_where_it_is_looked_for(config: Make, train_in_threads: Train) -> None:
    """Only an evaluated epoch can end a run at its target accuracy."""
    record, _, _ = train_in_threads(
        config(epochs=30, evaluate_every=7, target_accuracy=0.5, checkpoint_every=30)
    )
    assert record.target is not None
    assert record.target.epoch == len(record.epochs) == 7


def test_target_accuracy_ends_the_run(config: Make, train_in_threads: Train) -> None:
    """The run stops after the first epoch that reaches the target, and counts only what it trained."""
    options = {"epochs": 30, "ranks": 2, "topology": "allreduce", "checkpoint_every": 30}
    record, folder, _ = train_in_threads(config(**options, target_accuracy=0.9))
    assert record.epochs[-1].val_accuracy >= 0.9
    assert all(row.val_accuracy < 0.9 for row in record.epochs[:-1])
    assert (folder.checkpoints / f"epoch-{len(record.epochs):04d}").exists()
    assert record.outcome == "completed"
    assert record.samples.expected == record.samples.trained == len(record.epochs) * tiny.TRAIN


def test_validation_split_trains_on_the_rest(config: Make, train_in_threads: Train) -> None:
    """With --validation-split the held-out part of the training set validates and does not train."""
    record, _, _ = train_in_threads(config(ranks=3, validation_split=0.25, epochs=1))
    assert record.samples.expected == record.samples.trained == tiny.TRAIN - round(tiny.TRAIN * 0.25)


@given(st.integers(1, 4), st.data())
def test_the_sample_count_is_exact(ranks: int, data: st.DataObject) -> None:
    """Whatever ranks trained, all of them learn how many samples came too often and how many too seldom."""
    shape = (ranks, data.draw(st.integers(1, 30)))
    counts = data.draw(arrays(np.int64, shape, elements=st.integers(0, 2)))
    expected = data.draw(
        st.one_of(st.just(counts.sum(0)), arrays(np.int64, shape[1], elements=st.integers(0, 3)))
    )

    def program(world: World) -> SampleCounts:
        return count_samples(world, counts[world.rank], expected, seed=0)

    surplus = counts.sum(0) - expected
    true = SampleCounts(
        int(expected.sum()),
        int(counts.sum()),
        int(surplus[surplus > 0].sum()),
        int(-surplus[surplus < 0].sum()),
    )
    assert run_in_threads(ranks, program) == [true] * ranks


class BatchNormNet(nn.Sequential):
    """A network whose buffers must be averaged too."""

    def __init__(self, image_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(
            nn.Conv2d(image_shape[0], 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(128, classes),
        )


def test_batchnorm_runs_resume_to_the_bit(config: Make, train_in_threads: Train) -> None:
    """A network with BatchNorm trains, resumes to the bit, and its batch counts stay integers."""
    options = {**KEPT, "model": f"{__name__}:BatchNormNet", "ranks": 3, "lr": 0.1}
    whole = train_in_threads(config(**options), folder="whole")
    stopped(whole[1])
    parts = train_in_threads(config(**options), folder="parts", resume=True)
    assert same(whole[2], parts[2])
    assert whole[2]["1.num_batches_tracked"].dtype == torch.int64


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_no_other_can_end_is_told_of(
    config: Make, train_in_threads: Train, capsys: pytest.CaptureFixture[str], ranks: int
) -> None:
    """--step-timeout says so where it does nothing: on a rank that is alone on its host."""
    train_in_threads(config(ranks=ranks, epochs=1, step_timeout=60))
    line = r"^--step-timeout 60 ends no rank that is alone on its host, as on \S+: only the others"
    assert len(re.findall(line, capsys.readouterr().out, re.MULTILINE)) == (ranks == 1)
