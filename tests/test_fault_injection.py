"""Faults on demand: what may be asked for, when it strikes, and the marks that it leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.ledger.phases import Ledger
from rankwise.plan import make_plan
from rankwise.runs.record import Record
from rankwise.survival.fault_injection import Faults, PlannedFault, parse_fault, read_marks
from rankwise.survival.harm import ThreadHarm

Make = Callable[..., TrainConfig]
Train = Callable[..., tuple[Record, Any, Any]]


class Patient:
    """Keeps what was done to a rank."""

    def __init__(self) -> None:
        self.ledger = Ledger()
        self.suffered: list[str] = []
        self.exchange: Callable[[], None] = lambda: None

    @contextmanager
    def at_each_exchange(self, action: Callable[[], None]) -> Iterator[None]:
        before, self.exchange = self.exchange, action
        yield
        self.exchange = before

    def kill(self) -> None:
        self.suffered.append("kill")

    def hang(self) -> None:
        self.suffered.append("hang")

    def drop_host(self) -> None:
        self.suffered.append("drop-host")

    def cut_links(self) -> None:
        self.suffered.append("cut")

    def be_poisoned(self) -> None:
        self.suffered.append("nan")


def faults(folder: Path, *texts: str, rank: int = 0, seed: int = 0) -> tuple[Faults, Patient]:
    patient = Patient()
    plans = [parse_fault(text) for text in texts]
    made = Faults(
        plans, folder, rank=rank, seed=seed, exchanges=patient, harm=patient, poison=patient.be_poisoned
    )
    return made, patient


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("kill:rank=2", PlannedFault("kill", rank=2, epoch=1)),
        ("kill:rank=0,epoch=3,phase=checkpoint", PlannedFault("kill", rank=0, epoch=3, phase="checkpoint")),
        ("sleep:p=0.1,seconds=2.5", PlannedFault("sleep", p=0.1, seconds=2.5)),
        ("slow:rank=1,factor=3", PlannedFault("slow", rank=1, epoch=1, factor=3.0)),
        ("nan:rank=1,epoch=2,step=7", PlannedFault("nan", rank=1, epoch=2, step=7)),
        ("hang:rank=1,p=0.5", PlannedFault("hang", rank=1, p=0.5)),
    ],
)
def test_a_fault_is_what_its_words_say(text: str, plan: PlannedFault) -> None:
    """KIND:KEY=VALUE,...; a fault without a probability strikes once, in the first epoch unless told."""
    assert parse_fault(text) == plan


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("kil:rank=1", "did you mean 'kill'"),
        ("kill", "rank=N, or p=PROBABILITY"),
        ("kill:rnk=1", "did you mean 'rank'"),
        ("kill:rank=one", "rank is 'one', expected int"),
        ("kill:rank=-1", "rank of 0 or more"),
        ("kill:rank=3", "ranks 0 to 2"),
        ("kill:rank=1,epoch=0", "epoch of 1 or more"),
        ("kill:rank=1,step=0", "step of 1 or more"),
        ("kill:rank=1,phase=lunch", "unknown phase 'lunch'"),
        ("kill:p=1.5", "p between 0 and 1"),
        ("kill:p=nan", "p between 0 and 1"),
        ("sleep:rank=1,seconds=-1", "seconds of 0 or more"),
        ("kill:rank=1,seconds=1", "seconds only for sleep"),
        ("slow:rank=1,factor=0.5", "factor of 1 or more"),
        ("nan:rank=1,phase=checkpoint", "phase=compute for nan"),
        ("kill:rank", "rank is '', expected int"),
    ],
)
def test_what_is_no_fault_is_told_in_one_line(text: str, told: str) -> None:
    """Unknown kinds, keys and phases, values out of range, and ranks that the run does not have."""
    with pytest.raises(ConfigError) as error:
        make_plan(TrainConfig(ranks=3, fault=(text,)))
    assert told in str(error.value)
    assert str(error.value).startswith(f"--fault {text}: ")
    assert "\n" not in str(error.value)


def test_it_strikes_once_where_it_was_asked_to(tmp_path: Path) -> None:
    """In its epoch, at its step, in its phase, and not again, also not in a run that goes on later."""
    for _ in range(2):
        made, patient = faults(tmp_path, "nan:rank=0,epoch=2,step=3")
        struck = []
        for epoch in (1, 2, 3):
            made.begin(epoch, 5)
            for step in range(1, 6):
                made.step(step)
                made.at("compute")
                struck += [(epoch, step)] * len(patient.suffered)
                patient.suffered.clear()
        assert struck == ([(2, 3)] if _ == 0 else [])
    (mark,) = read_marks(tmp_path)
    assert (mark.rank, mark.kind, mark.epoch, mark.step) == (0, "nan", 2, 3)


@pytest.mark.parametrize("kind", ["kill", "hang", "drop-host", "cut", "nan"])
def test_each_kind_does_its_own_harm(tmp_path: Path, kind: str) -> None:
    """What strikes a rank is what was asked for, and nothing else."""
    made, patient = faults(tmp_path, f"{kind}:rank=0")
    made.begin(1, 5)
    made.step(1)
    made.at("compute")
    assert patient.suffered == [kind]


def test_a_thread_is_killed_alone() -> None:
    """A rank that is a thread ends, and the process with its other ranks goes on."""

    def program(world: World) -> int:
        if world.rank == 1:
            ThreadHarm().kill()
        return world.rank

    assert run_in_threads(2, program) == [0, Killed]


@pytest.mark.parametrize("harm", ["kill", "hang"])
def test_a_process_is_killed_or_stopped(harm: str) -> None:
    """A rank that is a process is ended by SIGKILL, with what it said before said, or it stops until it is
    woken or ended from outside."""
    program = f"""
