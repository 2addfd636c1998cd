"""The study on language: what is trained, what is made of the runs, and the page."""

from __future__ import annotations

import io
import json
import math
import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import local
from typing import Any

import pytest
import torch
from rich.console import Console

import rankwise
from rankwise.api import Run
from rankwise.comm import World, run_in_threads
from rankwise.config import PROGRAM_OPTIONS
from rankwise.data.text import FEWEST, read_text
from rankwise.errors import DataError
from rankwise.program_plan import program_plan
from rankwise.runs.progress import ProgressFile
from rankwise.runs.record import Epoch, Record
from rankwise.studies import language, runner
from rankwise.studies.folder import StudyFolder
from rankwise.studies.language import BLOCK, EPOCHS, QUICK, Score, Task, curve, loss_at
from rankwise.studies.language_page import curve_grid, judge, language_page, score_grid
from rankwise.studies.study_progress import StudyProgress
from tests import records
from tests.effort import only_in_full
from tests.records import rank, record
from tests.test_cli import call
from tests.test_run_examples import by_shape

FULL = Task()
ENTRANTS = {one.name: one for one in FULL.entrants}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows(
    losses: Sequence[float], *, windows: int = 1000, steps: int = 64, epoch_s: float = 2.0
) -> list[Epoch]:
    """Epochs of a program that ended with these held-out losses."""
    return [
        Epoch(
            epoch=number,
            train_loss=loss,
            val_loss=loss,
            train_samples=windows,
            steps=steps,
            learning_rate=0.001,
            wall_s=epoch_s + 1,
            train_s=epoch_s,
        )
        for number, loss in enumerate(losses, start=1)
    ]


def made(losses: Sequence[float], *, sent: int = 1_000_000, **more: Any) -> Record:
    """A run of two ranks of a program."""
    return record([rank(0, bytes_sent=sent), rank(1, bytes_sent=sent)], epochs=rows(losses, **more))


def scored(finals: Mapping[str, Sequence[Record]], linked: Mapping[str, Record] | None = None) -> list[Score]:
    return language.scores(FULL, {name: (0.001, its) for name, its in finals.items()}, linked or {})


def answers(
    losses: Mapping[str, list[float]],
    sent: Mapping[str, int] | None = None,
    seconds: Mapping[str, float] | None = None,
) -> dict[str, str]:
    """The verdicts on entrants with these last losses, one a seed, by how the claim begins."""
    finals = {
        name: [
            made([3.0, loss], sent=(sent or {}).get(name, 1_000_000), epoch_s=(seconds or {}).get(name, 2.0))
            for loss in its
        ]
        for name, its in losses.items()
    }
    return {verdict.claim: verdict.answer for verdict in judge(scored(finals), quick=False)}


@pytest.mark.parametrize("task", [FULL, QUICK, Task(ranks=3, tokens=100_000)], ids=["full", "quick", "three"])
def test_every_run_is_one_that_can_be_started(task: Task) -> None:
    """Each entrant's options are those of a program on as many ranks, and no two runs have one name."""
    for one in task.entrants:
        options = task.run_options(one, epochs=EPOCHS)
        assert set(options) <= set(PROGRAM_OPTIONS)
        program = tuple(task.program(0.001, 0, epochs=EPOCHS))
        plan = program_plan(rankwise.TrainConfig(**options), program)
        assert (plan.ranks, plan.epochs) == (task.ranks, EPOCHS)
        assert Path(program[0]).is_file()
    names = {
        task.name(one, rate, final=end)
        for one in task.entrants
        for rate in task.rates
        for end in (True, False)
    }
    assert len(names) == 2 * len(task.entrants) * len(task.rates)


def test_equal_tokens() -> None:
    """All entrants train as many windows; by default an epoch is as long as DiLoCo's round of 500 steps."""
    assert FULL.windows * EPOCHS * BLOCK == FULL.tokens
    assert FULL.steps == 500
    assert {language.sync_every(one, first_half=False) for one in FULL.entrants} == {1, 8, 32, 500}
    assert language.sync_every(ENTRANTS["post-local-sgd"], first_half=True) == 1


def test_a_short_run_over_the_link_has_whole_rounds() -> None:
    """It has no more windows than an epoch of the final run, and rounds as long."""
    words = {name: FULL.link_program(one) for name, one in ENTRANTS.items()}
    windows = {name: int(its[its.index("--windows") + 1]) for name, its in words.items()}
    assert windows["diloco long"] == FULL.windows
    assert windows["allreduce"] == windows["diloco"] == 64 * 16 < FULL.windows


