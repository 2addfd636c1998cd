"""What a study finds: intervals, verdicts that flip, shares that add up, and every cell on the page."""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rankwise.ledger.phases import PHASES
from rankwise.runs.record import Epoch, Rank, Record
from rankwise.studies import grids, paper, plan
from rankwise.studies.ledgers import PARTS, breakdown, communication, growth
from rankwise.studies.page import study_page
from rankwise.studies.plan import FULL, QUICK, Scale, Trial
from rankwise.studies.results import Results, best_accuracy
from rankwise.studies.statistics import accuracy_difference, estimate, time_ratio
from rankwise.studies.verdicts import Verdict, judge

from . import records

VAL_SAMPLES = 10_000
TIMED_3_S = paper.TABLE_1[3].time_s / 25


def an_epoch(number: int, accuracy: float, wall_s: float) -> Epoch:
    (row,) = records.epochs(1, wall_s=wall_s)
    changes = {"epoch": number, "val_accuracy": accuracy, "val_loss": 1.0, "train_loss": 1.2}
    return row.model_copy(update=changes)


def made(trial: Trial, accuracy: float, epoch_s: float, **more: Any) -> Record:
    """A finished run of a trial with epochs of `epoch_s` seconds; `accuracy` is its best, in the last but
    one."""
    options = trial.options
    epochs = options["epochs"]
    rows = [records.rank(0)]
    if options["ranks"] > 1:
        phases_s = {"startup": 4.0, "evaluation": 0.1 * epoch_s * epochs}
        rows = [records.rank(0, role="master", phases_s=phases_s, wait_on_s={1: 0.9 * epoch_s * epochs})]
        work_s = {"startup": 4.0, "forward": 0.85 * epoch_s * epochs, "transfer": 0.05 * epoch_s * epochs}
        rows += [
            records.rank(
                number,
                phases_s=work_s,
                wait_on_s={0: 0.1 * epoch_s * epochs},
                measured={"author_communication_s": 0.01 * epochs},
            )
            for number in range(1, options["ranks"])
        ]
        rows[0].measured["author_communication_s"] = 0.02 * epochs
    learnt = [an_epoch(n, accuracy * n / epochs, epoch_s) for n in range(1, epochs - 1)]
    learnt += [an_epoch(epochs - 1, accuracy, epoch_s), an_epoch(epochs, 0.5 * accuracy, epoch_s)]
    return records.record(rows, epochs=learnt, config=options, cpu_percent=77.7, **more)


def repeated(trials: list[Trial], epoch_s: float, spread: float = 0.01) -> dict[str, tuple[float, float]]:
    """Turns that differ: the first by the factor 1 + `spread`, the last by its inverse."""
    return {
        trial.name: (0.5, epoch_s * (1 + spread) ** power)
        for trial, power in zip(trials, (1, 0, -1), strict=True)
    }


def like_the_paper() -> dict[str, tuple[float, float]]:
    """Best accuracy and seconds an epoch of each trial, by its name, as the paper has them."""
    found = {}
    for trial in plan.trials("all", FULL):
        given = trial.options
        row = paper.TABLE_1.get(given["ranks"], paper.TABLE_1[3])
        if given["batch_size"] != 16 or (given["ranks"] == 4 and given["epochs"] == 25):
            row = paper.TABLE_2[given["batch_size"]]
        found[trial.name] = (row.accuracy, row.time_s / paper.EPOCHS)
    found[FULL.alone().name] = (paper.BASELINE.accuracy, paper.BASELINE.time_s / 15)
    found[FULL.replication().name] = (paper.REPLICATION.accuracy, paper.REPLICATION.time_s / 15)
    found |= repeated(FULL.timed_turns(1), 2.1 * TIMED_3_S)
    found[FULL.averaging(8, shards="redealt").name] = (paper.TABLE_1[4].accuracy, 10.0)
    found[FULL.with_as_many_updates(8, "fixed").name] = (paper.TABLE_1[8].accuracy, 10.0)
    return found


def results(
    changes: Mapping[str, tuple[float, float]] | None = None,
    *,
    scale: Scale = FULL,
    without: tuple[str, ...] = (),
    seeds: int = 1,
) -> Results:
    """Results like the paper's, but for the changes."""
    values = like_the_paper() | dict(changes or {})
    runs: dict[str, dict[int, Record]] = {}
    for trial in plan.trials("all", scale):
        if trial.name in without:
            continue
        accuracy, epoch_s = values.get(trial.name, (0.6, 10.0))
        # Seeds differ by half a point and 2% of the time, the same for all trials.
        runs[trial.name] = {
            seed: made(trial, accuracy + 0.005 * seed, epoch_s * (1 + 0.02 * seed)) for seed in range(seeds)
        }
    return Results(scale, VAL_SAMPLES, runs)


