"""Trackers hold what metrics.jsonl and record.json hold, each epoch once, as their own readers tell."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from rankwise.config import TrainConfig
from rankwise.errors import UsageError
from rankwise.runs import trackers
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Epoch, Record

from . import records, tiny
from .test_cli import QUICK, call

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, Any]]]
Points = dict[str, list[tuple[int, float]]]
"""Steps and values by metric."""


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a run: to make them takes seconds, to copy them none."""
    place = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        MlflowClient(f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture(autouse=True)
def _a_store_of_its_own(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = tmp_path.with_name(f"{tmp_path.name}.db")
    shutil.copy(empty_store, store)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{store}")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def read_tensorboard(folder: RunFolder) -> Points:
    """All scalars that TensorBoard shows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(folder.path / "tensorboard"))
    log.Reload()
    return {tag: [(e.step, e.value) for e in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


def read_mlflow(folder: RunFolder) -> Points:
    """All metrics of the run that MLflow holds under the folder's name."""
    from mlflow import MlflowClient

    client, run = MlflowClient(), mlflow_run(folder)
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))
        for key in run.data.metrics
    }


def mlflow_run(folder: RunFolder) -> Any:
    """The only run in MLflow's store; it has the folder's name."""
    from mlflow import MlflowClient

    (run,) = MlflowClient().search_runs(["0"])
    assert run.info.run_name == folder.path.name
    return run


READERS: dict[str, Callable[[RunFolder], Points]] = {"tensorboard": read_tensorboard, "mlflow": read_mlflow}
pytestmark = pytest.mark.xdist_group("trackers")  # one process loads MLflow, and makes its tables

BOTH = pytest.mark.parametrize("tracker", READERS)


@BOTH
def test_the_tracker_has_the_metrics_of_the_run(config: Make, train_in_threads: Train, tracker: str) -> None:
    """A run on 3 ranks leaves one log, with the numbers of metrics.jsonl at each epoch, and the phases and
    efficiencies of the record at the last one."""
    _, folder, _ = train_in_threads(config(ranks=3, track=tracker))
    points = READERS[tracker](folder)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for name in ("train_loss", "val_loss", "val_accuracy", "learning_rate", "train_s", "wall_s"):
        expected = [(row["epoch"], pytest.approx(row[name], rel=1e-6)) for row in rows]
        assert points[name] == expected, name
    speeds = [(row["epoch"], pytest.approx(row["train_samples"] / row["train_s"])) for row in rows]
    assert points["samples_per_s"] == speeds
    record = folder.read()
    waited_s = sum(row.phases_ns["wait"] for row in record.ranks) / 1e9
    assert points["phase_s/wait"] == [(2, pytest.approx(waited_s, rel=1e-6))]
    assert points["efficiency/parallel"] == [(2, pytest.approx(record.efficiency.parallel, rel=1e-6))]


@BOTH
def test_a_resumed_run_goes_on_in_the_same_log(config: Make, train_in_threads: Train, tracker: str) -> None:
    """A run that goes on from an earlier checkpoint has each epoch once, in one log: epochs that it trains
    anew are no second points."""
    options = config(track=tracker, checkpoint_keep=5)
    _, folder, _ = train_in_threads(options)
    shutil.rmtree(folder.checkpoints / "epoch-0002")
    record, _, _ = train_in_threads(options.model_copy(update={"epochs": 4, "lr": 0.005}), resume=True)
    points = READERS[tracker](folder)
    assert [step for step, _ in points["train_loss"]] == [1, 2, 3, 4]
    # MLflow cannot take back epoch 2, which was trained twice, and differently; TensorBoard can.
    same = [0, 2, 3] if tracker == "mlflow" else [0, 1, 2, 3]
    for number in same:
        loss = record.epochs[number].train_loss
        assert points["train_loss"][number][1] == pytest.approx(loss, rel=1e-6)


@BOTH
def test_a_tracker_that_comes_later_gets_what_it_missed(
    config: Make, train_in_threads: Train, tracker: str
) -> None:
    """A run that is resumed with a tracker for the first time is in its log from its first epoch on."""
    train_in_threads(config())
    _, folder, _ = train_in_threads(config(track=tracker, epochs=3), resume=True)
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    points = READERS[tracker](folder)["val_accuracy"]
    assert points == [(row["epoch"], pytest.approx(row["val_accuracy"], rel=1e-6)) for row in rows]


