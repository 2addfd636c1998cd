"""The experiment with failures: its runs, what is made of them, and the page."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from rankwise.plan import resolve
from rankwise.runs.record import Fault, Record
from rankwise.studies import failures
from rankwise.studies.failures import FULL, QUICK, Found, Setting, Trouble
from rankwise.studies.failures_page import failures_page
from rankwise.studies.study import Study
from tests.records import epochs, rank, record
from tests.test_cli import call

from .conftest import Command
from .effort import only_in_full


def made(accuracy: float, faults: int = 0, *, lost: int = 0) -> Record:
    """A run that came to this accuracy and met so many faults."""
    rows = [row.model_copy(update={"val_accuracy": accuracy}) for row in epochs(2)]
    run = record([rank(0), rank(1)], epochs=rows)
    struck = [Fault(rank=1, kind="kill", epoch=1, action="continue")] * faults
    samples = run.samples.model_copy(update={"lost": lost})
    wall_s = run.ranks[0].wall_ns / 1e9
    return run.model_copy(update={"faults": struck, "samples": samples, "elapsed_s": wall_s + 3})


def found(trouble: Trouble, sleep: float, kill: float, *, lost: int = 0) -> Found:
    """Runs of all settings: without failures at 70%, with others at these accuracies, three seeds each."""
    by_kind = {"none": 0.7, "sleep": sleep, "kill": kill}
    return {
        setting: [
            made(by_kind[setting.kind] + 0.001 * seed, int(setting.kind != "none"), lost=lost)
            for seed in range(3)
        ]
        for setting in trouble.settings()
    }


@pytest.mark.parametrize("trouble", [FULL, QUICK])
def test_every_run_is_one_that_can_be_started(trouble: Trouble) -> None:
    """Names are unique, options are those of a run, and each kind meets each probability at each size."""
    settings = trouble.settings()
    assert len({setting.name for setting in settings}) == len(settings)
    kinds = {(s.processes, s.kind, s.probability) for s in settings if s.probability}
    assert len(kinds) == len(trouble.processes) * len(failures.KINDS) * len(trouble.probabilities)
    for setting in settings:
        config = resolve(Study("faults").config(trouble.run_options(setting), seed=0))
        assert config.ranks == setting.processes
        assert bool(config.fault) == bool(setting.probability)


def test_parts_add_up() -> None:
    """The parts of a run's time add up to what it took from start to end."""
    run = made(0.5)
    assert sum(failures.parts_s(run).values()) == pytest.approx(run.elapsed_s)
    assert failures.parts_s(run)[failures.BEFORE] == pytest.approx(3)


@pytest.mark.parametrize(
    ("sleep", "kill", "lost", "answers"),
    [
        (0.7, 0.7, 0, ["holds", "holds", "holds"]),
        (0.7, 0.6, 0, ["holds", "holds", "does not hold"]),
        (0.5, 0.7, 2, ["does not hold", "does not hold", "holds"]),
    ],
)
def test_verdicts(sleep: float, kill: float, lost: int, answers: list[str]) -> None:
    """Lost samples and lost accuracy are called so; a short form decides nothing about accuracy."""
    runs = found(FULL, sleep, kill, lost=lost)
    assert [v.answer for v in failures.judge(FULL, runs, 10_000, quick=False)] == answers
    assert [v.answer for v in failures.judge(FULL, runs, 10_000, quick=True)][1:] == ["undecided"] * 2


def test_the_page_and_the_table(tmp_path: Path) -> None:
    """A row a setting, all in a page that names its command; nothing run is said to be so."""
    runs = found(FULL, 0.7, 0.69)
    rows = list(csv.reader(io.StringIO(failures.failures_grid(FULL, runs).to_csv())))
    assert len(rows) == 1 + len(FULL.settings())
    judged = failures.judge(FULL, runs, 10_000, quick=False)
    for its, words in ((runs, "killed, p = 0.2"), ({}, "Nothing was run here yet")):
        page = tmp_path / "page.html"
        failures_page(FULL, its, judged, "cifar10", "rankwise reproduce faults", quick=False).write(page)
        text = page.read_text()
        assert words in text
        assert "rankwise reproduce faults" in text
    assert Setting(4, "kill", 0.2) in runs


def test_a_folder_that_holds_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder with other files is refused in one line, and left as it is."""
    (tmp_path / "thesis.txt").write_text("mine")
    assert call("reproduce", "faults", "--quick", "--dataset", "digits", "--output", str(tmp_path)) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.mpi
@only_in_full
@pytest.mark.ulfm
@pytest.mark.timeout(240)
def test_the_short_form(command: Command, tmp_path: Path) -> None:
    """The study runs from its command line to its page; a second call keeps what is finished."""
    words = ("reproduce", "faults", "--quick", "--dataset", "digits", "--output", "study")
    done = command.rankwise(*words, timeout=200)
    assert done.code == 0, done
    runs = [Record.model_validate_json(path.read_bytes()) for path in (tmp_path / "study/records").iterdir()]
    assert len(runs) == len(QUICK.settings())
    assert all(run.samples.trained == run.samples.expected for run in runs)
    assert any(run.faults for run in runs)
    assert (tmp_path / "study/failures.html").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "study/records").iterdir()}
    assert command.rankwise(*words).code == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