from rankwise.survival.harm import ProcessHarm
print("here")
{"import sys; sys.stdout.flush()" if harm == "hang" else ""}
ProcessHarm().{harm}()
print("still here")
"""
    started = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    if harm == "hang":
        os.waitid(os.P_PID, started.pid, os.WSTOPPED)
        started.kill()
    assert started.communicate() == ("here\n", None)
    assert started.returncode == -signal.SIGKILL


def test_an_exchange_belongs_to_the_phase_around_it(tmp_path: Path) -> None:
    """A rank asked to die at the second point of a checkpoint dies there, not in other exchanges."""
    made, patient = faults(tmp_path, "kill:rank=0,phase=checkpoint,step=3")
    made.begin(1, 5)
    made.step(4)
    patient.exchange()
    with made.during("exchange"):
        patient.exchange()
    with made.during("checkpoint"):
        patient.exchange()
        assert patient.suffered == []
        patient.exchange()
        assert patient.suffered == ["kill"]


@given(p=st.floats(0, 1), seed=st.integers(0, 99))
def test_chance_is_drawn_from_the_seed(p: float, seed: int) -> None:
    """With a probability the same faults strike in every run with the same seed, in about so many epochs,
    each rank for itself."""
    plan = PlannedFault("kill", p=p)

    def draw() -> list[int | None]:
        return [plan.step_for(rank, epoch, 10, (seed, 0)) for rank in range(4) for epoch in range(1, 101)]

    drawn = draw()
    assert drawn == draw()
    struck = [step for step in drawn if step is not None]
    assert all(1 <= step <= 10 for step in struck)
    assert abs(len(struck) / 400 - p) < 0.15


@pytest.mark.parametrize("kind", ["sleep:rank=1,epoch=2,seconds=0.2", "slow:rank=1,epoch=2,factor=2"])
def test_a_fault_that_ends_nobody_changes_nothing_but_time(
    config: Make, train_in_threads: Train, kind: str
) -> None:
    """A rank that sleeps or is slow ends with the bits of one that is not; it stands in the record."""
    plain = train_in_threads(config(ranks=2, train_limit=200), folder="plain")
    struck = train_in_threads(config(ranks=2, train_limit=200, fault=[kind]), folder="struck")
    assert [row.val_loss for row in plain[0].epochs] == [row.val_loss for row in struck[0].epochs]
    (fault,) = struck[0].faults
    assert (fault.rank, fault.kind, fault.epoch, fault.action) == (1, kind.partition(":")[0], 2, "none")
    for row in struck[0].ranks:
        assert sum(row.phases_ns.values()) == row.wall_ns
    if kind.startswith("sleep"):
        assert struck[0].ranks[1].phases_ns["other"] >= 200e6
