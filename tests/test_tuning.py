"""--tune: never worse than what was given, by measurements in turn; and what it may try."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from rankwise import data
from rankwise.cli import main
from rankwise.config import TrainConfig
from rankwise.errors import LaunchError
from rankwise.launch import tuning
from rankwise.launch.order import Order
from rankwise.launch.tournament import Options, TrialFailed, Tried, choose
from rankwise.plan import resolve
from rankwise.runs.record import Record
from rankwise.system import machine

from . import records


def said_nothing(tried: list[Tried], winner: Tried) -> None:
    """For contests that nobody watches."""


def test_the_fastest_is_found_stage_by_stage() -> None:
    """Challengers build on the champion of the stage before, and the winner meets the options as given."""
    seconds = {"": 10.0, "a": 8.0, "b": 9.0, "ac": 6.0}
    told: list[tuple[list[Options], Options]] = []
    found = choose(
        [
            lambda champion: [{"a": 1}, {"b": 1}],
            lambda champion: [{**champion.options, "c": 1}],
            lambda champion: [],
        ],
        lambda options: seconds["".join(options)],
        lambda tried, winner: told.append(([one.options for one in tried], winner.options)),
    )
    assert found == {"a": 1, "c": 1}
    assert told == [
        ([{}, {"a": 1}, {"b": 1}], {"a": 1}),
        ([{"a": 1}, {"a": 1, "c": 1}], {"a": 1, "c": 1}),
        ([{}, {"a": 1, "c": 1}], {"a": 1, "c": 1}),
    ]


@given(st.lists(st.floats(0.97, 1.2), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_what_is_not_clearly_faster_is_not_taken(factors: list[float], random: Any) -> None:
    """Challengers that gain less than the margin leave everything as it was given."""
    options = [{"number": number} for number in range(len(factors))]
    stages = [lambda champion: options]
    found = choose(stages, lambda o: 10 * factors[o["number"]] if o else 10.0, said_nothing)
    assert found == {}


def test_noise_does_not_win() -> None:
    """A challenger that is faster by its median, but not in every turn, is not taken."""
    turns: dict[str, Iterator[float]] = {"": iter([10.0, 7.0, 10.0]), "a": iter([8.0, 8.0, 8.0])}
    assert choose([lambda champion: [{"a": 1}]], lambda o: next(turns["".join(o)]), said_nothing) == {}


def test_a_drifting_machine_favours_nobody() -> None:
    """While all get slower from run to run, the faster one still wins, and equals do not."""
    for factor, expected in ((1.0, {}), (0.7, {"a": 1})):
        runs = iter(range(100))
        seconds = lambda o, f=factor, r=runs: (10 + 0.2 * next(r)) * (f if o else 1)  # noqa: E731
        assert choose([lambda champion: [{"a": 1}]], seconds, said_nothing) == expected


def test_what_cannot_run_is_left_out() -> None:
    """A challenger that fails is out; if the options as given fail there is nothing to compare with."""

    def measure(options: Options) -> float:
        if options.get("a"):
            raise TrialFailed("no such thing")
        return 5.0

    tried: list[Tried] = []
    assert choose([lambda champion: [{"a": 1}]], measure, lambda all, _: tried.extend(all)) == {}
    assert [one.failed for one in tried] == ["", "no such thing"]
    with pytest.raises(TrialFailed):
        choose([lambda champion: [{}]], lambda options: measure({"a": 1}), said_nothing)


def test_the_hopeless_get_one_turn() -> None:
    """Who is far behind after the first turn is not measured again."""
    runs: list[Options] = []
    choose(
        [lambda champion: [{"a": 1}]],
        lambda options: runs.append(options) or (20.0 if options else 10.0),
        said_nothing,
    )
    assert runs.count({"a": 1}) == 1
    assert runs.count({}) == 3


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrainConfig]:
    """The configurations of all trials; each sample takes a millisecond, half of that on two ranks."""
    runs: list[TrainConfig] = []
    monkeypatch.setattr(machine, "usable_cores", lambda *_: 2)

    def run(trials: Any, options: Options, samples: int) -> Record:
        config = TrainConfig(**{**trials._order.config.given(), **options, "train_limit": samples})
        runs.append(config)
        rows = records.epochs(3, train_samples=samples)
        pace_s = 0.001 / config.ranks
        rows = [row.model_copy(update={"train_s": pace_s * samples}) for row in rows]
        return records.record(epochs=rows, first_step_s=2.0)

    monkeypatch.setattr(tuning._Trials, "_run", run)
    return runs


def order(tmp_path: Path, **options: Any) -> Order:
    """An order to tune a run on digits."""
    given = {"dataset": "digits", "cache_dir": tmp_path, "model": "mlp", **options}
    return Order(TrainConfig(**given), tune=True, console=Console(stderr=True, quiet=True))


def test_ranks_share_the_batch(tmp_path: Path, trials: list[TrainConfig]) -> None:
    """Without --ranks several ranks with the same batch together are tried, and kept where they are faster;
    the other options stay as given, and so does the precision."""
    found = tuning.tuned(order(tmp_path, batch_size=32, lr=0.02)).config
    assert (found.ranks, found.batch_size, found.threads, found.strategy) == (2, 16, 1, "allreduce")
    assert (found.lr, found.model, found.precision) == (0.02, "mlp", "fp32")
    assert all(run.ranks * run.batch_size == 32 for run in trials)
    assert {run.precision for run in trials} == {"fp32"}


@pytest.mark.parametrize(
    "options",
    [
        {"ranks": 1},
        {"strategy": "single"},
        {"model": "resnet9"},
        {"batch_size": 15},
        {"lr_scaling": "linear"},
        {"threads": 1},
    ],
    ids=str,
)
def test_ranks_are_only_tried_where_they_change_nothing(
    tmp_path: Path, trials: list[TrainConfig], options: dict[str, Any]
) -> None:
    """Not where the user said how ranks work, BatchNorm would see smaller batches, or the batch cannot be
    shared."""
    assert tuning.tuned(order(tmp_path, **options)).config.ranks == 1
    assert {run.ranks for run in trials} == {1}


def test_bfloat16_is_only_tried_by_consent(tmp_path: Path, trials: list[TrainConfig]) -> None:
    """With --precision bf16 float32 is compared; otherwise bfloat16 never is."""
    assert tuning.tuned(order(tmp_path, precision="bf16")).config.precision == "bf16"
    assert {run.precision for run in trials} == {"fp32", "bf16"}


def test_it_is_remembered(tmp_path: Path, trials: list[TrainConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run is not measured again, whatever its seed; another batch, machine or version is, and so is
    one whose memory cannot be read."""
    first = tuning.tuned(order(tmp_path, batch_size=32)).config
    count = len(trials)
    again = tuning.tuned(order(tmp_path, batch_size=32, seed=3)).config
    assert len(trials) == count
    assert again.given() == {**first.given(), "seed": 3}
    tuning.tuned(order(tmp_path, batch_size=64))
    assert len(trials) > count
    count = len(trials)
    monkeypatch.setattr(machine, "cpu_model", lambda: "another one")
    tuning.tuned(order(tmp_path, batch_size=32))
    assert len(trials) > count
    count = len(trials)
    for path in (tmp_path / "tuning").iterdir():
        assert json.loads(path.read_bytes())["trials"]
        path.write_text("{")
    tuning.tuned(order(tmp_path, batch_size=32))
    assert len(trials) > count


