"""The contest between strategies: who takes part, what is made of the runs, and the page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rankwise.plan import resolve
from rankwise.runs.record import Epoch, Record
from rankwise.strategies import STRATEGIES
from rankwise.studies import runner, strategy_comparison
from rankwise.studies.folder import StudyFolder
from rankwise.studies.strategy_comparison import COURSES, QUICK_COURSES, Course, Score
from rankwise.studies.strategy_comparison_page import contest_page, judge, score_grid
from rankwise.studies.study import Study
from tests import records
from tests.effort import only_in_full
from tests.records import epochs, rank, record
from tests.test_cli import call

COURSE = COURSES[0]
VAL_SAMPLES = 10_000


def made(accuracies: list[float], *, epoch_s: float = 2.0, sent: int = 1_000_000) -> Record:
    """A run of two ranks whose epochs reached these accuracies."""
    rows: list[Epoch] = [
        row.model_copy(update={"val_accuracy": accuracy, "wall_s": epoch_s, "train_s": 0.75 * epoch_s})
        for row, accuracy in zip(epochs(len(accuracies)), accuracies, strict=True)
    ]
    return record([rank(0, bytes_sent=sent), rank(1, bytes_sent=sent)], epochs=rows)


def scored(finals: Mapping[str, list[Record]], linked: Mapping[str, Record] | None = None) -> list[Score]:
    return strategy_comparison.scores(
        COURSE, {name: (0.01, runs) for name, runs in finals.items()}, linked or {}
    )


def answers(accuracy: Mapping[str, list[float]], **sent: int) -> dict[str, str]:
    """The verdicts on entrants with these last accuracies, one a seed, by the first word of the claim."""
    finals = {
        name: [made([0.1, last], sent=sent.get(name.replace(" ", "_"), 1_000_000)) for last in rows]
        for name, rows in accuracy.items()
    }
    return {verdict.claim.split()[0]: verdict.answer for verdict in judge(scored(finals), VAL_SAMPLES)}


@pytest.mark.parametrize("course", [*COURSES, *QUICK_COURSES], ids=lambda course: course.model)
def test_every_run_is_one_that_can_be_started(course: Course) -> None:
    """Each entrant's options, tuning and final, are those of a run with the same number of workers."""
    for entrant in course.entrants:
        for final in (False, True):
            options = course.run_options(entrant, 0.01, final=final)
            config = resolve(Study("strategies").config(options, seed=0))
            assert config.workers == strategy_comparison.WORKERS
    names = {course.name(one, rate, final=False) for one in course.entrants for rate in course.rates}
    assert len(names) == len(course.entrants) * len(course.rates)


def test_nobody_is_left_out() -> None:
    """Each strategy of the table takes part, but for those whose ranks do not share the work, and the one
    that is allreduce on a single host."""
    runs = {entrant.options["strategy"] for entrant in COURSES[0].entrants}
    assert set(STRATEGIES) - runs == {"single", "replication", "paper-stopwatch", "two-level"}
    forms = {str(entrant.options.get("compress", "none")).split(":")[0] for entrant in COURSES[0].entrants}
    assert forms == {"none", "fp16", "bf16", "int8", "topk", "sign", "powersgd"}


def test_the_best_rate_is_chosen_on_held_out_samples() -> None:
    """The rate is that of the best short run, none of which sees the test set."""
    tuned = {0.01: made([0.3, 0.5]), 0.03: made([0.6, 0.4]), 0.1: made([0.2, 0.45])}
    assert strategy_comparison.best_rate(tuned) == 0.01
    for course in (*COURSES, *QUICK_COURSES):
        assert course.tuning["validation_split"]
        assert "validation_split" not in course.options


def test_equal_time_ends_with_the_fastest() -> None:
    """At equal time counts the best epoch that was over when the fastest entrant was through."""
    fast, slow = made([0.2, 0.4, 0.5], epoch_s=2), made([0.3, 0.6, 0.7], epoch_s=3)
    crawling = made([0.5, 0.6, 0.7], epoch_s=7)
    rows = {
        row.entrant.name: row for row in scored({"allreduce": [fast], "ddp": [slow], "easgd": [crawling]})
    }
    assert [row.accuracy.mean for row in rows.values()] == [0.5, 0.7, 0.7]
    in_time = [rows[name].in_time for name in ("allreduce", "ddp", "easgd")]
    assert [its and its.mean for its in in_time] == [0.5, 0.6, None]


def test_a_short_run_over_the_link_stands_for_a_whole_epoch() -> None:
    """Training over the link is scaled to the samples of an epoch; the rest of it is as without."""
    here = made([0.2, 0.3], epoch_s=4)  # of which 3 s are training, of 10,000 samples
    link = record(
        2, epochs=[row.model_copy(update={"train_s": 8.0}) for row in epochs(1, train_samples=2000)]
    )
    (row,) = scored({"allreduce": [here]}, {"allreduce": link})
    assert row.linked_epoch_s == pytest.approx(5 * 8.0 + 1.0)


def test_bytes_are_those_of_all_ranks() -> None:
    """The table counts what all ranks sent in the whole run, and how many times fewer than the reference."""
    rows = scored(
        {"allreduce": [made([0.5, 0.6], sent=8_000_000)], "local-sgd": [made([0.5, 0.6], sent=1_000_000)]}
    )
    grid = score_grid(COURSE, rows)
    table = list(csv.DictReader(io.StringIO(grid.to_csv())))
    assert [float(row["sent by all ranks (MB)"]) for row in table] == [16, 2]
    assert [float(row["times fewer bytes than allreduce"]) for row in table] == [1, 8]


