"""From options to a plan: what is filled in, what is refused, and what stands in plan.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from rankwise import plan as planning
from rankwise.config import TrainConfig, preset_names, read_preset
from rankwise.errors import ConfigError, ResumeError, UsageError
from rankwise.launch.order import Order, resumed
from rankwise.launch.plan_file import read_asked, read_plan, write_plan
from rankwise.plan import RunPlan, make_plan, resolve
from rankwise.runs.folder import RunFolder
from rankwise.strategies import OPTIONS, STRATEGIES
from rankwise.survival.fault_injection import PlannedFault
from rankwise.system.hosts import Host

from . import effort, records
from .test_fuzz import LEAVES, at_most

TWO = {"ranks": 2, "topology": "allreduce"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"strategy": "paramter-averaging"}, ["parameter-averaging"]),
        ({"strategy": "single", "ranks": 2}, ["--strategy single", "--ranks 2"]),
        ({"strategy": "parameter-averaging"}, ["--ranks 1 with a master"]),
        ({"topology": "master"}, ["--topology master", "single"]),
        ({"sync_every": 4}, ["--sync-every"]),
        ({"strategy": "gossip"}, ["gossip", "--ranks 1", "2 or more"]),
        ({"strategy": "easgd"}, ["--ranks 1 with a master"]),
        ({"strategy": "easgd", "ranks": 3, "topology": "allreduce"}, ["--topology allreduce", "master"]),
        ({"strategy": "gossip", "ranks": 3, "compress": "int8"}, ["--compress int8", "gossip", "allreduce"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "int9"}, ["int9", "int8"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "topk:2"}, ["topk:2", "at most 1"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "topk"}, ["topk", "topk:0.01"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "powersgd:0"}, ["powersgd:0", "at least 1"]),
        ({"strategy": "allreduce", "ranks": 3, "compress": "powersgd:1.5"}, ["powersgd:1.5"]),
        ({"strategy": "allreduce", "ranks": 3, "outer_lr": 1}, ["--outer-lr", "slowmo, diloco"]),
        ({"strategy": "allreduce", "ranks": 3, "bucket_mb": 1e9}, ["--bucket-mb", "MB of memory"]),
        ({"strategy": "allreduce", "ranks": 3, "optimizer_state": "reset"}, ["--optimizer-state reset"]),
        ({"strategy": "ddp", "ranks": 2, "sync_every": 4}, ["ddp", "--sync-every"]),
        ({"average_decay": 0.9}, ["--average-decay 0.9", "--averaged-weights"]),
        ({"strategy": "gossip", "ranks": 2, "averaged_weights": "ema"}, ["ema", "gossip", "allreduce"]),
        ({"strategy": "local-sgd", "ranks": 2, "averaged_weights": "lookahead"}, ["lookahead", "local-sgd"]),
        ({"optimizer": "adam", "muon_lr": 0.1}, ["--muon-lr 0.1", "--optimizer muon", "adam"]),
        ({"muon_fixed_norm": True}, ["--muon-fixed-norm", "--optimizer muon", "sgd"]),
        ({"schedule": "cosine", "peak_at": 0.2}, ["--peak-at 0.2", "cosine", "triangular"]),
        ({"final_lr_fraction": 0.2}, ["--final-lr-fraction 0.2", "constant", "cosine"]),
        ({"shards": "fxed"}, ["fxed", "fixed"]),
        ({"resize": "24"}, ["--resize 24", "HEIGHT:EPOCHS"]),
        ({"freeze": "layer"}, ["--freeze layer", "NAME:EPOCH"]),
        ({"freeze": "1:2", "ranks": 2, "strategy": "ddp"}, ["--freeze 1:2", "--strategy ddp"]),
        ({"hosts": "a:2", "hostfile": "hosts"}, ["--hosts and --hostfile", "choose one"]),
        ({"hosts": "a:1", "spares": 1}, ["--spares 1 on 1 slots"]),
        ({**TWO, "balance": "fast"}, ["--balance fast was given, but expected none, measured, or the batch"]),
        ({**TWO, "balance": "24,0"}, ["expected none, measured"]),
        ({**TWO, "balance": "24,8,8"}, ["there are 2 workers, and it names 3 batches"]),
        ({**TWO, "balance": "measured", "strategy": "replication"}, ["every worker trains on all samples"]),
        ({**TWO, "balance": "24,8", "strategy": "ddp"}, ["counts every rank alike"]),
        ({**TWO, "balance": "measured", "shards": "dirichlet:1"}, ["are uneven by themselves"]),
        ({"strategy": "no_such_module:Thing", "ranks": 2}, ["no_such_module"]),
        ({"strategy": "collections:Counter", "ranks": 2}, ["collections:Counter", "Strategy"]),
        (
            {"strategy": "local-sgd", "ranks": 2, "compress": "sign", "optimizer_state": "average"},
            ["--compress", "--optimizer-state average"],
        ),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, object], words: list[str]) -> None:
    """Options that contradict each other are refused by name."""
    with pytest.raises(ConfigError) as caught:
        resolve(TrainConfig(**options))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_strategy_follows_the_ranks() -> None:
    """One rank trains alone; several average parameters with a master, each epoch."""
    assert resolve(TrainConfig()).strategy == "single"
    several = resolve(TrainConfig(ranks=4))
    assert (several.strategy, several.topology, several.sync_every, several.workers) == (
        "parameter-averaging",
        "master",
        "epoch",
        3,
    )


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid(name: str) -> None:
    """Every recipe of the package is a configuration that resolves, and keeps all that it says."""
    recipe = read_preset(name)
    resolved = resolve(TrainConfig(**recipe))
    assert {option: getattr(resolved, option) for option in recipe} == recipe


def test_the_paper_preset_is_the_paper() -> None:
    """The preset `paper` holds the settings of the paper's Table 1 and of its code."""
    config = resolve(TrainConfig(**read_preset("paper")))
    assert (config.strategy, config.topology, config.shards) == ("parameter-averaging", "master", "fixed")
    assert (config.optimizer_state, config.threads, config.batch_size) == ("reset", "all", 16)


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategys_own_options_have_their_values(name: str) -> None:
    """A plan holds a value for each option that its strategy takes, and for no other; those values
    make the same plan."""
    plan = resolve(TrainConfig(strategy=name, ranks=1 if name == "single" else 3))
    without = {"max_staleness", "sync_across_hosts"}  # no limit; and what `sync_every` says
    for option in OPTIONS.keys() - {"optimizer_state", "compress"}:
        has_one = plan.entry.takes(option) and option not in without
        assert (getattr(plan, option) is not None) == has_one, option
    assert resolve(TrainConfig(**plan.model_dump())) == plan


