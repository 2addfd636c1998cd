"""What every rank did when, in a few steps: a lane a rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline
from rankwise.report.charts.times import height, rank_name
from rankwise.report.page import GREEN, GREY, ORANGE, PURPLE, VERMILION, YELLOW, Chart, Spec, Table

COLOURS = {
    "data": "#9ccbee",
    "forward": "#56a5dd",
    "backward": "#1f7fc4",
    "optimizer": "#2c5c96",
    "pack": "#f0a37a",
    "transfer": VERMILION,
    "waiting": ORANGE,
    "evaluation": PURPLE,
    "checkpoint": GREEN,
    "recovery": YELLOW,
    "other": "#7d6a58",
    "instrument": GREY,
}
"""The colour of each phase; `waiting` is the part of an exchange before the late one came."""

MOST_STEPS = 8
MOST_LANES = 400
"""Steps times ranks that a chart shows at most, so that the page of many ranks stays light."""


def steps(timelines: Sequence[RankTimeline]) -> tuple[Chart, ...]:
    """The last steps of the last epoch that all workers began, and what followed; empty without steps."""
    window = _window(timelines)
    if not window:
        return ()
    epoch, start_ns, end_ns, epoch_end_ns = window
    shown = _lanes(timelines, start_ns, end_ns, f"The last steps of epoch {epoch}, their exchanges included.")
    if epoch_end_ns <= end_ns:
        return (shown,)
    return shown, _lanes(
        timelines, end_ns, epoch_end_ns, f"What followed in epoch {epoch}: evaluation, checkpoint, record."
    )


def _window(timelines: Sequence[RankTimeline]) -> tuple[int, int, int, int] | None:
    """An epoch, and in ns the start of its last few steps, their end, and the end of the epoch."""
    workers = [line for line in timelines if line.role == "worker"]
    steps = [line.steps[line.steps["step"] > 0] for line in workers]
    if not workers or not all(len(rows) for rows in steps):
        return None
    epoch = min(int(rows["epoch"][-1]) for rows in steps)
    few = max(1, min(MOST_STEPS, MOST_LANES // len(timelines)))
    shown = [rows[rows["epoch"] == epoch][-few:] for rows in steps]
    if not all(len(rows) for rows in shown):
        return None
    start_ns = min(int(rows["start_ns"][0]) for rows in shown)
    end_ns = max(int(rows["end_ns"][-1]) for rows in shown)
    rest = [line.steps[(line.steps["epoch"] == epoch) & (line.steps["step"] == 0)] for line in timelines]
    epoch_end_ns = max((int(rows["end_ns"][-1]) for rows in rest if len(rows)), default=end_ns)
    return epoch, start_ns, end_ns, epoch_end_ns


def _lanes(timelines: Sequence[RankTimeline], start_ns: int, end_ns: int, caption: str) -> Chart:
    """A lane a rank from `start_ns` to `end_ns`; times are shown in ms from `start_ns` on."""
    values = []
    for line in timelines:
        for phase, begin_ns, stop_ns, late in _pieces(line, start_ns, end_ns):
            values.append(
                {
                    "rank": rank_name(line),
                    "phase": phase,
                    "start": (begin_ns - start_ns) / 1e6,
                    "end": (stop_ns - start_ns) / 1e6,
                    "ms": (stop_ns - begin_ns) / 1e6,
                    "waiting for": late,
                }
            )
    present = [phase for phase in COLOURS if any(value["phase"] == phase for value in values)]
    # Without Shift the wheel scrolls the page, and a finger does so always.
    zoom = {
        "type": "interval",
        "encodings": ["x"],
        "zoom": "wheel![event.shiftKey]",
        "translate": "[pointerdown[event.pointerType == 'mouse'], window:pointerup] > window:pointermove!",
    }
    spec: Spec = {
        "data": {"values": values},
        "height": height(len(timelines), widest=28),
        "params": [{"name": "zoom", "select": zoom, "bind": "scales"}],
        "mark": {"type": "bar", "clip": True},
        "encoding": {
            "y": {"field": "rank", "type": "nominal", "sort": None, "axis": {"grid": False}},
            "x": {
                "field": "start",
                "type": "quantitative",
                "title": "ms",
                "scale": {"domain": [0, (end_ns - start_ns) / 1e6], "nice": False},
            },
            "x2": {"field": "end"},
            "color": {
                "field": "phase",
                "type": "nominal",
                "scale": {"domain": present, "range": [COLOURS[phase] for phase in present]},
                "legend": {"title": None},
            },
            "tooltip": [{"field": name} for name in ("rank", "phase", "ms", "start", "waiting for")],
        },
    }
    return Chart(
        spec,
        f"{caption} Drag to move; turn the wheel with Shift to look closer; a double click brings all back.",
        f"Lanes of {len(timelines)} ranks over {(end_ns - start_ns) / 1e6:.3g} ms.",
        Table(
            ("rank", "epoch", "step", "start, ms", "ms", "samples"),
            tuple(_step_rows(timelines, start_ns, end_ns)),
            "The steps that end in it",
            folded=True,
        ),
    )


def _pieces(line: RankTimeline, start_ns: int, end_ns: int) -> Iterable[tuple[str, int, int, int | None]]:
    """Phase, start, end and whom it waited for, of what a rank did in a window; exchanges taken apart."""
    spans = line.spans[(line.spans["end_ns"] > start_ns) & (line.spans["start_ns"] < end_ns)]
    waits = line.exchanges[line.exchanges["wait_ns"] > 0]
    for number, begin_ns, stop_ns in spans.tolist():
        phase = PHASES[number]
        if phase == "transfer":
            entered = waits["entered_ns"]
            for wait in waits[(entered >= begin_ns) & (entered < stop_ns)]:
                entered_ns, until_ns = int(wait["entered_ns"]), int(wait["entered_ns"] + wait["wait_ns"])
                if entered_ns > begin_ns:
                    yield phase, begin_ns, entered_ns, None
                yield "waiting", entered_ns, until_ns, int(wait["late"])
                begin_ns = until_ns
        if stop_ns > begin_ns:
            yield phase, begin_ns, stop_ns, None


def _step_rows(
    timelines: Sequence[RankTimeline], start_ns: int, end_ns: int
) -> Iterable[tuple[str, int, int, float, float, int]]:
    for line in timelines:
        steps: Any = line.steps[(line.steps["end_ns"] > start_ns) & (line.steps["end_ns"] <= end_ns)]
        for epoch, step, begin_ns, stop_ns, samples in steps.tolist():
            name = rank_name(line)
            yield name, epoch, step, (begin_ns - start_ns) / 1e6, (stop_ns - begin_ns) / 1e6, samples
