"""The numbers in charts and tables are those of the record and the timelines."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from rankwise.report.charts import learning, scaling, timeline, times
from rankwise.report.page import Chart
from rankwise.report.runs import Run, read_runs
from rankwise.report.summary import GROUPS
from tests.records import compute_ms, epochs, rank, record, run_folder


def values(chart: Chart) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = chart.spec["data"]["values"]
    return rows


def test_bars_are_the_ledger() -> None:
    """The parts of a rank's bar are sums of its phases, and add up to its wall time."""
    content = record([rank(0, role="master", wait_on_s={1: 2.5}), rank(1)], config={"topology": "master"})
    chart = times.rank_bars(content)
    for name, row in zip(("0 master", "1"), content.ranks, strict=True):
        seconds = {v["part"]: v["seconds"] for v in values(chart) if v["rank"] == name}
        expected = {
            times.LABELS[group]: sum(row.phases_ns[phase] for phase in phases) / 1e9
            for group, phases in GROUPS.items()
        }
        assert seconds == expected
        assert sum(seconds.values()) == pytest.approx(row.wall_ns / 1e9)
        assert (name, *expected.values()) in [line[:-1] for line in chart.numbers.rows]


def test_the_bar_of_a_run_is_the_mean_of_its_ranks() -> None:
    """Runs of different sizes are compared by their mean rank; a run without ranks has an empty bar."""
    ranks = [rank(0, phases_s={"forward": 1}), rank(1, phases_s={"forward": 3})]
    chart = times.run_bars([Run("two", record(ranks)), Run("none", record(0))])
    seconds = {(v["run"], v["part"]): v["seconds"] for v in values(chart)}
    assert seconds["two", "training"] == 2
    assert seconds["none", "training"] == 0


def test_the_map_of_waiting_is_the_record() -> None:
    """Each cell is what one rank waited for another, and the sums are the ranks' waiting."""
    content = record([rank(0, wait_on_s={1: 0.5, 2: 1.5}), rank(1, wait_on_s={2: 3.25}), rank(2)])
    cells = {(v["waiting"], v["for"]): v["seconds"] for v in values(times.wait_map(content))}
    assert len(cells) == 9
    assert {pair: s for pair, s in cells.items() if s} == {("0", "1"): 0.5, ("0", "2"): 1.5, ("1", "2"): 3.25}


def test_learning_curves_are_the_epochs() -> None:
    """Accuracy, both losses and throughput of each epoch are the record's."""
    content = record(2, epochs=epochs(4, train_samples=600, wall_s=2))
    runs = [Run("a", content)]
    assert [v["accuracy"] for v in values(learning.accuracy(runs))] == [
        e.val_accuracy for e in content.epochs
    ]
    assert [v["loss"] for v in values(learning.loss(runs)) if v["line"] == "training"] == [
        e.train_loss for e in content.epochs
    ]
    assert [v["loss"] for v in values(learning.loss(runs)) if v["line"] == "validation"] == [
        e.val_loss for e in content.epochs
    ]
    assert [v["samples a second"] for v in values(learning.throughput(runs))] == [400] * 4
    assert [v["seconds"] for v in values(learning.accuracy_over_time(runs))] == [2, 4, 6, 8]
    assert [v["seconds"] for v in values(learning.epoch_seconds(runs[0]))] == [1.5, 0.5] * 4


def test_speedup_and_efficiency() -> None:
    """Speedup is the baseline's median epoch over the run's; efficiency divides it by the growth in ranks."""
    slow_start = epochs(1, wall_s=99.0) + epochs(2, wall_s=8.0)
    runs = [
        Run("four", record(4, epochs=epochs(3, wall_s=2.5))),
        Run("two", record(2, epochs=slow_start)),
        Run("eight", record(8, epochs=epochs(3, wall_s=2.0))),
    ]
    rows = scaling.scaling(runs)
    assert [row["run"] for row in rows] == ["two", "four", "eight"]
    assert [row["speedup"] for row in rows] == [1, 3.2, 4]
    assert [row["efficiency"] for row in rows] == [1, 1.6, 1]
    assert values(scaling.speedup(runs)) == rows
    assert "an epoch is than in two, the baseline" in scaling.speedup(runs).caption


def test_the_timeline_tells_waiting_from_transfer(tmp_path: Path) -> None:
    """Each piece of a lane is what the rank did: compute, then wait for the latest, then 1 ms of transfer."""
    folder = run_folder(tmp_path / "run", record(3), steps=5)
    (run,) = read_runs([folder.path]).runs
    shown, after = timeline.steps(run.timelines)
    spent: defaultdict[tuple[str, str], float] = defaultdict(float)
    for piece in values(shown):
        spent[piece["rank"], piece["phase"]] += piece["ms"]
        assert piece["ms"] == pytest.approx(piece["end"] - piece["start"])
        assert (piece["waiting for"] is None) == (piece["phase"] != "waiting")
    latest = [max(compute_ms(n, step) for n in range(3)) for step in range(1, 6)]
    for number in range(3):
        compute = [compute_ms(number, step) for step in range(1, 6)]
        name = str(number)
        assert spent[name, "data"] == pytest.approx(5)
        assert spent[name, "forward"] == pytest.approx(sum(compute))
        assert spent[name, "waiting"] == pytest.approx(sum(latest) - sum(compute))
        assert spent[name, "transfer"] == pytest.approx(5)
    assert {(v["phase"], v["ms"]) for v in values(after)} == {("checkpoint", 2.0)}


def test_a_lane_has_no_gap_and_no_overlap(tmp_path: Path) -> None:
    """The pieces of a rank follow one another: what a lane shows is all that the rank did."""
    (run,) = read_runs([run_folder(tmp_path / "run", record(3), steps=5).path]).runs
    for number in ("0", "1", "2"):
        lane = [v for v in values(timeline.steps(run.timelines)[0]) if v["rank"] == number]
        assert lane[0]["start"] == 0
        assert [v["start"] for v in lane[1:]] == pytest.approx([v["end"] for v in lane[:-1]])


def test_many_ranks_show_fewer_steps(tmp_path: Path) -> None:
    """The page of many ranks stays light: steps times ranks are bounded."""
    (run,) = read_runs([run_folder(tmp_path / "run", record(64), steps=12).path]).runs
    shown = timeline.steps(run.timelines)[0]
    assert 2 * 64 <= len(shown.numbers.rows) <= timeline.MOST_LANES


def test_timelines_without_steps_give_no_chart(tmp_path: Path) -> None:
    """A master alone, whose workers' timelines are gone, took no training step."""
    content = record([rank(0, role="master"), rank(1)], config={"topology": "master"})
    folder = run_folder(tmp_path / "run", content, steps=2)
    folder.timeline_of(1).unlink()
    (run,) = read_runs([folder.path]).runs
    assert len(run.timelines) == 1
    assert timeline.steps(run.timelines) == ()
