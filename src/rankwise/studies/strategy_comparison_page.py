"""The page of the contest between strategies, and what the literature claims of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.report.charts.learning import HEIGHT
from rankwise.report.page import Block, Chart, Notice, Page, Paragraph, Row, Section, Spec
from rankwise.studies import page_parts
from rankwise.studies.grids import Grid
from rankwise.studies.results import last_gain
from rankwise.studies.statistics import Contrast, Estimate
from rankwise.studies.strategy_comparison import REFERENCE, WORKERS, Course, Score
from rankwise.studies.verdicts import Answer, Finding, Verdict, answer_of, points

Scores = Mapping[str, Score]
_Find = Callable[[Scores, int], Finding | None]


@dataclass(frozen=True)
class _Claim:
    text: str
    source: str
    rule: str
    find: _Find


def _gain(scores: Scores, ours: str, other: str, val_samples: int) -> Contrast | None:
    """By how much one entrant is more accurate than another after all epochs, seed by seed."""
    if ours not in scores or other not in scores:
        return None
    return last_gain(scores[ours].records, scores[other].records, val_samples)


def _by_gain(ours: str, other: str, answer: Callable[[Contrast], Answer]) -> _Find:
    """Judges by how far one entrant is ahead of another."""

    def find(scores: Scores, val_samples: int) -> Finding | None:
        gain = _gain(scores, ours, other, val_samples)
        if gain is None:
            return None
        return answer(gain), f"{ours} is ahead of {other} by {points(gain)} at equal samples."

    return find


def _no_worse(gain: Contrast) -> Answer:
    loses = gain.below(0)
    return answer_of(holds=gain.low > -0.01 and not loses, fails=loses)


def _ahead(gain: Contrast) -> Answer:
    return answer_of(holds=gain.above(0), fails=gain.below(0))


def _far_fewer_bytes(scores: Scores, val_samples: int) -> Finding | None:
    gain = _gain(scores, "diloco 500", REFERENCE, val_samples)
    if gain is None:
        return None
    ratio = _times_fewer(scores["diloco 500"], scores[REFERENCE])
    if ratio is None:
        return None
    evidence = (
        f"With a round of 500 steps it sends {ratio:,.0f} times fewer bytes than {REFERENCE} in the same run "
        f"(an epoch's end ends a round too), and is ahead by {points(gain)}."
    )
    fails = ratio < 100 or gain.below(0)
    return answer_of(holds=ratio >= 250 and gain.low > -0.01 and not fails, fails=fails), evidence


def _times_fewer(score: Score, reference: Score | None) -> float | None:
    """How many times fewer bytes it sent than the reference."""
    if reference is None or not (score.bytes_sent and reference.bytes_sent):
        return None
    return reference.bytes_sent / score.bytes_sent


CLAIMS = (
    _Claim(
        "Post-local SGD is no worse than small-batch SGD",
        "Lin et al. 2020, arXiv:1808.07217",
        "Holds if at most 1 point of accuracy is lost for sure, does not if any is.",
        _by_gain("post-local-sgd", REFERENCE, _no_worse),
    ),
    _Claim(
        "DiLoCo sends 500 times fewer bytes at no loss",
        "Douillard et al. 2023, arXiv:2311.08105",
        "Holds with half of 500 or more and at most 1 point lost for sure; does not below 100, or if any is.",
        _far_fewer_bytes,
    ),
    _Claim(
        "PowerSGD of rank 2 has the accuracy of SGD",
        "Vogels et al. 2019, arXiv:1905.13727",
        "Holds if at most 1 point of accuracy is lost for sure, does not if any is.",
        _by_gain("allreduce powersgd:2", REFERENCE, _no_worse),
    ),
    _Claim(
        "EASGD is ahead of Downpour",
        "Zhang, Choromanska, LeCun 2015, arXiv:1412.6651",
        "Holds if it is more accurate for sure, does not if less.",
        _by_gain("easgd", "downpour", _ahead),
    ),
)


def judge(scores: Sequence[Score], val_samples: int) -> list[Verdict]:
    """A verdict on each claim of the literature."""
    by_name = {score.entrant.name: score for score in scores}
    judged = []
    for claim in CLAIMS:
        answer, evidence = claim.find(by_name, val_samples) or ("undecided", "Not run.")
        judged.append(Verdict(claim.text, claim.source, answer, evidence, claim.rule))
    return judged


def score_grid(course: Course, scores: Sequence[Score]) -> Grid:
    """A row an entrant: accuracy, bytes and time, here and over the slow link."""
    reference = next((score for score in scores if score.entrant.name == REFERENCE), None)
    rows = tuple(
        (
            score.entrant.name,
            score.rate,
            _in_percent(score.accuracy),
            _in_percent(score.in_time) if score.in_time else None,
            score.bytes_sent / 1e6 if score.bytes_sent else None,
            _times_fewer(score, reference),
            score.epoch_s,
            score.linked_epoch_s,
        )
        for score in scores
    )
    columns = (
        "strategy", "learning rate", "accuracy (%)", "accuracy at equal time (%)", "sent by all ranks (MB)",
        f"times fewer bytes than {REFERENCE}", "an epoch (s)", "an epoch at 100 Mbit/s (s)",
    )  # fmt: skip
    return Grid(f"strategies_{course.model}", f"{course.model}, {WORKERS} workers", columns, rows)


def contest_page(
    found: Mapping[Course, Sequence[Score]], judged: list[Verdict], dataset: str, command: str, quick: bool
) -> Page:
    """The page. `command` is what runs the study again."""
    sections = [Section("What the literature claims", tuple(_claims(judged, quick)))]
    for course, scores in found.items():
        sections.append(Section(course.model, tuple(_course(course, scores))))
    sections.append(Section("How this was run", tuple(_how(found, command))))
    return Page(
        "Ways to keep ranks in step, compared",
        f"{WORKERS} workers train on {dataset}, each strategy at the learning rate that suited it best in "
        "short runs on held-out samples: accuracy against bytes sent against time.",
        tuple(sections),
    )


def _claims(judged: Sequence[Verdict], quick: bool) -> Iterable[Block]:
    if quick:
        yield Notice("This is a short form: it shows what the study does, and tells nothing about accuracy.")
    for verdict in judged:
        yield Paragraph(
            f"{verdict.evidence} ({verdict.source}. {verdict.rule})",
            lead=f"{verdict.claim}: {'undecided' if quick else verdict.answer}.",
        )


def _course(course: Course, scores: Sequence[Score]) -> Iterable[Block]:
    if not scores:
        yield Notice("Nothing was run here yet.")
        return
    yield Row((_against_bytes(scores), _against_time(scores)))
    linked = [score for score in scores if score.linked_epoch_s is not None]
    if linked:
        yield _over_the_link(linked)
    yield score_grid(course, scores).table()
    if not linked:
        yield Notice("Nothing was run over a link of 100 Mbit/s: benchmarks/slow_link.py does that.")
    yield Paragraph(
        "Accuracy is that after the last epoch; at equal time it is the best that was reached before the "
        "fastest of these was through, if an epoch was over by then. Bytes are what all ranks handed over in "
        "a whole run; those of ddp go past the ledger and are not known. Times are the first seed's median "
        "epoch; over the link one epoch, of a part of the samples where rounds are short, scaled."
    )


def _against_bytes(scores: Sequence[Score]) -> Chart:
    known = [score for score in scores if score.bytes_sent]
    return _scatter(
        known,
        ("MB sent", [(score.bytes_sent or 0) / 1e6 for score in known], {"type": "log"}),
        "Accuracy after all epochs against what all ranks sent in the run; up and to the left is better.",
    )


def _against_time(scores: Sequence[Score]) -> Chart:
    return _scatter(
        scores,
        ("seconds an epoch", [score.epoch_s for score in scores], {"zero": False}),
        "Accuracy after all epochs against what one took on this machine; up and to the left is better.",
    )


def _over_the_link(scores: Sequence[Score]) -> Chart:
    return _scatter(
        scores,
        ("seconds an epoch", [score.linked_epoch_s or 0.0 for score in scores], {"type": "log"}),
        "The same with the workers on two hosts that are joined by 100 Mbit/s.",
    )


def _scatter(scores: Sequence[Score], across: tuple[str, list[float], Spec], caption: str) -> Chart:
    """A point with its name for each strategy; `across` is the title, the values and the scale of x."""
    title, numbers, scale = across
    values = [
        {"strategy": score.entrant.name, "accuracy": score.accuracy.mean, title: number}
        for score, number in zip(scores, numbers, strict=True)
    ]
    percent: Spec = {"field": "accuracy", "type": "quantitative", "axis": {"format": "~%"}}
    spec: Spec = {
        "data": {"values": values},
        "height": HEIGHT + 80,
        "encoding": {
            "x": {"field": title, "type": "quantitative", "scale": scale},
            "y": percent | {"scale": {"zero": False}},
            "tooltip": [{"field": name} for name in ("strategy", title, "accuracy")],
        },
        "layer": [
            {"mark": {"type": "point", "filled": True, "size": 60}},
            {
                "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 10},
                "encoding": {"text": {"field": "strategy"}},
            },
        ],
    }
    return Chart(spec, caption, caption)


def _in_percent(estimate: Estimate) -> Estimate:
    """An estimate of a fraction, as one in percent."""
    half = None if estimate.half_width is None else 100 * estimate.half_width
    return Estimate(100 * estimate.mean, half, estimate.n)


def _how(found: Mapping[Course, Sequence[Score]], command: str) -> Iterable[Block]:
    yield page_parts.how_to_run(command, "Learning rates fall along a cosine.")
    for course in found:
        yield Paragraph(
            f"Options of all runs: {page_parts.options(course.options)}. To choose among the rates "
            f"{', '.join(f'{rate:g}' for rate in course.rates)}: {page_parts.options(course.tuning)}.",
            lead=f"{course.model}.",
        )
    yield from page_parts.machines([score.records[0] for scores in found.values() for score in scores])
