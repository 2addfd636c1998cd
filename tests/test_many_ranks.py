"""What a run leaves grows with its ranks, and not with their pairs."""

from __future__ import annotations

from pathlib import Path

from rankwise.comm.link_probe import pairs_of
from rankwise.report.run_page import write_report
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import MOST_WAITED_FOR, longest_waits

from . import records

RANKS = 1024


def test_the_longest_waits_are_kept_and_the_rest_added_up() -> None:
    """Of waiting for many ranks the longest stand in a record singly, and nothing is lost of the sum."""
    few = {3: 7, 1: 9}
    assert longest_waits(few) == {"wait_on_ns": {"1": 9, "3": 7}, "wait_on_others_ns": 0}
    many = {rank: 10 + rank for rank in range(MOST_WAITED_FOR + 5)}
    kept = longest_waits(many)
    assert list(kept["wait_on_ns"]) == [str(rank) for rank in range(5, MOST_WAITED_FOR + 5)]
    assert kept["wait_on_others_ns"] == 10 + 11 + 12 + 13 + 14


def test_a_record_and_a_page_of_a_thousand_ranks_are_small(tmp_path: Path) -> None:
    """Where each of 1,024 ranks waited for each other one, the record stays under 5 MB, its page is little
    more than that of a few ranks, and the map on it is of those with most waiting."""
    rows = []
    for rank in range(RANKS):
        wait_ns = {other: 10**9 + (rank * other) % 1009 for other in range(RANKS) if other != rank}
        row = records.rank(rank, wait_on_s={0: sum(wait_ns.values()) / 1e9})
        rows.append(row.model_copy(update=longest_waits(wait_ns)))
    folder = records.run_folder(tmp_path / "run", records.record(rows))
    assert all(
        row.phases_ns["wait"] == sum(row.wait_on_ns.values()) + row.wait_on_others_ns
        for row in folder.read().ranks
    )
    assert (folder.path / "record.json").stat().st_size < 5_000_000
    few = records.run_folder(tmp_path / "few", records.record(3))
    sizes = []
    for one in (folder, few):
        write_report([one.path], tmp_path / "page.html")
        sizes.append((tmp_path / "page.html").stat().st_size)
    assert sizes[0] - sizes[1] < 1_000_000
    write_report([RunFolder(folder.path).path], tmp_path / "page.html")
    assert f"The 64 ranks with most waiting, of {RANKS}." in (tmp_path / "page.html").read_text()


def test_links_of_many_ranks_are_those_of_their_collectives() -> None:
    """Of few ranks each pair is measured, of many those a power of two apart, so that no pair is missing by
    which a sum over all ranks goes."""
    assert len(pairs_of(16)) == 16 * 15 // 2
    many = pairs_of(300)
    assert len(many) < 300 * 9
    assert {second - first for first, second in many} == {2**power for power in range(9)}
    assert {rank for pair in many for rank in pair} == set(range(300))
