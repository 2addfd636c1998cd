"""The page of the study on language, and what the literature claims of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from rankwise.report.charts.learning import HEIGHT, line_chart
from rankwise.report.page import GREY, PALETTE, Block, Chart, Notice, Page, Paragraph, Row, Section, Spec
from rankwise.studies import page_parts
from rankwise.studies.grids import Grid
from rankwise.studies.language import BLOCK, Point, Score, Task, over_seeds
from rankwise.studies.statistics import Contrast, loss_difference, time_ratio
from rankwise.studies.strategy_comparison import REFERENCE
from rankwise.studies.verdicts import Answer, Finding, Verdict, answer_of, times

Scores = Mapping[str, Score]

NO_WORSE = 0.02
"""Nats a character by which a loss may be higher and still be as good: 2% of perplexity."""

HALF_OF_500 = 250


@dataclass(frozen=True)
class _Claim:
    text: str
    source: str
    rule: str
    find: Callable[[Scores], Finding | None]


def _pair(scores: Scores, ours: str, other: str) -> tuple[Score, Score] | None:
    return (scores[ours], scores[other]) if ours in scores and other in scores else None


def _as_good(excess: Contrast) -> Answer:
    return answer_of(holds=excess.below(NO_WORSE), fails=excess.above(NO_WORSE))


def _better(excess: Contrast) -> Answer:
    return answer_of(holds=excess.below(0), fails=excess.above(0))


def _by_loss(
    ours: str, other: str, answer: Callable[[Contrast], Answer]
) -> Callable[[Scores], Finding | None]:
    """Judges by the loss after as many tokens, and tells that after as much time."""

    def find(scores: Scores) -> Finding | None:
        pair = _pair(scores, ours, other)
        if pair is None:
            return None
        return answer(_excess(*pair)), _losses(*pair)

    return find


def _as_good_with_fewer_bytes(
    ours: str, fewer: float, fails_below: float
) -> Callable[[Scores], Finding | None]:
    """Judges by the loss after as many tokens, and by how many times fewer bytes were sent."""

    def find(scores: Scores) -> Finding | None:
        pair = _pair(scores, ours, REFERENCE)
        if pair is None:
            return None
        ratio = times_fewer(*pair)
        loss = _as_good(_excess(*pair))
        answer = answer_of(
            holds=loss == "holds" and ratio >= fewer,
            fails=loss == "does not hold" or ratio < fails_below,
        )
        bytes_sent = f"With rounds of {pair[0].round_steps} steps it sends {ratio:,.1f} times fewer bytes."
        return answer, f"{bytes_sent} {_losses(*pair)}"

    return find


def _faster_everywhere(scores: Scores) -> Finding | None:
    pair = _pair(scores, "allreduce powersgd:4", REFERENCE)
    if pair is None:
        return None
    here = time_ratio(pair[0].seconds, pair[1].seconds)
    ratios = [here]
    evidence = f"As many tokens take {times(here)} times as long here"
    if pair[0].link_epochs_s and pair[1].link_epochs_s:
        # Both epochs of the short runs do the same, so they tell how far such times can be trusted.
        linked = time_ratio(pair[0].link_epochs_s, pair[1].link_epochs_s)
        ratios.append(linked)
        evidence += f" and {times(linked)} times over 100 Mbit/s."
    else:
        evidence += "; over 100 Mbit/s it was not run."
    holds = len(ratios) == 2 and all(ratio.below(1) for ratio in ratios)
    return answer_of(holds=holds, fails=any(ratio.above(1) for ratio in ratios)), evidence


def _excess(ours: Score, other: Score) -> Contrast:
    return loss_difference(ours.losses, other.losses)


def _losses(ours: Score, other: Score) -> str:
    """By how much one loss is above another, at equal tokens and at equal time."""
    name, of = ours.entrant.name, other.entrant.name
    words = f"The loss of {name} is {nats(_excess(ours, other))} that of {of} at equal tokens"
    for where, one, two in (
        ("at equal time here", ours.in_time, other.in_time),
        ("at equal time over 100 Mbit/s", ours.linked_in_time, other.linked_in_time),
    ):
        if one and two:
            words += f", {nats(loss_difference(one, two))} it {where}"
    return words + (". One seed does not tell the spread." if len(ours.losses) == 1 else ".")


def nats(excess: Contrast) -> str:
    """A difference of losses in words, with its interval."""
    spread = "" if math.isinf(excess.high) else f" ({excess.low:+.3f} to {excess.high:+.3f})"
    return f"{abs(excess.value):.3f} nats {'above' if excess.value > 0 else 'below'}{spread}"


def times_fewer(score: Score, reference: Score) -> float:
    """How many times fewer bytes it sent than the reference."""
    return reference.bytes_sent / score.bytes_sent if score.bytes_sent else math.inf


_AS_GOOD = f"as good is a loss at most {NO_WORSE} nats higher, for sure"

CLAIMS = (
    _Claim(
        "Local SGD is as good as synchronous training, and sends far fewer bytes",
        "Stich 2018, arXiv:1805.09767: local SGD converges at the rate of mini-batch SGD with far fewer "
        "rounds of communication (proved for convex functions)",
        f"Local AdamW with a round of 8 steps against allreduce. Holds if it is as good ({_AS_GOOD}) with "
        "4 times fewer bytes or more, does not if it is worse by more for sure, or sends half as many "
        "bytes or more.",
        _as_good_with_fewer_bytes("local-sgd", 4, 2),
    ),
    _Claim(
        "Post-local SGD generalises better than mini-batch SGD of the same batch",
        "Lin et al. 2018, arXiv:1808.07217: post-local SGD generalises better than large-batch training "
        "(shown mostly for images, with SGD)",
        "allreduce, whose batch is that of all ranks, for half of the epochs, then rounds of 8 steps, "
        "against allreduce for all. Holds if the held-out loss is lower for sure, does not if higher.",
        _by_loss("post-local-sgd", REFERENCE, _better),
    ),
    _Claim(
        "DiLoCo is as good as synchronous training, and sends 500 times fewer bytes",
        "Douillard et al. 2023, arXiv:2311.08105: on C4, 8 workers perform as well as fully synchronous "
        "optimisation while communicating 500 times less (from a pretrained network of 60 to 400 M "
        "parameters)",
        "From scratch, the longest rounds that fit, against allreduce. Holds if it is as good "
        f"({_AS_GOOD}) with {HALF_OF_500} times fewer bytes or more, does not if it is worse by more for "
        "sure. With fewer saved, and as good, it is undecided.",
        _as_good_with_fewer_bytes("diloco long", HALF_OF_500, 0),
    ),
    _Claim(
        "DiLoCo with short rounds is as good as synchronous training",
        "Douillard et al. 2023, arXiv:2311.08105: communicating more often than every 500 steps does no harm",
        f"Rounds of 32 steps. Holds if it is as good ({_AS_GOOD}), does not if it is worse by more for sure.",
        _by_loss("diloco", REFERENCE, _as_good),
    ),
    _Claim(
        "PowerSGD of rank 4 is as good as uncompressed training",
        "Vogels et al. 2019, arXiv:1905.13727: test performance on par with SGD, also of an LSTM on "
        "WikiText-2",
        f"With AdamW in place of SGD. Holds if it is as good ({_AS_GOOD}), does not if it is worse by more "
        "for sure.",
        _by_loss("allreduce powersgd:4", REFERENCE, _as_good),
    ),
    _Claim(
        "PowerSGD is faster than uncompressed training, whatever the network",
        "Vogels et al. 2019, arXiv:1905.13727: consistent wall-clock speed-ups over SGD with an optimised "
        "communication backend",
        "Holds if as many tokens take less time for sure here and over 100 Mbit/s, does not if more for "
        "sure in one.",
        _faster_everywhere,
    ),
    _Claim(
        "SlowMo is better than its base, at the same bytes",
        "Wang et al. 2019, arXiv:1910.00643: a slow momentum improves optimisation and generalisation of "
        "the base optimiser, also for translation with local Adam",
        "Against local-sgd with the same rounds of 8 steps. Holds if the loss is lower for sure, does not "
        "if higher.",
        _by_loss("slowmo", "local-sgd", _better),
    ),
    _Claim(
        "99% of the gradient can be dropped at no loss",
        "Aji and Heafield 2017, arXiv:1704.05021: the smallest 99% are dropped without damage to translation",
        f"allreduce with topk:0.01. Holds if it is as good ({_AS_GOOD}), does not if it is worse by more "
        "for sure.",
        _by_loss("allreduce topk:0.01", REFERENCE, _as_good),
    ),
)


_COLOURS = (GREY, *PALETTE[:-1], "#8a5a44")
"""Of the entrants, what they are compared with first."""


def judge(scores: Sequence[Score], *, quick: bool) -> list[Verdict]:
    """A verdict on each claim; a short form decides nothing."""
    by_name = {score.entrant.name: score for score in scores}
    judged = []
    for claim in CLAIMS:
        answer, evidence = claim.find(by_name) or ("undecided", "Not run to the end.")
        if quick:
            answer = "undecided"
        judged.append(Verdict(claim.text, claim.source, answer, evidence, claim.rule))
    return judged


def score_grid(task: Task, scores: Sequence[Score]) -> Grid:
    """A row an entrant: losses at equal tokens and at equal time, bytes and seconds."""
    reference = next((score for score in scores if score.entrant.name == REFERENCE), None)
    rows = tuple(
        (
            score.entrant.name,
            score.round_steps,
            score.rate,
            over_seeds(score.losses),
            over_seeds([math.exp(loss) for loss in score.losses]),
            over_seeds(score.in_time),
            over_seeds(score.linked_in_time),
            score.bytes_sent / 1e6,
            times_fewer(score, reference) if reference else None,
            over_seeds(score.seconds),
            score.linked_s,
        )
        for score in scores
    )
    columns = (
        *("strategy", "steps a round", "learning rate", "loss (nats)", "perplexity"),
        *("loss at equal time (nats)", "loss at equal time at 100 Mbit/s (nats)"),
        *("sent by all ranks (MB)", f"times fewer bytes than {REFERENCE}"),
        *("training (s)", "training at 100 Mbit/s (s)"),
    )
    return Grid("language", f"{task.tokens:,} characters, {task.ranks} ranks", columns, rows)


def curve_grid(scores: Sequence[Score]) -> Grid:
    """A row for each epoch of each run: loss against tokens, bytes and seconds."""
    rows = tuple(
        (
            score.entrant.name,
            seed,
            point.tokens,
            point.bytes_sent / 1e6,
            point.seconds,
            point.linked_s,
            point.loss,
        )
        for score in scores
        for seed, curve in enumerate(score.curves)
        for point in curve
    )
    columns = (
        *(
            "strategy",
            "seed",
            "tokens",
            "sent by all ranks (MB)",
            "training (s)",
            "training at 100 Mbit/s (s)",
        ),
        "loss (nats)",
    )
    return Grid("language_curves", "Held-out loss after each epoch", columns, rows)


def language_page(
    task: Task, scores: Sequence[Score], judged: Sequence[Verdict], command: str, *, quick: bool
) -> Page:
    """The page. `command` is what runs the study again."""
    text = task.text.name if task.text else "the topics of Python's help"
    at = (
        ", each strategy at the learning rate that suited it best in short runs"
        if len(task.rates) > 1
        else ""
    )
    return Page(
        "A language model, its ranks kept in step in several ways",
        f"{task.ranks} ranks train a character-level transformer of width {task.width} on {task.tokens:,} "
        f"characters of {text}{at}: loss on held-out text against tokens, bytes and seconds.",
        (
            Section("What the literature claims", tuple(_claims(judged, quick))),
            Section("Loss, bytes and seconds", tuple(_results(task, scores))),
            Section("How this was run", tuple(_how(task, scores, command))),
        ),
    )


def _claims(judged: Sequence[Verdict], quick: bool) -> Iterable[Block]:
    if quick:
        yield Notice("This is a short form: it shows what the study does, and tells nothing about language.")
    for verdict in judged:
        text = f"{verdict.evidence} ({verdict.source}. {verdict.rule})"
        yield Paragraph(text, lead=f"{verdict.claim}: {verdict.answer}.")


def _results(task: Task, scores: Sequence[Score]) -> Iterable[Block]:
    if not scores:
        yield Notice("Nothing was run here yet.")
        return
    linked = any(score.linked_s is not None for score in scores)
    caption = "Loss on held-out text after as many characters."
    after_tokens = _curves(scores, "tokens", lambda point: point.tokens, caption)
    caption = "The same against what all ranks sent."
    yield Row(
        (after_tokens, _curves(scores, "MB sent", lambda point: point.bytes_sent / 1e6, caption, log=True))
    )
    here = _curves(
        scores, "seconds", lambda point: point.seconds, "The same against seconds of training here."
    )
    if linked:
        caption = "The same with the ranks on two hosts that are joined by 100 Mbit/s."
        yield Row(
            (here, _curves(scores, "seconds at 100 Mbit/s", lambda point: point.linked_s, caption, log=True))
        )
    else:
        yield here
        yield Notice("Nothing was run over a link of 100 Mbit/s: benchmarks/slow_link.py does that.")
    yield score_grid(task, scores).table()
    yield Paragraph(
        "Curves are those of the first seed. Losses are in nats a character; the table has their means "
        "over seeds, with 95% intervals. Seconds are those of training, without start-up, evaluation and "
        "checkpoints. At equal time counts the loss when the fastest of these was through, on straight "
        "lines between epochs; the others' learning rates, which fall over the whole run, were still high "
        "then. Bytes are what all ranks handed over, shared out over epochs by their exchanges. Over the "
        "link two epochs of a part of the text are run, and scaled: the steps are the same, and with them "
        "the losses."
    )


def _curves(
    scores: Sequence[Score],
    title: str,
    across: Callable[[Point], float | None],
    caption: str,
    *,
    log: bool = False,
) -> Chart:
    """Loss over something, a line for each strategy."""
    values = [
        {"strategy": score.entrant.name, title: x, "loss": point.loss}
        for score in scores
        for point in score.curves[0]
        if (x := across(point)) is not None and not math.isnan(point.loss)
    ]
    spec: Spec = line_chart(values, title, "loss", "strategy")
    spec["height"] = HEIGHT + 80
    spec["encoding"]["color"] |= {
        "scale": {"domain": [score.entrant.name for score in scores], "range": list(_COLOURS)},
        "legend": {"title": None, "columns": 2, "orient": "bottom"},
    }
    if log:
        spec["encoding"]["x"]["scale"] = {"type": "log", "nice": False}
    return Chart(spec, caption, caption)


def _how(task: Task, scores: Sequence[Score], command: str) -> Iterable[Block]:
    yield page_parts.how_to_run(command)
    tried = f"All have the learning rate {task.rates[0]:g}"
    if len(task.rates) > 1:
        rates = ", ".join(f"{rate:g}" for rate in task.rates)
        tried = (
            f"Learning rates {rates} are tried in a quarter of the steps, and judged on a tenth of the text "
            "that is not trained on"
        )
    yield Paragraph(
        f"A step trains {task.ranks} x {task.batch_size} windows of {BLOCK} characters by AdamW "
        "(betas 0.9 and 0.95, decay 0.1, gradients clipped at 1, a tenth of the steps to warm up, then a "
        f"cosine), whose moments stay on their rank. {tried}; the last tenth of the text is for the losses "
        "above. The program is rankwise/studies/programs/language_model.py, and rankwise run starts it."
    )
    yield from page_parts.machines([score.records[0] for score in scores])