def test_the_best_rate_has_the_lowest_loss() -> None:
    """A run that diverged has no loss, and is not chosen."""
    lost = made([3.0, 2.0])
    lost.epochs[-1].val_loss = None
    assert language.best_rate({0.001: made([3.0, 2.5]), 0.003: made([2.0, 2.4]), 0.01: lost}) == 0.003


def test_where_a_run_stood_after_each_epoch() -> None:
    """Tokens and seconds add up; bytes go by exchanges, of which post-local SGD has eight times as many in
    its first half, so that this half is as slow over the link as the short run's first epoch."""
    ours = made([3.0, 2.5, 2.2, 2.0], sent=900)
    link = made([3.0, 2.9], windows=100, epoch_s=1.0)
    link.epochs[1].train_s = 0.5
    post = curve(ENTRANTS["post-local-sgd"], ours, link)
    assert [point.tokens for point in post] == [64_000, 128_000, 192_000, 256_000]
    assert [point.bytes_sent for point in post] == pytest.approx([800, 1600, 1700, 1800])
    assert [point.seconds for point in post] == [2, 4, 6, 8]
    assert [point.linked_s for point in post] == pytest.approx([10, 20, 25, 30])
    even = curve(ENTRANTS["local-sgd"], ours, link)
    assert [point.linked_s for point in even] == pytest.approx([5, 10, 15, 20])
    plain = curve(ENTRANTS["local-sgd"], ours, None)
    assert [point.bytes_sent for point in plain] == pytest.approx([450, 900, 1350, 1800])
    assert [point.linked_s for point in plain] == [None] * 4


def test_the_loss_after_some_time() -> None:
    """It lies on a straight line between two epochs; before the first nothing is known of it."""
    points = [(2.0, 3.0), (4.0, 2.0), (6.0, 1.8)]
    assert loss_at(points, 1.9) is None
    assert loss_at(points, 3.0) == pytest.approx(2.5)
    assert [loss_at(points, x) for x in (2.0, 4.0, 6.0, 7.0)] == [3.0, 2.0, 1.8, 1.8]


def test_equal_time_ends_with_the_fastest() -> None:
    """The fastest entrant says when it is over, here and over the link apart."""
    found = scored(
        {"allreduce": [made([3.0, 2.0], epoch_s=4)], "diloco": [made([3.0, 2.4], epoch_s=3)]},
        {"allreduce": made([3.0, 3.0], epoch_s=20), "diloco": made([3.0, 3.0], epoch_s=10)},
    )
    by_name = {score.entrant.name: score for score in found}
    assert by_name["diloco"].in_time == [2.4]
    assert by_name["allreduce"].in_time == pytest.approx([2.5])
    assert by_name["diloco"].linked_in_time == [2.4]
    assert by_name["allreduce"].linked_in_time == [3.0]


SAME, MORE, LESS, NOISE = [2.0, 2.001, 2.002], [2.1, 2.101, 2.102], [1.9, 1.901, 1.902], [1.5, 2.0, 2.5]
LOCAL, POST = "Local SGD is as good", "Post-local SGD"
LONG, SHORT = "DiLoCo is as good", "DiLoCo with short"
POWER, FASTER, SLOW, TOP = "PowerSGD of rank 4", "PowerSGD is faster", "SlowMo", "99%"


