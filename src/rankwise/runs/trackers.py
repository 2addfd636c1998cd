"""The metrics of a run where people already look: TensorBoard or MLflow. Rank 0 alone writes them.

Names and values are those of metrics.jsonl and record.json. A point belongs to an epoch, and each epoch
is written once: a resumed run goes on in the same log.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, UsageError, one_line
from rankwise.ledger.phases import PHASES
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Epoch, Record
from rankwise.system.files import write_atomically

Say = Callable[[str], None]


class Tracker(ABC):
    """Takes the metrics of one run. Its methods may raise whatever its library raises."""

    @abstractmethod
    def epoch(self, row: Epoch) -> None:
        """Write an epoch that is done."""

    @abstractmethod
    def finish(self, record: Record) -> None:
        """Write what only the whole run can tell, and close the log."""


class NoTracker(Tracker):
    """Writes nothing."""

    def epoch(self, row: Epoch) -> None:
        """Nothing."""

    def finish(self, record: Record) -> None:
        """Nothing."""


def check(name: str) -> None:
    """Raises ConfigError, which says what to install, if the tracker's package is missing."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ConfigError(f"--track {name} needs a package that is missing: pip install 'rankwise[{name}]'")


def open_tracker(config: TrainConfig, folder: RunFolder, done: Sequence[Epoch], say: Say) -> Tracker:
    """The tracker that `config` names, for a run in which these epochs are done already.

    Raises UsageError if it cannot be opened. Once it is open it raises nothing more: a tracker that
    fails later is left alone, and `say` gets one line about it.
    """
    if config.track == "none":
        return NoTracker()
    try:
        return _Forgiving(_TRACKERS[config.track](config, folder, done), config.track, say)
    except Exception as error:
        raise UsageError(
            f"cannot track with {config.track}: {one_line(error)[:300]}; --track none trains without it"
        ) from error


def epoch_metrics(row: Epoch) -> dict[str, float]:
    """What trackers get of an epoch, by name with unit."""
    values = {
        "train_loss": row.train_loss,
        "val_loss": row.val_loss,
        "val_accuracy": row.val_accuracy,
        "samples_per_s": row.samples_per_s,
        "learning_rate": row.learning_rate,
        "train_s": row.train_s,
        "wall_s": row.wall_s,
    }
    return {name: value for name, value in values.items() if value is not None}


def run_metrics(record: Record) -> dict[str, float]:
    """What trackers get of a whole run: the seconds of all ranks in each phase, and its efficiencies."""
    phases = {f"phase_s/{p}": sum(row.phases_ns[p] for row in record.ranks) / 1e9 for p in PHASES}
    efficiency = record.efficiency.model_dump().items()
    return phases | {f"efficiency/{name}": value for name, value in efficiency if isinstance(value, float)}


class TensorBoard(Tracker):
    """A log in the run folder, for `tensorboard --logdir`."""

    def __init__(self, config: TrainConfig, folder: RunFolder, done: Sequence[Epoch]) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        log = folder.path / "tensorboard"
        missing = () if log.exists() else done
        # TensorBoard hides the points from this step on that an earlier sitting wrote and this one repeats.
        self._writer = cast(Any, SummaryWriter(log, purge_step=len(done) + 1))
        shown = dict.fromkeys(("val_accuracy", "val_loss", "train_loss"))  # beside the options
        values = {
            name: ", ".join(value) if isinstance(value, list) else value
            for name, value in config.model_dump(mode="json").items()
        }
        options, start, self._end = hparams(values, shown)  # type: ignore[no-untyped-call]
        self._writer.file_writer.add_summary(options)
        self._writer.file_writer.add_summary(start)
        for row in missing:
            self.epoch(row)

    def epoch(self, row: Epoch) -> None:
        """Write an epoch's scalars, to be seen at once."""
        self._add(epoch_metrics(row), row.epoch)
        self._writer.flush()

    def finish(self, record: Record) -> None:
        """Write the run's scalars at its last epoch."""
        self._add(run_metrics(record), len(record.epochs))
        if record.outcome == "completed":
            self._writer.file_writer.add_summary(self._end)
        self._writer.close()

    def _add(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)


class Mlflow(Tracker):
    """A run of an MLflow server or store, where MLflow's own environment variables point to.

    The run folder remembers which one it is, so that a resumed run goes on in it.
    """

    def __init__(self, config: TrainConfig, folder: RunFolder, done: Sequence[Epoch]) -> None:
        # By default MLflow tries for many minutes to reach a server that is gone; all ranks would wait.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._client = MlflowClient()
        remembered = folder.path / "mlflow-run"
        if remembered.exists():
            self._run_id = remembered.read_text()
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            run = self._client.create_run(_experiment_id(self._client), run_name=folder.path.name)
            self._run_id = run.info.run_id
            options = [Param(name, str(value)) for name, value in config.model_dump(mode="json").items()]
            self._client.log_batch(self._run_id, params=options)
            write_atomically(remembered, self._run_id.encode())
        # MLflow cannot forget a point, so one that it has got stays, though a resumed run trains it anew.
        points = self._client.get_metric_history(self._run_id, "train_loss")
        self._written = {point.step for point in points}
        for row in done:
            self.epoch(row)

    def epoch(self, row: Epoch) -> None:
        """Send an epoch's metrics, if they are not there yet."""
        if row.epoch not in self._written:
            self._send(epoch_metrics(row), row.epoch)
            self._written.add(row.epoch)

    def finish(self, record: Record) -> None:
        """Send the run's metrics at its last epoch, and how it ended."""
        self._send(run_metrics(record), len(record.epochs))
        status = {"completed": "FINISHED", "interrupted": "KILLED"}.get(record.outcome, "FAILED")
        self._client.set_terminated(self._run_id, status)

    def _send(self, metrics: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = round(time.time() * 1000)
        rows = [Metric(name, value, now_ms, step) for name, value in metrics.items()]
        self._client.log_batch(self._run_id, metrics=rows)


def _experiment_id(client: Any) -> str:
    """The experiment that MLflow's environment variables name, made if need be; else the default one."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME")
    if name is None:
        return os.environ.get("MLFLOW_EXPERIMENT_ID", "0")
    found = client.get_experiment_by_name(name)
    return str(found.experiment_id if found else client.create_experiment(name))


class _Forgiving(Tracker):
    """Another tracker, until it fails: training is worth more than its log."""

    def __init__(self, tracker: Tracker, name: str, say: Say) -> None:
        self._tracker, self._name, self._say = tracker, name, say

    def epoch(self, row: Epoch) -> None:
        """Write an epoch that is done."""
        self._attempt(lambda: self._tracker.epoch(row))

    def finish(self, record: Record) -> None:
        """Write what only the whole run can tell, and close the log."""
        self._attempt(lambda: self._tracker.finish(record))

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._tracker = NoTracker()
            self._say(f"{self._name} fails, so tracking ends here; training goes on: {one_line(error)[:300]}")


_TRACKERS: dict[str, Callable[[TrainConfig, RunFolder, Sequence[Epoch]], Tracker]] = {
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
}
