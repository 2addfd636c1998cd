"""Time to accuracy: where a run stops, and what its record says about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rankwise.cli import main
from rankwise.config import TrainConfig
from rankwise.report.run_tables import numbers
from rankwise.report.summary import summary
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record, Target

from . import records, tiny
from .conftest import Command

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, RunFolder, dict[str, torch.Tensor]]]


def timed(accuracies: list[float]) -> Record:
    """A record whose epochs are evaluated 10, 12, 14, ... s after launch, half a second each; training began
    after 8 s."""
    rows = [
        row.model_copy(
            update={"val_accuracy": accuracy, "since_launch_s": 8.0 + 2 * row.epoch, "evaluation_s": 0.5}
        )
        for row, accuracy in zip(records.epochs(len(accuracies)), accuracies, strict=True)
    ]
    return records.record(epochs=rows, target=Target.of(0.6, rows, first_step_s=8.0))


def test_the_first_epoch_that_reaches_it_counts() -> None:
    """The times are those of the first epoch at or above the accuracy, evaluation counted in and shown."""
    assert timed([0.5, 0.6, 0.55, 0.7]).target == Target(
        accuracy=0.6, reached=True, epoch=2, from_launch_s=12.0, from_first_step_s=4.0, evaluation_s=1.0
    )
    assert timed([0.5, 0.59]).target == Target(accuracy=0.6, reached=False)
    assert Target.of(None, records.epochs(3), 1.0) is None


def test_what_an_older_record_does_not_say_is_left_out() -> None:
    """Epochs without times still tell whether and when, in epochs."""
    found = Target.of(0.5, records.epochs(3), None)
    assert found == Target(accuracy=0.5, reached=True, epoch=2)


def test_summary_and_page_show_it() -> None:
    """The end of a run and its page say when the accuracy was reached, or that it was not."""
    from rich.console import Console

    def said(record: Record) -> str:
        console = Console(width=400)
        with console.capture() as capture:
            console.print(summary(record, "run"))
        return capture.get()

    reached = timed([0.5, 0.6])
    words = "12 s after launch, 4 s after the first step, 1 s of it evaluation"
    assert f"reached 60.00% in epoch 2, {words}" in said(reached)
    assert "60.00% was not reached" in said(timed([0.1]))
    shown = {number.name: number for number in numbers(reached).numbers}
    assert (shown["time to 60.00%"].value, shown["time to 60.00%"].remark) == ("12 s", words)
    missed = {number.name: number.value for number in numbers(timed([0.1])).numbers}
    assert missed["time to 60.00%"] == "not reached"


@pytest.mark.parametrize(
    "options", [{}, {"validation_split": 0.25}, {"strategy": "easgd", "lr": 0.005}], ids=str
)
def test_all_ranks_stop_in_step(config: Make, train_in_threads: Train, options: dict[str, object]) -> None:
    """All ranks end after the epoch that reaches it, and the record's times fit the epochs'; with
    --validation-split it watches the held-out images."""
    wanted = {"ranks": 3, "epochs": 30, "target_accuracy": 0.8, **options}
    record, folder, _ = train_in_threads(config(**wanted))
    target, rows = record.target, record.epochs
    assert target is not None
    assert target.reached
    assert target.epoch == rows[-1].epoch < 30
    assert rows[-1].val_accuracy >= 0.8 > max((row.val_accuracy for row in rows[:-1]), default=0)
    assert target.from_launch_s == rows[-1].since_launch_s
    assert target.evaluation_s == pytest.approx(sum(row.evaluation_s or 0 for row in rows))
    assert record.first_step_s is not None
    assert target.from_launch_s is not None
    assert target.from_first_step_s == pytest.approx(target.from_launch_s - record.first_step_s)
    assert target.from_first_step_s >= sum(row.train_s for row in rows) / 2
    assert (folder.checkpoints / f"epoch-{len(rows):04d}").exists()
    held_out = round(tiny.TRAIN * 0.25) if "validation_split" in options else 0
    assert record.samples.trained == record.samples.expected == len(rows) * (tiny.TRAIN - held_out)


def test_a_resumed_run_stops_where_the_whole_one_does(config: Make, train_in_threads: Train) -> None:
    """A run that goes on stops after the same epoch; its times count from the first launch; and if the
    accuracy was reached before it was stopped, nothing more is trained."""
    options = {"ranks": 2, "topology": "allreduce", "target_accuracy": 0.85}
    whole = train_in_threads(config(**options, epochs=30), folder="whole")[0]
    assert whole.target is not None
    assert whole.target.epoch is not None
    assert whole.target.epoch > 1
    first = train_in_threads(config(**options, epochs=1), folder="parts")[0]
    assert first.target == Target(accuracy=0.85, reached=False)
    parts = train_in_threads(config(**options, epochs=30), folder="parts", resume=True)[0]
    assert parts.target is not None
    assert parts.target.epoch == whole.target.epoch
    assert parts.launched_at == first.launched_at
    assert parts.first_step_s == first.first_step_s
    assert parts.target.from_launch_s is not None
    assert parts.target.from_launch_s > (first.epochs[0].since_launch_s or 0)
    again = train_in_threads(config(**options, epochs=30), folder="parts", resume=True)[0]
    assert [row.epoch for row in again.epochs] == [row.epoch for row in parts.epochs]
    assert again.target == parts.target


def test_it_goes_on_without_a_lost_rank(config: Make, train_in_threads: Train) -> None:
    """Ranks that go on without another stop in step all the same, with its samples trained."""
    wanted = config(
        ranks=3, topology="allreduce", sync_every=4, epochs=30, target_accuracy=0.85, on_failure="continue"
    )
    record, _, _ = train_in_threads(wanted, kill_at={1: 40})
    assert len(record.faults) == 1
    assert record.target is not None
    assert record.target.reached
    assert record.target.epoch == len(record.epochs)
    assert record.samples.lost == record.samples.duplicated == 0


@pytest.mark.cold
def test_launch_counts_from_the_command(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: Command
) -> None:
    """What passes before the ranks begin, their interpreter's start included, is counted; and a completed
    run that reached its target has nothing left to do, unless the target is raised."""
    # Far from the rate at which it diverges, and from the accuracy: no processor's rounding decides.
    words = ["--dataset", "digits", "--model", "mlp", "--lr", "0.005", "--epochs", "2", "--threads", "1"]
    done = command.rankwise("train", *words, "--target-accuracy", "0.5", "--out", "run")
    assert done.code == 0, done
    assert "reached 50.00% in epoch 1" in done.out.replace("\n", " ")
    record = RunFolder(tmp_path / "run").read()
    assert record.target is not None
    assert record.target.from_launch_s is not None
    startup_s = record.ranks[0].phases_ns["startup"] / 1e9
    assert record.first_step_s is not None
    assert startup_s - 0.05 < record.first_step_s < record.target.from_launch_s < record.wall_s + 0.05
    folder = str(tmp_path / "run")
    main(["train", "--resume", folder])
    assert "nothing to do" in capsys.readouterr().err
    main(["train", "--resume", folder, "--target-accuracy", "0.999"])
    record = RunFolder(tmp_path / "run").read()
    assert len(record.epochs) == 2
    assert record.target is not None
    assert record.target.accuracy == 0.999


def test_more_than_all_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A target above 1 gets one line that says what is expected, and code 2."""
    with pytest.raises(SystemExit) as end:
        main(["train", "--dataset", "digits", "--target-accuracy", "94"])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        "rankwise: --target-accuracy: '94' was given, expected less than or equal to 1\n"
    )
