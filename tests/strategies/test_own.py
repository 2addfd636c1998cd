"""Strategies of a user's own, by ``module:Class``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from rankwise.errors import ConfigError
from rankwise.strategies import Recovery, State, Strategy, entry_of


@dataclass(frozen=True)
class Own(Strategy[State]):
    """As little as a strategy can be."""

    recovery: ClassVar = Recovery.DROP_ROUND

    def init(self, replica: Any, world: Any) -> State:
        return State()

    def prepare(self, state: State, replica: Any, batch: Any, world: Any) -> Any:
        return state


NAME = f"{__name__}:Own"


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("survives", False, "write recovery = Recovery.FAIL_STOP"),
        ("survives", True, "leave it out"),
        ("syncs_every_step", True, "write recovery = Recovery.ROLL_BACK"),
        ("in_lockstep", True, "write recovery = Recovery.ROLL_BACK"),
        ("synchronous", False, "write recovery = Recovery.ASYNCHRONOUS"),
        ("in_step", False, "write recovery = Recovery.ASYNCHRONOUS"),
        ("keeps_local_work", False, "write recovery = Recovery.DROP_ROUND"),
        ("alike", ("momentum",), "write replicated = ('momentum',)"),
    ],
)
def test_old_names_are_refused(monkeypatch: pytest.MonkeyPatch, old: str, value: object, new: str) -> None:
    """A strategy that is written for an older rankwise gets one line: the old name, and what to write."""
    assert entry_of(NAME).strategy is Own
    monkeypatch.setattr(Own, old, value, raising=False)
    with pytest.raises(ConfigError) as caught:
        entry_of(NAME)
    line = str(caught.value)
    assert line.startswith(f"--strategy {NAME}: {old} = {value!r} was given")
    assert line.endswith(new)
    assert "\n" not in line


def test_what_each_recovery_means() -> None:
    """Only `FAIL_STOP` ends the run; work is kept unless the round is trained again; only a strategy that
    rolls back exchanges in each step, and only asynchronous ranks end a round apart."""
    found = {
        its.name: (its.survives, its.keeps_local_work, its.synchronous, its.syncs_every_step)
        for its in Recovery
    }
    assert found == {
        "FAIL_STOP": (False, True, True, False),
        "KEEP_LOCAL_WORK": (True, True, True, False),
        "DROP_ROUND": (True, False, True, False),
        "ROLL_BACK": (True, False, True, True),
        "ASYNCHRONOUS": (True, True, False, False),
    }