@pytest.mark.parametrize(
    ("claim", "losses", "sent", "answer"),
    [
        (LOCAL, {"local-sgd": SAME, "allreduce": SAME}, {"local-sgd": 125_000}, "holds"),
        (LOCAL, {"local-sgd": LESS, "allreduce": SAME}, {"local-sgd": 125_000}, "holds"),
        (LOCAL, {"local-sgd": MORE, "allreduce": SAME}, {"local-sgd": 125_000}, "does not hold"),
        (LOCAL, {"local-sgd": SAME, "allreduce": SAME}, {}, "does not hold"),
        (LOCAL, {"local-sgd": SAME, "allreduce": SAME}, {"local-sgd": 400_000}, "undecided"),
        (LOCAL, {"local-sgd": NOISE, "allreduce": SAME}, {"local-sgd": 125_000}, "undecided"),
        (LOCAL, {"local-sgd": [2.0], "allreduce": [2.0]}, {"local-sgd": 125_000}, "undecided"),
        (POST, {"post-local-sgd": LESS, "allreduce": SAME}, {}, "holds"),
        (POST, {"post-local-sgd": MORE, "allreduce": SAME}, {}, "does not hold"),
        (POST, {"post-local-sgd": SAME, "allreduce": SAME}, {}, "undecided"),
        (LONG, {"diloco long": SAME, "allreduce": SAME}, {"diloco long": 2_000}, "holds"),
        (LONG, {"diloco long": SAME, "allreduce": SAME}, {"diloco long": 20_000}, "undecided"),
        (LONG, {"diloco long": MORE, "allreduce": SAME}, {"diloco long": 2_000}, "does not hold"),
        (SHORT, {"diloco": SAME, "allreduce": SAME}, {}, "holds"),
        (SHORT, {"diloco": MORE, "allreduce": SAME}, {}, "does not hold"),
        (POWER, {"allreduce powersgd:4": SAME, "allreduce": SAME}, {}, "holds"),
        (POWER, {"allreduce powersgd:4": MORE, "allreduce": SAME}, {}, "does not hold"),
        (SLOW, {"slowmo": LESS, "local-sgd": SAME}, {}, "holds"),
        (SLOW, {"slowmo": MORE, "local-sgd": SAME}, {}, "does not hold"),
        (SLOW, {"slowmo": LESS, "allreduce": SAME}, {}, "undecided"),
        (TOP, {"allreduce topk:0.01": SAME, "allreduce": SAME}, {}, "holds"),
        (TOP, {"allreduce topk:0.01": MORE, "allreduce": SAME}, {}, "does not hold"),
    ],
)  # fmt: skip
def test_claims_of_the_literature(
    claim: str, losses: dict[str, list[float]], sent: dict[str, int], answer: str
) -> None:
    """A verdict follows from the difference of losses, seed by seed, how sure it is, and from the bytes."""
    (found,) = (its for text, its in answers(losses, sent).items() if text.startswith(claim))
    assert found == answer


def test_as_good_is_two_percent_of_perplexity() -> None:
    """A loss that is higher for sure is as good up to 0.02 nats, and no further."""
    for excess, answer in ((0.015, "holds"), (0.025, "does not hold")):
        found = answers({"diloco": [loss + excess for loss in SAME], "allreduce": SAME})
        assert {its for text, its in found.items() if text.startswith(SHORT)} == {answer}


@pytest.mark.parametrize(
    ("here", "linked", "answer"),
    [
        (1.0, [1.0, 1.0], "holds"),
        (3.0, [1.0, 1.0], "does not hold"),
        (1.0, [3.0, 3.0], "does not hold"),
        (1.0, [1.0, 9.0], "undecided"),
        (1.0, None, "undecided"),
        (2.1, [1.0, 1.0], "undecided"),
    ],
)
def test_faster_is_everywhere(here: float, linked: list[float] | None, answer: str) -> None:
    """PowerSGD's speed-up holds where it was timed both here and over the link, and was faster in both;
    epochs of a short run that differ much among themselves tell nothing."""
    ours = "allreduce powersgd:4"
    finals = {ours: [made([3.0, 2.0], epoch_s=here)], "allreduce": [made([3.0, 2.0], epoch_s=2.0)]}
    links = {}
    if linked is not None:
        links = {ours: made([3.0, 3.0]), "allreduce": made([3.0, 3.0])}
        for row, seconds in zip(links[ours].epochs, linked, strict=True):
            row.train_s = seconds
    (found,) = (its for its in judge(scored(finals, links), quick=False) if its.claim.startswith(FASTER))
    assert found.answer == answer


def test_a_page_of_nothing_and_of_some() -> None:
    """The page says what was not run, and shows what was; a short form decides nothing; rows fit JSON."""

    def page(found: list[Score], *, quick: bool) -> str:
        return language_page(FULL, found, judge(found, quick=quick), "the command", quick=quick).to_html()

    nothing = page([], quick=False)
    assert "Nothing was run here yet" in nothing
    assert nothing.count("undecided") >= len(judge([], quick=False))
    some = scored(
        {"allreduce": [made([3.0, loss]) for loss in SAME], "diloco": [made([3.0, loss]) for loss in SAME]}
    )
    assert f"{SHORT} rounds is as good as synchronous training: holds" in page(some, quick=False)
    assert f"{SHORT} rounds is as good as synchronous training: undecided" in page(some, quick=True)
    assert "benchmarks/slow_link.py" in page(some, quick=False)
    (row, _) = score_grid(FULL, some).to_rows()
    assert row["loss (nats)"]["mean"] == pytest.approx(2.001)
    assert row["training at 100 Mbit/s (s)"] is None
    assert len(curve_grid(some).to_rows()) == 2 * 3 * 2
    json.dumps(score_grid(FULL, scored({"diloco": [made([3.0, math.nan])]})).to_rows(), allow_nan=False)


