"""Loops that real ranks leave: all end, with one line that names the rank and its line of code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from .conftest import Command

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]

ALLREDUCE = json.dumps({"strategy": "allreduce"})
BOUNDED = json.dumps({"strategy": "easgd", "sync_every": 1, "max_staleness": 0})
PROGRAM = Path(__file__).parent / "strategies" / "leaves.py"


def line_of(how: str) -> int:
    """The line of the program that does this."""
    lines = PROGRAM.read_text().splitlines()
    return 2 + next(number for number, line in enumerate(lines) if f'word == "{how}"' in line)


@pytest.mark.parametrize("how", ["exit", pytest.param("return", marks=pytest.mark.full)])
def test_one_rank_that_leaves_ends_all(command: Command, how: str) -> None:
    """`return` and `sys.exit(0)` in the loop of one rank end all with code 1 and its line."""
    done = command.mpiexec(2, "-m", "tests.strategies.leaves", how, "1", ALLREDUCE)
    assert done.code == 1, done
    place = rf"{re.escape(PROGRAM.name)}:{line_of(how)} in epoch 2, step 3, while rank 0 went on"
    assert re.search(rf"^rankwise: rank 1 left the loop over batches at \S*{place}", done.err, re.M), done
    assert "Traceback" not in done.err


@pytest.mark.parametrize(("ranks", "options"), [(2, ALLREDUCE), (3, BOUNDED)], ids=["allreduce", "easgd"])
def test_one_rank_that_stops_early_ends_all(command: Command, ranks: int, options: str) -> None:
    """A rank that ends its program after an epoch ends all with code 1 and the line of its loop, also where a
    master holds another back for it."""
    done = command.mpiexec(ranks, "-m", "tests.strategies.leaves", "stop-early", "1", options)
    assert done.code == 1, done
    place = (
        rf"rank 1 has come to the end of its program, after the loop .* at \S*{PROGRAM.name}:\d+ in epoch 2"
    )
    assert re.search(
        rf"^rankwise: {place}, while rank 0 waits for it at \S*{PROGRAM.name}:\d+", done.err, re.M
    ), done


@pytest.mark.full
def test_all_ranks_that_exit_end_quietly(command: Command) -> None:
    """`sys.exit(0)` in the same step of all ranks is no failure, and nothing is said."""
    done = command.mpiexec(2, "-m", "tests.strategies.leaves", "exit", "all", ALLREDUCE)
    assert (done.code, done.out) == (0, ""), done


@pytest.mark.full
def test_ddp_refuses_to_be_left(command: Command) -> None:
    """DDP exchanges in the backward pass, where no rank can tell that it has left: that is refused by all."""
    done = command.mpiexec(2, "-m", "tests.strategies.leaves", "break", "1", json.dumps({"strategy": "ddp"}))
    assert done.code == 1, done
    assert re.search(
        rf"^rankwise: rank 1 made no step\(\) with a batch in the loop over batches at \S*{PROGRAM.name}:"
        rf"{line_of('break')}, in epoch 2, step 3, of which this strategy cannot tell",
        done.err,
        re.M,
    ), done


@pytest.mark.full
def test_an_exception_on_one_rank_is_what_is_shown(command: Command) -> None:
    """An exception in the loop of one rank ends all, and its traceback is shown."""
    done = command.mpiexec(2, "-m", "tests.strategies.leaves", "raise", "1", ALLREDUCE)
    assert done.code == 1, done
    assert "ValueError: on purpose" in done.err
    assert "rank 1 failed, so all 2 ranks end" in done.err
