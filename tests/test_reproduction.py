"""The studies that are kept in docs/ hold what their pages say, and nothing of the machine's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from rankwise.runs.record import Record
from rankwise.strategies import entry_of
from rankwise.studies.folder import PLACES

STUDY = Path(__file__).parent.parent / "docs" / "reproduction"
PAPERS = sorted((STUDY / "records").glob("*.json"))
RECORDS = sorted(STUDY.rglob("records/*.json"))
PAGES = sorted(STUDY.rglob("*.html"))
LARGEST_BYTES = 6_000_000


@pytest.fixture(params=RECORDS, ids=lambda path: f"{path.parent.parent.name}/{path.stem}")
def record(request: pytest.FixtureRequest) -> Record:
    """A record of a study."""
    return Record.model_validate_json(request.param.read_bytes())


def test_the_study_is_there() -> None:
    """The paper's experiments were run in full: baseline, replication, 2 to 8 processes, 7 batch sizes."""
    runs = [json.loads(path.read_bytes())["config"] for path in PAPERS]
    averaged = [
        run for run in runs if run["strategy"] == "parameter-averaging" and run["dataset"] == "cifar10"
    ]
    assert {run["ranks"] for run in averaged if run["epochs"] == 25} >= set(range(2, 9))
    assert {run["batch_size"] for run in averaged if run["ranks"] == 4} >= {1, 2, 4, 8, 16, 32, 64}
    assert {"single", "replication", "paper-stopwatch"} <= {run["strategy"] for run in runs}
    assert all(run["train_limit"] is None for run in runs if run["epochs"] == 25 and run["threads"] != "all")


def test_time_adds_up_to_the_nanosecond(record: Record) -> None:
    """The phases of every rank of every run add up to its wall time, and its waiting to whom it was for."""
    assert record.ranks
    for row in record.ranks:
        assert sum(row.phases_ns.values()) == row.wall_ns
        assert min(row.phases_ns.values()) >= 0
        assert sum(row.wait_on_ns.values()) == row.phases_ns["wait"]
        assert str(row.rank) not in row.wait_on_ns


def test_no_sample_is_lost_or_trained_twice(record: Record) -> None:
    """Every run completed, and trained each sample as often as its strategy says."""
    assert record.outcome == "completed"
    samples, config = record.samples, record.config
    assert (samples.duplicated, samples.lost) == (0, 0)
    assert samples.trained == samples.expected == sum(epoch.train_samples for epoch in record.epochs)
    times = config["ranks"] - 1 if entry_of(config["strategy"]).replicates else 1
    pool = 50_000 - round(50_000 * (config["validation_split"] or 0))
    assert record.epochs[0].train_samples == times * min(config["train_limit"] or pool, pool)


def test_it_fits_a_repository_and_tells_no_paths() -> None:
    """The page, the tables and the records are small, and hold no path of the machine that made them."""
    files = [path for path in STUDY.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LARGEST_BYTES
    for path in files:
        assert not re.search(r"(?<![\w.:/-])/(root|home|tmp|work|mnt)/", path.read_text(encoding="utf-8")), (
            path
        )
    for path in RECORDS:
        config = json.loads(path.read_bytes())["config"]
        assert all(config[place] is None for place in PLACES)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_its_page_asks_nobody(path: Path) -> None:
    """The page loads nothing from elsewhere."""
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", re.sub(r"<a [^>]*>", "", page))