def test_defaults_of_other_options_have_their_values() -> None:
    """What follows from schedule, optimiser and average is filled in, and only where it means something."""
    plain = resolve(TrainConfig())
    assert (plain.peak_at, plain.final_lr_fraction, plain.muon_lr, plain.average_decay) == (None,) * 4
    plan = resolve(TrainConfig(schedule="triangular", optimizer="muon", averaged_weights="ema"))
    assert (plan.peak_at, plan.final_lr_fraction, plan.muon_lr, plan.average_decay) == (
        0.23,
        0.07,
        0.02,
        0.99,
    )
    given = {"peak_at": 0.5, "final_lr_fraction": 0.0, "muon_lr": 0.1, "average_decay": 0.5}
    asked: dict[str, Any] = {"schedule": "one-cycle", "optimizer": "muon", "averaged_weights": "ema", **given}
    assert resolve(TrainConfig(**asked)).model_dump(include=set(given)) == given


def test_small_languages_are_values() -> None:
    """Options that are written in a language of their own are values in a plan."""
    plan = resolve(
        TrainConfig(
            hosts="a:2,b",
            strategy="local-sgd",
            shards="fixed",
            balance="6,2,1",
            resize="16:1,24:3",
            freeze="layer1:2,layer2:4",
            fault=("kill:rank=1",),
        )
    )
    assert (plan.ranks, plan.host_list) == (3, (Host("a", 2), Host("b", 1)))
    assert plan.dealing.kind == "fixed"
    assert plan.batch_sizes == (6, 2, 1)
    assert [plan.resizing.height_in(epoch) for epoch in (1, 2, 4, 5)] == [16, 24, 24, None]
    assert [plan.freezing.frozen_in(epoch) for epoch in (1, 2, 4)] == [[], ["layer1"], ["layer1", "layer2"]]
    assert plan.planned_faults == (PlannedFault("kill", rank=1, epoch=1),)