def verdict(found: Results, claim: str) -> Verdict:
    (one,) = [v for v in judge(found) if claim in v.claim]
    return one


def batch(size: int) -> str:
    return FULL.averaging(4, batch_size=size).name


EIGHT = FULL.averaging(8).name
REDEALT = FULL.averaging(8, shards="redealt").name
REPLICATION = FULL.replication().name

FLIPS: list[tuple[str, dict[str, tuple[float, float]], str]] = [
    ("falls with more processes", {}, "holds"),
    ("falls with more processes", {EIGHT: (0.67, 60)}, "does not hold"),
    ("falls with more processes", {EIGHT: (0.64, 60)}, "undecided"),
    ("halve the time", {}, "holds"),
    ("halve the time", repeated(FULL.timed_turns(1), 1.1 * TIMED_3_S), "does not hold"),
    ("halve the time", repeated(FULL.timed_turns(1), 2.0 * TIMED_3_S, spread=0.2), "undecided"),
    ("Time grows", {}, "holds"),
    ("Time grows", repeated(FULL.threads_turns(8, "all"), 0.5 * TIMED_3_S), "does not hold"),
    ("Time grows", repeated(FULL.threads_turns(8, "all"), 3 * TIMED_3_S, spread=2.0), "undecided"),
    ("sweet spot", {}, "holds"),
    ("sweet spot", {batch(32): (0.65, 10)}, "does not hold"),
    ("sweet spot", {batch(4): (0.70, 23)}, "does not hold"),
    ("sweet spot", {batch(4): (0.70, 60)}, "undecided"),
    ("sweet spot", {batch(64): (0.60, 5)}, "holds"),
    ("less than 1 s", {}, "does not hold"),
    (
        "less than 1 s",
        {FULL.stopwatch_run(4).name: (0.5, 0.5), FULL.stopwatch_run(8).name: (0.5, 0.5)},
        "does not hold",
    ),
    (
        "less than 1 s",
        {FULL.stopwatch_run(4).name: (0.5, 0.1), FULL.stopwatch_run(8).name: (0.5, 0.1)},
        "holds",
    ),
    ("Replication", {}, "holds"),
    ("Replication", {REPLICATION: (0.6606, 20)}, "does not hold"),
    ("Replication", {REPLICATION: (0.60, 92)}, "does not hold"),
    ("Replication", {REPLICATION: (0.64, 92)}, "undecided"),
    ("small shards", {}, "holds"),
    ("small shards", {REDEALT: (paper.TABLE_1[8].accuracy, 10)}, "does not hold"),
    ("small shards", {REDEALT: (0.59, 10)}, "undecided"),
    ("small shards", {EIGHT: (0.644, 60)}, "undecided"),
]


@pytest.mark.parametrize(("claim", "changes", "answer"), FLIPS, ids=lambda value: str(value)[:40])
def test_verdicts_flip(claim: str, changes: dict[str, tuple[float, float]], answer: str) -> None:
    """On the paper's own numbers its claims hold (but that on communication); each verdict becomes another
    when the numbers do."""
    found = verdict(results(changes), claim)
    assert found.answer == answer, found.evidence


def test_what_is_missing_is_undecided() -> None:
    """Without any run, or without one that a claim needs, it is undecided and names the command to run."""
    for one in judge(Results(FULL, VAL_SAMPLES, {})):
        assert one.answer == "undecided"
        assert re.fullmatch(r"Not run: rankwise reproduce [a-z-]+\.", one.evidence)
    assert verdict(results(without=(batch(2),)), "sweet spot").answer == "undecided"
    assert verdict(results(without=(EIGHT,)), "falls with").answer == "undecided"


def test_a_short_form_decides_little() -> None:
    """A short form judges no accuracy and no time, whatever its numbers say."""
    answers = {one.claim: one.answer for one in judge(results(scale=QUICK))}
    assert answers.pop("Communication takes less than 1 s") == "does not hold"
    assert set(answers.values()) == {"undecided"}


