"""The page of the experiment with failures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rankwise.report.charts.learning import HEIGHT
from rankwise.report.page import Block, Chart, Notice, Page, Paragraph, Row, Section, Spec
from rankwise.studies import page_parts
from rankwise.studies.failures import BEFORE, PARTS, Found, Trouble, failures_grid, parts_s
from rankwise.studies.results import last_accuracy
from rankwise.studies.verdicts import Verdict


def failures_page(
    trouble: Trouble, found: Found, judged: Sequence[Verdict], dataset: str, command: str, *, quick: bool
) -> Page:
    """The page. `command` is what runs the study again."""
    return Page(
        "Ranks that fail by chance",
        f"In each epoch each process fails with a probability, on {dataset}: asleep for a while, or killed. "
        "The paper speaks of such an experiment, and did not run it.",
        (
            Section("What comes of it", tuple(_answers(judged, quick))),
            Section("Accuracy and time", tuple(_results(trouble, found))),
            Section("How this was run", tuple(_how(trouble, found, command))),
        ),
    )


def _answers(judged: Sequence[Verdict], quick: bool) -> Iterable[Block]:
    if quick:
        yield Notice("This is a short form: it shows what the study does, and tells nothing about accuracy.")
    for verdict in judged:
        yield Paragraph(f"{verdict.evidence} ({verdict.rule})", lead=f"{verdict.claim}: {verdict.answer}.")


def _results(trouble: Trouble, found: Found) -> Iterable[Block]:
    if not found:
        yield Notice("Nothing was run here yet.")
        return
    yield Row((_accuracy(trouble, found), _time(trouble, found)))
    yield failures_grid(trouble, found).table()
    yield Paragraph(
        "A rank that is killed stays away until fewer than a master and a worker are left; then all are "
        "started again from the newest checkpoint. What was before the last start is known as a whole, not "
        "by phase: the epochs from before, what was trained again, the pauses, and the starting itself."
    )


def _accuracy(trouble: Trouble, found: Found) -> Chart:
    values = [
        {
            "failures": trouble.words(setting),
            "processes": str(setting.processes),
            "accuracy": sum(map(last_accuracy, records)) / len(records),
        }
        for setting, records in found.items()
    ]
    spec: Spec = {
        "data": {"values": values},
        "height": HEIGHT,
        "mark": {"type": "point", "filled": True, "size": 60},
        "encoding": {
            "y": {"field": "failures", "type": "nominal", "sort": None, "axis": {"title": None}},
            "x": {
                "field": "accuracy",
                "type": "quantitative",
                "scale": {"zero": False},
                "axis": {"format": "~%"},
            },
            "color": {"field": "processes", "type": "nominal"},
            "tooltip": [{"field": name} for name in ("failures", "processes", "accuracy")],
        },
    }
    return Chart(spec, "Accuracy after the last epoch, mean over seeds.", "Accuracy by failures.")


def _time(trouble: Trouble, found: Found) -> Chart:
    parts = {setting: [parts_s(record) for record in records] for setting, records in found.items()}
    values = [
        {
            "run": f"{setting.processes} processes, {trouble.words(setting)}",
            "part": name,
            "seconds": sum(its[name] for its in runs) / len(runs),
        }
        for setting, runs in parts.items()
        for name in (*PARTS, BEFORE)
    ]
    spec: Spec = {
        "data": {"values": values},
        "height": {"step": 16},
        "mark": "bar",
        "encoding": {
            "y": {
                "field": "run",
                "type": "nominal",
                "sort": None,
                "axis": {"title": None, "labelLimit": 240},
            },
            "x": {"field": "seconds", "type": "quantitative"},
            "color": {"field": "part", "type": "nominal", "sort": [*PARTS, BEFORE]},
            "tooltip": [{"field": name} for name in ("run", "part", "seconds")],
        },
    }
    return Chart(
        spec, "Where the seconds went, for the mean rank that lived to the end.", "Seconds by phase."
    )


def _how(trouble: Trouble, found: Found, command: str) -> Iterable[Block]:
    yield page_parts.how_to_run(command, "Who fails, and in which step, follows from the seed.")
    yield Paragraph(f"Options of all runs: {page_parts.options(trouble.options)}.")
    yield from page_parts.machines([record for records in found.values() for record in records])
