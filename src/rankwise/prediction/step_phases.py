"""How long each phase of each kept step took."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline


def spent_in_steps(line: RankTimeline) -> NDArray[np.int64]:
    """Nanoseconds [steps, phases] of each kept step."""
    spans, steps = line.spans, line.steps
    place = np.searchsorted(steps["start_ns"], spans["start_ns"], side="right") - 1
    spent = np.zeros((len(steps), len(PHASES)), np.int64)
    inside = place >= 0
    durations = (spans["end_ns"] - spans["start_ns"])[inside]
    np.add.at(spent, (place[inside], spans["phase"][inside]), durations)
    return spent