def test_several_seeds_decide_by_their_spread() -> None:
    """With several seeds what counts is the spread of differences between runs of one seed: here none, so
    half a point is enough, which a single seed leaves open."""
    changes = {EIGHT: (0.639, 60)}
    assert verdict(results(changes), "falls with more").answer == "undecided"
    assert verdict(results(changes, seeds=3), "falls with more").answer == "holds"


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(-0.2, 0.2))
def test_intervals_are_students(values: list[float], shift: float) -> None:
    """The interval of a mean is Student's, that of a difference the paired one, as scipy has them."""
    found = estimate(values)
    if stats.sem(values) > 1e-9:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
        assert found.half_width == pytest.approx((high - low) / 2)
    assert (found.n, estimate(values[:1]).half_width) == (len(values), None)
    others = [shift + value**2 for value in values]
    contrast = accuracy_difference(values, others, VAL_SAMPLES)
    if stats.sem([a - b for a, b in zip(values, others, strict=True)]) > 1e-9:
        oracle = stats.ttest_rel(values, others).confidence_interval(0.95)
        assert (contrast.low, contrast.high) == pytest.approx(tuple(oracle))


def test_a_single_seed() -> None:
    """One seed leaves open what so many validation samples do, and times a fixed factor."""
    contrast = accuracy_difference([0.6], [0.5], 10_000)
    assert contrast.high - contrast.low == pytest.approx(2 * 1.959964 * (0.24 / 1e4 + 0.25 / 1e4) ** 0.5)
    ratio = time_ratio([30.0], [10.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3.0, 3 / 1.15, 3 * 1.15))
    assert time_ratio([30.0, 33.0], [10.0, 11.0]).low == pytest.approx(3.0)


phases = st.fixed_dictionaries({name: st.floats(0, 50) for name in PHASES if name != "wait"})
waits = st.dictionaries(st.integers(0, 3), st.floats(0, 20), max_size=3)


@st.composite
def runs(draw: st.DrawFn) -> Record:
    """A run of a master and three workers, with any times."""
    rows: list[Rank] = []
    for number in range(4):
        wait_on_s = {rank: s for rank, s in draw(waits).items() if rank != number}
        role = "worker" if number else "master"
        threads = draw(st.integers(1, 4))
        rows.append(
            records.rank(number, role=role, wait_on_s=wait_on_s, phases_s=draw(phases), threads=threads)
        )
    return records.record(rows, cores=draw(st.integers(1, 8)), resumed_from_epoch=draw(st.integers(0, 2)))


@given(runs(), runs())
def test_shares_add_up(one: Record, two: Record) -> None:
    """The parts of an epoch add up to the mean worker's time after start-up, and those of a growth to the
    difference of two epochs."""
    before, after = breakdown(one), breakdown(two)
    epochs = len(one.epochs) - (one.resumed_from_epoch or 0)
    workers = [row for row in one.ranks if row.role == "worker"]
    whole_ns = sum(row.wall_ns - row.phases_ns["startup"] for row in workers) / len(workers)
    assert sum(getattr(before, part) for part in PARTS) == pytest.approx(whole_ns / 1e9 / epochs, abs=1e-6)
    shared_out = growth(before, after)
    assert shared_out.total_s == pytest.approx(after.epoch_s - before.epoch_s, abs=1e-6)
    assert sum(astuple(shared_out)) == shared_out.total_s


def simple(workers: int, compute_s: float, *, cores: int, wait_s: float = 0.0, threads: int = 1) -> Record:
    master = records.rank(0, role="master", phases_s={"evaluation": 3.0, "checkpoint": 1.0})
    rows = [
        records.rank(n + 1, phases_s={"forward": compute_s}, wait_on_s={0: wait_s}, threads=threads)
        for n in range(workers)
    ]
    return records.record([master, *rows], cores=cores, epochs=records.epochs(1))


def test_growth_is_charged_to_its_cause() -> None:
    """As much computing on as many cores that takes longer is oversubscription; on twice the cores half
    the time is no oversubscription at all; waiting for a master goes by what the master does."""
    two = breakdown(simple(2, 10.0, cores=2))
    crowded = growth(two, breakdown(simple(6, 16.0, cores=2)))
    assert (crowded.more_cores_s, crowded.oversubscription_s, crowded.total_s) == (0, 6, 6)
    spread = growth(breakdown(simple(2, 10.0, cores=8)), breakdown(simple(4, 5.0, cores=8)))
    assert (spread.more_cores_s, spread.oversubscription_s) == (-5, 0)
    all_cores = growth(breakdown(simple(2, 10.0, cores=8, threads=8)), breakdown(simple(4, 14.0, cores=8)))
    assert (all_cores.more_cores_s, all_cores.oversubscription_s) == (10, -6)
    waiting = growth(two, breakdown(simple(2, 10.0, cores=2, wait_s=8.0)))
    assert (waiting.evaluation_wait_s, waiting.master_wait_s, waiting.oversubscription_s) == (6, 2, 0)


