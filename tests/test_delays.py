"""Delays of known length, built into real ranks, show up where they belong: the proof of the ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .conftest import launched
from .effort import daily

pytestmark = [pytest.mark.mpi, pytest.mark.alone, pytest.mark.timeout(120)]

LENGTH_S = 0.35
ROUNDS = 3
TOTAL_S = ROUNDS * LENGTH_S
STOP_S = 1.0
MOMENT_S = 0.3
"""How late a busy machine may stop a process, or find it stopped."""


Told = dict[str, float]


def cases(topology: str, size: int) -> list[str]:
    """Each phase of each kind of rank; the first and the last of them; all kinds of stops."""
    first, last = (1 if topology == "master" else 0), size - 1
    late = [("data", last), ("forward", first), ("pack", last)]
    if topology == "master":
        late += [("optimizer", 0), ("pack", 0)]
    stops = [(kind, rank) for kind in ("stop-training", "stop-exchange") for rank in (0, last)]
    return [
        *(f"{kind}:{rank}:{LENGTH_S}" for kind, rank in [*late, ("barriers", last)]),
        *(f"{kind}:{rank}:{STOP_S}" for kind, rank in stops),
    ]


SIZES = [(topology, size) for topology in ("master", "allreduce") for size in (2, 3, 5)]


@pytest.fixture(
    scope="module", params=daily(SIZES, [("master", 3), ("allreduce", 3)], unpacked=False), ids=str
)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Told]]:
    """For each case what each rank's ledger says, in rank order; all from one run of real ranks."""
    topology, size = request.param
    python = request.getfixturevalue("warm_python")
    with launched(tmp_path_factory.mktemp("delays"), python) as command:
        program = str(Path(__file__).with_name("delays.py"))
        done = command.mpiexec(size, program, topology, *cases(topology, size), timeout=110)
    assert done.code == 0, done
    rows = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    found: dict[str, list[Told]] = {case: [] for case in cases(topology, size)}
    for row in sorted(rows, key=lambda row: row["rank"]):
        found[row["case"]].append(row)
    assert all(len(of_case) == size for of_case in found.values())
    return found


def about(length_s: float, row: Told) -> object:
    """Within 5 % of the delay, and all that the case took besides: on a machine that others keep busy, ranks
    are late for reasons of their own."""
    return pytest.approx(length_s, rel=0, abs=0.05 * TOTAL_S + row["elapsed"] - TOTAL_S)


def chosen(told: dict[str, list[Told]], *kinds: str) -> list[tuple[str, Told, list[Told]]]:
    """Kind, late rank and other ranks of the cases of these kinds."""
    found = []
    for case, rows in told.items():
        kind, rank, _ = case.split(":")
        if kind in kinds:
            late = rows[int(rank)]
            found.append((kind, late, [row for row in rows if row is not late]))
    assert {kind for kind, _, _ in found} >= set(kinds) - {"optimizer"}  # only a master has that one
    return found


def test_a_delay_shows_up_where_it_belongs(told: dict[str, list[Told]]) -> None:
    """A delay in one rank's data, computing, averaging or sending is in that phase of that rank, and in each
    other rank's ledger it is waiting for it."""
    for kind, late, others in chosen(told, "data", "forward", "optimizer", "pack"):
        usual_s = min(row[kind] for row in others)
        assert late[kind] - usual_s == about(TOTAL_S, late)
        assert late["wait"] == about(0, late)
        for row in others:
            assert row[f"wait_on_{late['rank']}"] == about(TOTAL_S, row)
            assert row["wait"] - row[f"wait_on_{late['rank']}"] == about(0, row)


def test_a_rank_stopped_from_outside_is_charged(told: dict[str, list[Told]]) -> None:
    """A rank that is stopped for a second at any moment, inside an exchange too, has them outside transfer
    and wait, and the others waited for it so long."""
    for _, late, others in chosen(told, "stop-training", "stop-exchange"):
        assert late["elapsed"] - late["transfer"] - late["wait"] > STOP_S - MOMENT_S
        for row in others:
            most_s = row["elapsed"] + MOMENT_S
            assert STOP_S - MOMENT_S < row[f"wait_on_{late['rank']}"] < most_s


def test_a_stopwatch_with_barriers_agrees(told: dict[str, list[Told]]) -> None:
    """The waiting that the logs tell is what a stopwatch around barriers shows in the same run."""
    for _, _, others in chosen(told, "barriers"):
        for row in others:
            assert row["barrier"] == about(row["wait"], row)
            assert row["wait"] == about(TOTAL_S, row)  # there was something to agree on