def test_trials_are_on_whole_images_and_all_parameters(tmp_path: Path) -> None:
    """What a run does at one time only is left out of trials, which would be all that or nothing of it; what
    it does all the time is in them."""
    given = order(
        tmp_path, resize="4:2", freeze="layers.0:2", target_accuracy=0.9, fault=["kill:rank=1"], flip="random"
    )
    trial = tuning._Trials(given, resolve(given.config), 1000).config_of(
        {"threads": 2}, 500, tmp_path / "run"
    )
    assert (trial.resize, trial.freeze, trial.target_accuracy, trial.fault) == ("none", "none", None, ())
    assert (trial.flip, trial.threads, trial.train_limit) == ("random", 2, 500)


def test_trials_of_a_large_network_are_a_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial has no more steps than it must, however long each takes; fast ones take a second or two."""
    sizes: dict[float, set[int]] = {}
    for sample_s in (1.0, 1e-5):
        taken: list[int] = []

        def run(trials: Any, options: Options, samples: int, s: float = sample_s, t: Any = taken) -> Record:
            t.append(samples)
            rows = records.epochs(3, train_samples=samples)
            return records.record(epochs=[row.model_copy(update={"train_s": s * samples}) for row in rows])

        monkeypatch.setattr(tuning._Trials, "_run", run)
        tuning.tuned(order(tmp_path / str(sample_s), batch_size=10, threads=1))
        sizes[sample_s] = set(taken[1:])
    assert sizes == {1.0: {10 * tuning.LEAST_STEPS}, 1e-5: {150_000}}


def test_a_run_that_does_not_work_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the run as given fails, its reason is the error."""

    def fail(*_: Any) -> Record:
        raise TrialFailed("rankwise: the disk is full")

    monkeypatch.setattr(tuning._Trials, "_run", fail)
    with pytest.raises(LaunchError, match="as it was given: rankwise: the disk is full"):
        tuning.tuned(order(tmp_path))


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--resume", "run"], "--resume"), (["--hosts", "a:1"], "--hosts")],
)
def test_what_cannot_be_tuned(capsys: pytest.CaptureFixture[str], words: list[str], expected: str) -> None:
    """A run that goes on, and one on several hosts, are refused in one line."""
    with pytest.raises(SystemExit) as end:
        main(["train", "--dataset", "digits", "--tune", *words])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--tune" in err
    assert expected in err


def test_the_time_of_a_run_is_its_start_and_its_epochs(tmp_path: Path) -> None:
    """A trial says: seconds to the first step, what the first epoch takes longer, and the others' pace."""
    rows = records.epochs(3, train_samples=100)
    rows = [row.model_copy(update={"train_s": s}) for row, s in zip(rows, (3.0, 1.0, 1.0), strict=True)]
    start_s, pace_s = tuning._pace(records.record(epochs=rows, first_step_s=4.0))
    assert (start_s, pace_s) == (pytest.approx(6.0), pytest.approx(0.01))


def test_the_tuned_run_is_an_ordinary_one(tmp_path: Path, trials: list[TrainConfig]) -> None:
    """What comes out says in full how it is started, and asks for no tuning."""
    from rankwise.launch.order import to_arguments

    found = tuning.tuned(order(tmp_path, batch_size=32))
    assert not found.tune
    words = to_arguments(found.config)
    assert words[words.index("--ranks") + 1] == "2"
    assert "--tune" not in words
    assert data.writable_folder(tmp_path) == tmp_path