SAME = [0.60, 0.61, 0.59]
MORE = [0.65, 0.66, 0.64]
LESS = [0.55, 0.56, 0.54]
NOISE = [0.50, 0.70, 0.60]

VERDICTS = [
    ("Post-local", {"post-local-sgd": SAME, "allreduce": SAME}, "holds"),
    ("Post-local", {"post-local-sgd": LESS, "allreduce": SAME}, "does not hold"),
    ("Post-local", {"post-local-sgd": NOISE, "allreduce": SAME}, "undecided"),
    ("Post-local", {"allreduce": SAME}, "undecided"),
    ("PowerSGD", {"allreduce powersgd:2": MORE, "allreduce": SAME}, "holds"),
    ("PowerSGD", {"allreduce powersgd:2": LESS, "allreduce": SAME}, "does not hold"),
    ("EASGD", {"easgd": MORE, "downpour": SAME}, "holds"),
    ("EASGD", {"easgd": LESS, "downpour": SAME}, "does not hold"),
    ("EASGD", {"easgd": SAME, "downpour": SAME}, "undecided"),
]


@pytest.mark.parametrize(("claim", "accuracy", "answer"), VERDICTS, ids=lambda value: str(value)[:40])
def test_claims_of_the_literature(claim: str, accuracy: dict[str, list[float]], answer: str) -> None:
    """A verdict follows from the difference, seed by seed, and how sure it is."""
    assert answers(accuracy)[claim] == answer


@pytest.mark.parametrize(
    ("sent", "last", "answer"),
    [
        (1_000, SAME, "holds"),
        (1_000, LESS, "does not hold"),
        (5_000, SAME, "undecided"),
        (50_000, SAME, "does not hold"),
    ],
)
def test_far_fewer_bytes(sent: int, last: list[float], answer: str) -> None:
    """DiLoCo's claim needs both: hundreds of times fewer bytes, and no loss."""
    found = answers({"diloco 500": last, "allreduce": SAME}, diloco_500=sent)
    assert found["DiLoCo"] == answer


def test_a_page_of_nothing_and_of_some() -> None:
    """The page says what was not run, and shows what was; a short form decides nothing."""
    study = Study("strategies")

    def page(scores: list[Score], *, quick: bool) -> str:
        judged = judge(scores, VAL_SAMPLES)
        return contest_page({COURSE: scores}, judged, study.dataset, study.command, quick).to_html()

    nothing = page([], quick=False)
    assert "Nothing was run here yet" in nothing
    assert nothing.count("undecided") >= 4
    some = scored({"easgd": [made([0.2, 0.7])] * 3, "downpour": [made([0.2, 0.5])] * 3})
    assert "EASGD is ahead of Downpour: holds" in page(some, quick=False)
    short = page(some, quick=True)
    assert "EASGD is ahead of Downpour: undecided" in short
    assert "tells nothing about accuracy" in short


def only_easgd(monkeypatch: pytest.MonkeyPatch) -> Course:
    """Let one entrant of the short form take part."""
    course = QUICK_COURSES[0]
    entrants = tuple(one for one in course.entrants if one.name == "easgd")
    monkeypatch.setattr(strategy_comparison, "QUICK_COURSES", (replace(course, entrants=entrants),))
    return course


def run_the_study(course: Course, capsys: pytest.CaptureFixture[str]) -> float:
    """Call the command twice, of which the second trains nothing; returns the learning rate of the final."""
    words = ["reproduce", "strategies", "--quick", "--dataset", "digits", "--output", "study"]
    assert call(*words, "--format", "json") == 0
    done: dict[str, Any] = json.loads(capsys.readouterr().out)
    page = Path(done["page"])
    assert page.name == "strategies.html"
    assert "easgd" in page.read_text()
    names = {path.stem for path in Path("study/records").iterdir()}
    (easgd,) = (one for one in course.entrants if one.name == "easgd")
    tuning = {f"{course.name(easgd, rate, final=False)}-seed0" for rate in course.rates}
    assert tuning < names
    (final,) = names - tuning
    (row,) = csv.DictReader(Path(f"study/tables/strategies_{course.model}.csv").read_text().splitlines())
    rate = float(row["learning rate"])
    assert final == f"{course.name(easgd, rate, final=True)}-seed0"
    before = {path: path.stat().st_mtime_ns for path in Path("study/records").iterdir()}
    assert call(*words) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("study/records").iterdir()} == before
    return rate


@pytest.mark.parametrize("best", [0.01, 0.05])
def test_the_rate_that_did_best_is_the_finals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    """One command tries each rate on held-out samples, trains finally with the best, and ends with a page;
    again, it trains nothing. What trains is a stub here."""

    def trained(run: runner.Run, folder: StudyFolder, _: object) -> Record:
        return records.trained(run, folder, made([0.1, 0.6 if run.config.lr == best else 0.5]).epochs)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_train", trained)
    assert run_the_study(only_easgd(monkeypatch), capsys) == best


def test_a_strategy_that_never_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no rate of an entrant trains, the study ends with code 1 and the words of those runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_train", lambda *_: "it diverged")
    only_easgd(monkeypatch)
    assert call("reproduce", "strategies", "--quick", "--dataset", "digits", "--output", "study") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 2 runs failed" in last
    assert "it diverged" in last


@only_in_full
@pytest.mark.mpi
@pytest.mark.timeout(300)
def test_from_the_command_to_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in real ranks."""
    monkeypatch.chdir(tmp_path)
    assert run_the_study(only_easgd(monkeypatch), capsys) in QUICK_COURSES[0].rates
