"""What holds a run back, on records in which the answer is known."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.report.diagnosis import diagnose
from rankwise.runs.record import Record
from tests.records import rank, record

TRAINING_S = {"startup": 1.0, "data": 1.0, "forward": 3.0, "backward": 5.0, "optimizer": 1.0}


def work(**phases_s: float) -> dict[str, float]:
    return TRAINING_S | phases_s


def first(content: Record) -> str:
    """The biggest finding as it is printed."""
    finding = diagnose(content).findings[0]
    return f"{finding.headline} {finding.text}"


def test_load_balance() -> None:
    """Ranks that wait for one slow rank: the share of waiting, the rank and its excess are told."""
    slow = rank(2, phases_s=work(backward=9))
    others = [rank(n, phases_s=work(), wait_on_s={2: 3.2, 1 - n: 0.8}) for n in (0, 1)]
    diagnosis = diagnose(record([*others, slow]))
    # 8 s of waiting in 42 s since start-up, 6.4 of them for rank 2.
    assert diagnosis.summary == (
        "81% of the ranks' time after start-up went into training. "
        "Ranks wait 19% of the time, 80% of it for rank 2: load balance."
    )
    assert "Rank 2 trains for 14 s, the others for 10 s in the mean." in diagnosis.findings[0].text
    assert "more to do, or a slower core" in diagnosis.findings[0].text


def test_a_late_rank_that_had_no_core() -> None:
    """A slow rank that lost its core is told from one that has more to do."""
    stopped = rank(0, phases_s=work(backward=9), off_cpu_ns={"backward": 4_000_000_000})
    others = [rank(n, phases_s=work(), wait_on_s={0: 4}) for n in (1, 2)]
    assert "It was without a core for 4 s of that" in first(record([stopped, *others]))


def test_the_masters_serial_work() -> None:
    """Workers that wait for a master: what it does meanwhile is told, the longest first."""
    master = rank(
        0, role="master", phases_s={"startup": 1, "evaluation": 3, "checkpoint": 1}, wait_on_s={1: 10}
    )
    workers = [rank(n, phases_s=work(), wait_on_s={0: 3.9, 3 - n: 0.1}) for n in (1, 2)]
    told = first(record([master, *workers], cores=2, config={"topology": "master"}))
    assert "Workers wait 29% of the time, 98% of it for rank 0, the master: serial work." in told
    assert "Meanwhile the master evaluates (3 s), saves (1 s)." in told


def test_waiting_in_turn() -> None:
    """Waiting that is spread over all ranks is no rank's fault; a crowded host is named."""
    ranks = [rank(n, phases_s=work(), wait_on_s={(n + 1) % 4: 1, (n + 2) % 4: 1}) for n in range(4)]
    told = first(record(ranks, cores=2, config={"sync_every": 4}))
    assert "Ranks wait 17% of the time, most of it for one another in turn: uneven steps." in told
    assert "With fewer synchronisations than one every 4 steps it is less." in told
    assert "node-1 has 2 cores for 4 threads that train" in told


@pytest.mark.parametrize(
    ("phases_s", "told"),
    [
        ({"transfer": 2, "pack": 0.5}, "Exchange takes 20% of the time. In the mean a rank packs for 500 ms"),
        ({"evaluation": 2.5}, "Evaluation takes 20% of the time."),
        ({"checkpoint": 2.5}, "Saving checkpoints takes 20% of the time."),
        ({"recovery": 0.05}, "Recovering from lost ranks takes 0.5% of the time."),
        ({"other": 2.5}, "Work between the phases takes 20% of the time."),
        ({"instrument": 2.5}, "Measuring itself takes 20% of the time."),
        ({"data": 3.5}, "Preparing batches takes 28% of the time."),
        ({"startup": 10}, "Start-up takes 50% of the wall time. It is 10 s a rank in the mean"),
    ],
)
def test_each_phase_that_takes_time_is_named(phases_s: dict[str, float], told: str) -> None:
    """Whatever phase takes the time, the finding names it with its share."""
    assert told in first(record([rank(n, phases_s=work(**phases_s)) for n in (0, 1)]))


@pytest.mark.parametrize(
    ("cores", "off_cpu_s", "told"),
    [
        (8, (2, 2, 2), "20% of the time while they computed: other programs ran."),
        (2, (2, 2, 2), "more threads than cores. node-1 has 2 cores for 3 threads"),
        (8, (0, 6, 0), "100% of it rank 1. Rank 1 lost 6 s: it was stopped"),
    ],
)
def test_ranks_without_a_core(cores: int, off_cpu_s: tuple[int, ...], told: str) -> None:
    """Computing without a core is put down to crowding, to other programs, or to one rank."""
    ranks = [
        rank(n, phases_s=work(), off_cpu_ns={"backward": s * 10**9, "checkpoint": 99 * 10**9})
        for n, s in enumerate(off_cpu_s)
    ]
    assert told in first(record(ranks, cores=cores))


@pytest.mark.parametrize(("cores", "told"), [(2, "That costs no core"), (3, "there is one left")])
def test_a_waiting_master_costs_a_core_or_none(cores: int, told: str) -> None:
    """A master that waits is a loss only where its host has a core more than the workers use."""
    master = rank(0, role="master", phases_s={"startup": 1}, wait_on_s={1: 5, 2: 5})
    workers = [rank(n, phases_s=work()) for n in (1, 2)]
    findings = diagnose(record([master, *workers], cores=cores, config={"topology": "master"})).findings
    (finding,) = [finding for finding in findings if "the master" in finding.headline]
    assert finding.headline == "Rank 0, the master, trains nothing and waits 100% of its own time."
    assert told in finding.text
    assert finding.share == (0 if cores == 2 else pytest.approx(1 / 3))


def test_nothing_holds_it_back() -> None:
    """A run that trains nine tenths of its time is told so."""
    ranks = [rank(n, phases_s=work(evaluation=0.5)) for n in (0, 1)]
    assert diagnose(record(ranks)).summary == (
        "95% of the ranks' time after start-up went into training. Nothing much holds this run back."
    )


def test_training_without_a_core_is_not_healthy() -> None:
    """A run that seems to train all the time, but without its core, is not told that all is well."""
    ranks = [rank(n, phases_s=work(), off_cpu_ns={"forward": 2 * 10**9}) for n in (0, 1)]
    assert "Ranks were without a core for 20% of the time" in diagnose(record(ranks)).summary


@pytest.mark.parametrize("content", [{"ranks": 2, "epochs": []}, {"ranks": 0}])
def test_no_time_no_diagnosis(content: dict[str, Any]) -> None:
    """A run without an epoch, or without ranks, is not judged."""
    diagnosis = diagnose(record(**content))
    assert diagnosis.findings == ()
    assert "too little time to judge" in diagnosis.summary


def test_the_biggest_comes_first() -> None:
    """Findings are in the order of their shares, and small ones are left out."""
    ranks = [rank(n, phases_s=work(evaluation=1, checkpoint=3, transfer=0.1)) for n in (0, 1)]
    findings = diagnose(record(ranks)).findings
    assert [finding.headline.split()[0] for finding in findings] == ["Saving", "Evaluation"]