def test_a_text(tmp_path: Path) -> None:
    """Without a file there is the help of Python, in English; a file is read as it is, in UTF-8."""
    assert len(read_text()) > 10 * FEWEST
    (tmp_path / "text").write_text("ä" * FEWEST, encoding="utf-8")
    assert read_text(tmp_path / "text") == "ä" * FEWEST
    (tmp_path / "text").write_bytes(b"\xff" * FEWEST)
    with pytest.raises(DataError, match="no text in UTF-8"):
        read_text(tmp_path / "text")


STUDY = ["reproduce", "strategies", "--task", "language", "--quick", "--output", "study"]
BAD_INPUT: list[tuple[list[str], list[str]]] = [
    ([*STUDY[:2], "--text", "plays.txt"], ["--text plays.txt", "--task language"]),
    ([*STUDY[:2], "--tokens", "100000"], ["--tokens 100000", "--task language"]),
    (["reproduce", "faults", "--task", "language"], ["faults", "strategies"]),
    ([*STUDY, "--dataset", "digits"], ["--dataset digits", "--text"]),
    ([*STUDY, "--data-dir", "here"], ["--data-dir here", "--text"]),
    ([*STUDY, "--text", "nowhere.txt"], ["nowhere.txt", "No such file"]),
    ([*STUDY, "--text", "/dev/null"], ["/dev/null", "0 characters", "20,000"]),
    ([*STUDY, "--ranks", "1"], ["--ranks 1", "2 to 16"]),
    ([*STUDY, "--ranks", "17"], ["--ranks 17", "2 to 16"]),
    ([*STUDY, "--tokens", "-5"], ["--tokens -5", "10000"]),
    ([*STUDY, "--width", "60"], ["--width 60", "8"]),
    ([*STUDY, "--lr", "-1"], ["--lr -1", "between 0 and 1"]),
    ([*STUDY[:2], "--task", "speech"], ["speech", "language"]),
]