def test_mlflow_gets_options_and_outcome(tmp_path: Path, config: Make) -> None:
    """MLflow has every option of the run as a parameter, and says whether it ended, and how."""
    options = config(track="mlflow", batch_size=48)
    folder = RunFolder(tmp_path / "run")
    folder.create()
    tracker = trackers.open_tracker(options, folder, [], print)
    assert mlflow_run(folder).info.status == "RUNNING"
    stored = {name: str(value) for name, value in options.model_dump(mode="json").items()}
    assert mlflow_run(folder).data.params == stored
    tracker.finish(records.record(outcome="interrupted"))
    assert mlflow_run(folder).info.status == "KILLED"
    trackers.open_tracker(options, folder, [], print).finish(records.record())
    assert mlflow_run(folder).info.status == "FINISHED"


def test_mlflow_uses_the_experiment_of_its_environment(
    tmp_path: Path, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs go to the experiment that MLFLOW_EXPERIMENT_NAME names, which is made once."""
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    for name in ("one", "two"):
        folder = RunFolder(tmp_path / name)
        folder.create()
        trackers.open_tracker(config(track="mlflow"), folder, [], print)
    experiment = MlflowClient().get_experiment_by_name("mine")
    assert experiment is not None
    runs = MlflowClient().search_runs([experiment.experiment_id])
    assert {run.info.run_name for run in runs} == {"one", "two"}


def test_tensorboard_gets_the_options(tmp_path: Path, config: Make) -> None:
    """While a run still goes on TensorBoard has its epochs, and its options on the page of
    hyperparameters."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    folder = RunFolder(tmp_path)
    tracker = trackers.open_tracker(config(track="tensorboard", batch_size=48), folder, [], print)
    tracker.epoch(records.epochs(1)[0])
    log = EventAccumulator(str(folder.path / "tensorboard"))
    log.Reload()
    assert len(log.Scalars("train_loss")) == 1
    content = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    found = HParamsPluginData.FromString(content).session_start_info.hparams
    assert found["batch_size"].number_value == 48
    assert found["model"].string_value == tiny.MODEL


class Broken(trackers.Tracker):
    """Takes one epoch, then fails."""

    def __init__(self, config: TrainConfig, folder: RunFolder, done: Sequence[Epoch]) -> None:
        self.path = folder.path / "taken"

    def epoch(self, row: Epoch) -> None:
        if row.epoch > 1:
            raise ConnectionError("the server is gone\nfor good")
        self.path.write_text(str(row.epoch))

    def finish(self, record: Record) -> None:
        self.path.write_text("finished")


def test_training_outlives_its_tracker(
    config: Make,
    train_in_threads: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tracker that fails in the middle of a run is not asked again, one line says so, and the run goes on
    to its end."""
    monkeypatch.setitem(trackers._TRACKERS, "mlflow", Broken)
    record, folder, _ = train_in_threads(config(ranks=3, track="mlflow", epochs=4))
    assert record.outcome == "completed"
    assert len(record.epochs) == 4
    assert (folder.path / "taken").read_text() == "1"
    said = [line for line in capsys.readouterr().out.splitlines() if "mlflow" in line]
    assert len(said) == 1
    assert "the server is gone for good" in said[0]


def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: Make) -> None:
    """A tracker that cannot be opened is an error in one line, before training, that says how to go on."""
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))  # and does not listen
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://localhost:{nobody.getsockname()[1]}")
        with pytest.raises(UsageError, match="--track none") as error:
            trackers.open_tracker(config(track="mlflow"), RunFolder(tmp_path), [], print)
    assert len(str(error.value).splitlines()) == 1


@BOTH
def test_a_missing_package_is_found_before_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, tracker: str
) -> None:
    """Without the tracker's package the run is refused in one line that says what to install; nothing is
    written."""
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    assert call("train", "--dataset", "digits", "--ranks", "2", "--track", tracker) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert f"pip install 'rankwise[{tracker}]'" in err
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker(capsys: pytest.CaptureFixture[str]) -> None:
    """A tracker that does not exist is refused in one line that lists those that do."""
    assert call("train", *QUICK, "--track", "wandb") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert all(name in err for name in ("--track", "wandb", "tensorboard", "mlflow"))


def test_json_stays_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Trackers print nothing: with --format json stdout is one document, and stderr has only our lines."""
    for tracker in READERS:
        assert call("train", *QUICK, "--track", tracker, "--format", "json", "--out", tracker) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["config"]["track"] == tracker
        assert all(line.startswith(("epoch", "preparing")) for line in err.splitlines()), err