def test_communication_is_scaled_to_the_papers_epochs() -> None:
    """The stopwatch and the ledger of the same ranks, for 25 epochs."""
    record = made(FULL.stopwatch_run(4), 0.5, 2.0)
    found = communication([record], "worker")
    assert astuple(found) == pytest.approx((0.25, 0.05 * 2 * 25, 0.1 * 2 * 25))
    assert communication([record], "master").stopwatch_s == pytest.approx(0.5)


def cells_of(page: str) -> set[str]:
    return {html.unescape(cell) for cell in re.findall(r"<td[^>]*>([^<]*)</td>", page)}


@pytest.mark.parametrize("seeds", [1, 3])
def test_every_cell_is_on_the_page_and_in_the_files(seeds: int) -> None:
    """Each number of the paper's tables, and ours beside it, stands on the page; the CSV files hold ours in
    full precision, with interval and seeds."""
    found = results(seeds=seeds)
    judged = judge(found)
    page = study_page(found, judged, "cifar10", "rankwise reproduce all").to_html()
    shown = cells_of(page)
    for grid in grids.all_grids(found, judged):
        if grid.name != "verdicts":
            missing = {cell for row in grid.table().rows for cell in row if text(cell) not in shown}
            assert not missing, (grid.name, missing)
    for one in judged:
        assert html.escape(one.evidence, quote=True).replace("&#x27;", "&#39;") in page
        assert one.answer in shown
    for theirs in (*paper.TABLE_1.values(), *paper.TABLE_2.values()):
        assert text(round(100 * theirs.accuracy, 2)) in shown
        assert text(theirs.time_s) in shown
    rows = list(csv.reader(io.StringIO(grids.table_2(found).to_csv())))
    ours = rows[0].index("accuracy (%): here")
    assert [int(row[0]) for row in rows[1:]] == [1, 2, 4, 8, 16, 32, 64]
    for row in rows[1:]:
        seen = found.of(FULL.averaging(4, batch_size=int(row[0])))
        assert float(row[ours]) == pytest.approx(100 * sum(map(best_accuracy, seen)) / seeds)
        assert row[ours + 2] == str(seeds)
        assert (row[ours + 1] == "") == (seeds == 1)


def text(cell: Any) -> str:
    from rankwise.report.page import _cell

    return _cell(cell)


def test_a_page_of_nothing() -> None:
    """Before anything is run the page names what to run for each part, and shows the paper's numbers."""
    nothing = Results(FULL, VAL_SAMPLES, {})
    page = study_page(nothing, judge(nothing), "cifar10", "rankwise reproduce all").to_html()
    for experiment in ("baseline", "processes", "timing"):
        assert f"rankwise reproduce {experiment}" in page
    assert "1,642" in cells_of(page)
    assert all(grid.to_csv() for grid in grids.all_grids(nothing, judge(nothing)))


def test_accuracy_is_told_apart() -> None:
    """The page blames what gives the accuracy back: the steps, the shards, or neither for sure."""
    steps = FULL.with_as_many_updates(8, "fixed").name
    low, high = paper.TABLE_1[8].accuracy, paper.TABLE_1[3].accuracy
    for redealt, longer, words in (
        (low, high, "So it is the number of steps"),
        (high, low, "So it is the small shards"),
        (high, high, "do not tell the two apart"),
        (low, low, "do not tell the two apart"),
    ):
        found = results({REDEALT: (redealt, 10), steps: (longer, 10)})
        page = study_page(found, judge(found), "cifar10", "rankwise reproduce all").to_html()
        assert words in page
    level = results({EIGHT: (high, 10)})
    assert "nothing to explain" in study_page(level, judge(level), "cifar10", "x").to_html()


def test_a_short_form_says_so_loudly() -> None:
    """The page of a short form opens with a warning."""
    found = results(scale=QUICK)
    page = study_page(found, judge(found), "digits", "x")
    assert "short form" in str(page.sections[0].blocks[0])
    full = results()
    assert "short form" not in study_page(full, judge(full), "cifar10", "x").to_html()