@pytest.mark.parametrize(("words", "expected"), BAD_INPUT, ids=lambda value: " ".join(value)[-40:])
def test_bad_input(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Bad input ends with code 2 and one line that says what to do, before anything is written."""
    assert call(*words) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1, err
    assert all(word in err for word in expected), err
    assert out == ""
    assert list(tmp_path.iterdir()) == []


def run_the_study(capsys: pytest.CaptureFixture[str], task: Task) -> dict[str, Any]:
    """Call the command twice, of which the second trains nothing; returns what it said as JSON."""
    assert call(*STUDY, "--format", "json") == 0
    done: dict[str, Any] = json.loads(capsys.readouterr().out)
    page = Path(done["page"])
    assert page.name == "language.html"
    assert "is as good as synchronous training" in page.read_text()
    assert [row["strategy"] for row in done["tables"]["language"]] == [one.name for one in task.entrants]
    assert len(done["tables"]["language_curves"]) == EPOCHS * len(task.entrants)
    assert {verdict["answer"] for verdict in done["verdicts"]} == {"undecided"}
    before = {path: path.stat().st_mtime_ns for path in Path("study/records").iterdir()}
    assert len(before) == len(task.entrants) * (len(task.rates) + 1)
    for path in before:
        assert str(Path.cwd()) not in path.read_text()
    assert call(*STUDY) == 0
    assert {path: path.stat().st_mtime_ns for path in Path("study/records").iterdir()} == before
    return done


@pytest.mark.parametrize("best", language.RATES)
def test_the_rate_that_did_best_is_the_finals(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, best: float
) -> None:
    """One command tries each rate on held-out text, trains finally with the best, and ends with a page;
    again, it trains nothing, and another text is refused. What trains is a stub here."""
    tried = []

    def trained(run: runner.Run, folder: StudyFolder, _: object) -> Record:
        rate = float(run.program[run.program.index("--lr") + 1])
        tried.append(("--tuning" in run.program, rate))
        last = 2.0 if rate == best else 2.5
        return records.trained(run, folder, rows([3.0] * (run.config.epochs - 1) + [last]))

    monkeypatch.setattr(runner, "_train", trained)
    done = run_the_study(capsys, QUICK)
    assert {rate for tuning, rate in tried if not tuning} == {best}
    assert {row["learning rate"] for row in done["tables"]["language"]} == {best}
    capsys.readouterr()
    Path("other.txt").write_text("to be or not to be " * 2000)
    assert call(*STUDY, "--text", "other.txt") == 2
    assert "holds a study with text" in capsys.readouterr().err


def test_a_strategy_that_never_trained(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If no rate of an entrant trains, the study ends with code 1 and its words; if one does, with 0."""
    bad = {0.001, 0.003}

    def trained(run: runner.Run, folder: StudyFolder, _: object) -> Record | str:
        rate = float(run.program[run.program.index("--lr") + 1])
        if run.config.strategy == "diloco" and rate in bad:
            return "it diverged"
        return records.trained(run, folder, rows([3.0] * run.config.epochs))

    monkeypatch.setattr(runner, "_train", trained)
    assert call(*STUDY) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "2 of 4 runs failed" in last
    assert "it diverged" in last
    bad.remove(0.003)
    assert call(*STUDY) == 0


@only_in_full
@pytest.mark.mpi
@pytest.mark.timeout(400)
def test_from_the_command_to_the_page(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same in real ranks, which `rankwise run` starts."""
    task = replace(QUICK, only=("diloco",))
    monkeypatch.setattr(language, "QUICK", task)
    done = run_the_study(capsys, task)
    losses = [row["loss (nats)"] for row in done["tables"]["language_curves"]]
    assert losses[-1] < losses[0] < 6
    assert done["tables"]["language"][0]["sent by all ranks (MB)"] > 0


def test_a_program_is_started_by_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A study's run with a program is a `rankwise run`, its options in front of the script; one that was
    stopped goes on by its folder alone."""
    commands: list[list[str]] = []

    def supervise(command: list[str], log: Path, _: object) -> int:
        commands.append(command)
        log.write_text("it failed")
        return 1

    monkeypatch.setattr(runner, "_supervise", supervise)
    folder = StudyFolder(tmp_path / "study")
    folder.create({})
    one = ENTRANTS["diloco"]
    config = rankwise.TrainConfig(**FULL.run_options(one, epochs=EPOCHS), seed=3)
    run = runner.Run("it", config, 100, tuple(FULL.program(0.001, 3, epochs=EPOCHS)))
    with StudyProgress(Console(stderr=True), [1.0]) as board:
        runner._train(run, folder, board)
        stopped = made([3.0])
        stopped.config.update(config.model_dump(mode="json", include=config.model_fields_set))
        records.run_folder(folder.run("it").path, stopped)
        runner._train(run, folder, board)
    first, resumed = commands[0][3:], commands[2][3:]
    assert first[0] == "run"
    place = first.index(str(language.PROGRAM))
    assert first[place:] == list(run.program)
    assert {"--strategy", "--sync-every", "--seed", "--out"} <= set(first[:place])
    assert resumed == ["run", "--resume", str(folder.run("it").path)]


class _Heard(Run):
    """Keeps what is logged."""

    logged: list[float]

    def log(self, weight: float | None = None, **values: Any) -> None:
        super().log(weight, **values)
        if "val_loss" in values:
            self.logged.append(self.mean(values["val_loss"]))


def _program(ranks: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The held-out losses of the program on some ranks, after each of its epochs."""
    for name in ("uniform_", "normal_", "kaiming_uniform_"):  # threads share torch's generator
        monkeypatch.setattr(torch.nn.init, name, by_shape(getattr(torch.nn.init, name)))
    Path("text.txt").write_text("to be or not to be, that is the question; " * 500)
    here = local()
    heard: list[float] = []
    monkeypatch.setattr(_Heard, "logged", heard, raising=False)
    monkeypatch.setattr(rankwise, "Run", lambda: _Heard(world=here.world))
    words = [
        "--epochs",
        "2",
        "--windows",
        "24",
        "--batch-size",
        batch,
        "--width",
        16,
        "--layers",
        1,
        "--block",
        8,
    ]
    monkeypatch.setattr(
        sys,
        "argv",
        [str(language.PROGRAM), *map(str, words), "--held-out", "30", "--lr", "0.01", "--text", "text.txt"],
    )

    def program(world: World) -> None:
        here.world = world
        runpy.run_path(str(language.PROGRAM), run_name="__main__")

    run_in_threads(ranks, program)
    return heard[::ranks]


def test_two_ranks_learn_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program has on two ranks the held-out losses of one with their batch together."""
    alone = _program(1, 8, monkeypatch)
    assert alone[1] < alone[0] < math.log(27)
    assert _program(2, 4, monkeypatch) == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_board_of_a_program(tmp_path: Path, terminal: bool) -> None:
    """Of a run that has no accuracy, the held-out loss is shown."""
    screen = io.StringIO()
    folder = records.run_folder(tmp_path / "run", made([3.0, 2.5]))
    ProgressFile(folder.progress, 0, 1).start(2)
    with StudyProgress(Console(file=screen, force_terminal=terminal, width=140), [10.0]) as board:
        board.start("it")
        board.look("it", folder, 2, 1000)
        board.finish("it", made([3.0, 2.5]))
    assert "held-out loss 2.500" in screen.getvalue()