def test_a_run_of_one_rank_asks_for_no_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MPI there is, which starts programs to find out, is not asked where nothing depends on it."""
    monkeypatch.setattr(planning, "survives_failures", lambda: pytest.fail("MPI was asked for"))
    assert make_plan(TrainConfig(dataset="digits")).on_failure == "stop"
    assert make_plan(TrainConfig(dataset="digits", ranks=2, on_failure="stop")).on_failure == "stop"


@pytest.mark.parametrize(
    ("options", "mpi_survives", "expected"),
    [
        ({"ranks": 3}, True, "continue"),
        ({"ranks": 3}, False, "stop"),
        ({"ranks": 1}, True, "stop"),
        ({"ranks": 3, "strategy": "ddp"}, True, "stop"),
        ({"ranks": 3, "on_failure": "restart"}, True, "restart"),
        ({"ranks": 3, "spares": 2}, True, "continue"),
    ],
)
def test_a_lost_rank_means_what_mpi_and_strategy_can(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], mpi_survives: bool, expected: str
) -> None:
    """Unless it is said, ranks go on where MPI and strategy can, and there are others."""
    monkeypatch.setattr(planning, "survives_failures", lambda: mpi_survives)
    assert make_plan(TrainConfig(dataset="digits", **options)).on_failure == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ranks": 3, "on_failure": "continue"}, ["--on-failure continue", "Open MPI 5"]),
        ({"ranks": 3, "on_failure": "continue", "strategy": "ddp"}, ["--strategy ddp", "cannot go on"]),
        ({"ranks": 3, "spares": 1}, ["--spares 1", "--on-failure continue"]),
        ({"ranks": 2, "min_ranks": 3}, ["--min-ranks 3", "2 ranks"]),
        ({"ranks": 2, "fault": ("kill:rank=2",)}, ["--fault kill:rank=2", "ranks 0 to 1"]),
        ({"ranks": 2, "fault": ("cut:rank=1",)}, ["--fault cut:rank=1", "--hosts"]),
        ({"model": "resnet10"}, ["resnet10", "resnet"]),
        ({"dataset": "digit"}, ["digit", "digits"]),
    ],
)
def test_what_cannot_be_run_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: list[str]
) -> None:
    """What MPI, the ranks or the data do not allow is refused in one line."""
    monkeypatch.setattr(planning, "survives_failures", lambda: False)
    with pytest.raises(UsageError) as caught:
        make_plan(TrainConfig(**{"dataset": "digits", **options}))
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


def test_a_run_that_goes_on_may_have_lost_ranks_to_faults() -> None:
    """A fault of a rank that is gone is no error where a run goes on with fewer."""
    config = TrainConfig(dataset="digits", ranks=2, fault=("kill:rank=2",))
    assert make_plan(config, resumes=True).ranks == 2


# ---- plan.json


def written(folder: Path, **options: Any) -> tuple[RunFolder, RunPlan]:
    place = RunFolder(folder)
    config = TrainConfig(**options)
    plan = resolve(config).with_options(out=folder)
    write_plan(place, config, plan)
    return place, plan


@pytest.mark.parametrize("name", preset_names())
def test_a_rank_reads_the_plan_that_was_written(tmp_path: Path, name: str) -> None:
    """A plan that was written down and read is the same."""
    recipe = read_preset(name)
    folder, plan = written(tmp_path, **recipe)
    assert read_plan(folder) == plan
    assert read_asked(folder) == {key: TrainConfig(**recipe).model_dump(mode="json")[key] for key in recipe}


def test_hosts_stand_in_the_plan(tmp_path: Path) -> None:
    """A hostfile may be gone when a run goes on: what it said counts as asked for."""
    (tmp_path / "hosts").write_text("a slots=2\nb slots=3\n")
    folder, plan = written(tmp_path, hostfile=tmp_path / "hosts", spares=1)
    assert read_asked(folder) == {"hosts": "a:2,b:3", "ranks": 4, "spares": 1}
    assert (plan.hosts, plan.hostfile, plan.ranks) == ("a:2,b:3", None, 4)


def test_a_run_without_a_plan_was_asked_for_nothing_known(tmp_path: Path) -> None:
    """A folder of a version without plans says nothing of what was asked for, and no rank starts from it."""
    assert read_asked(RunFolder(tmp_path)) is None
    with pytest.raises(ResumeError, match=r"plan\.json"):
        read_plan(RunFolder(tmp_path))


@effort.examples(50, 200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_plans_get_one_line(tmp_path: Path, data: st.DataObject) -> None:
    """A plan.json with anything in any place is read, or refused in one line."""
    folder, _ = written(tmp_path, ranks=3)
    content = json.loads(folder.plan.read_bytes())
    part = data.draw(st.sampled_from(["plan", "asked"]))
    where = data.draw(st.sampled_from([None, *content["plan"]]))
    leaf = data.draw(LEAVES)
    if where is None:
        content[part] = leaf
    else:
        content[part][where] = leaf
    folder.plan.write_text(json.dumps(content))
    with at_most(ResumeError, "plan.json"):
        read_plan(folder)
    with at_most(ResumeError, "plan.json"):
        read_asked(folder)


# ---- going on


def going_on(folder: RunFolder, plan: RunPlan, **options: Any) -> TrainConfig:
    """The options of a run that goes on with these, after one by a plan."""
    record = records.record(config=plan.model_dump(mode="json"))
    return resumed(Order(TrainConfig(**options), resume=folder.path), folder, record).config


def test_a_run_goes_on_from_what_was_asked_for(tmp_path: Path) -> None:
    """What was filled in is not taken for a wish: another strategy brings its own topology and interval."""
    folder, plan = written(tmp_path, ranks=3, lr=0.5)
    assert (plan.topology, plan.sync_every) == ("master", "epoch")
    after = resolve(going_on(folder, plan, strategy="local-sgd"))
    assert (after.strategy, after.topology, after.sync_every, after.lr) == ("local-sgd", "allreduce", 8, 0.5)


def test_what_ranks_have_settled_stays(tmp_path: Path) -> None:
    """A run goes on with the batches that were measured, unless others are asked for."""
    folder, plan = written(tmp_path, ranks=2, topology="allreduce", balance="measured", compile="auto")
    settled = plan.with_options(balance="20,12", compile="off")
    assert resolve(going_on(folder, settled)).batch_sizes == (20, 12)
    assert going_on(folder, settled).compile == "off"
    assert going_on(folder, settled, balance="none").balance == "none"


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_a_run_of_a_version_without_plans_goes_on(tmp_path: Path, before: int, after: int) -> None:
    """Its record says what was in force, and how ranks keep in step follows from their number."""
    plan = resolve(TrainConfig(ranks=before, lr=0.5))
    config = going_on(RunFolder(tmp_path), plan, ranks=after)
    assert resolve(config) == resolve(TrainConfig(ranks=after, lr=0.5, out=tmp_path))
    assert resolve(going_on(RunFolder(tmp_path), plan)) == plan.with_options(out=tmp_path)
