"""The paper's claims, and whether they hold here: each with its rule and its evidence.

"For sure" is said of a difference whose whole interval (`statistics.Contrast`) lies on one side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from rankwise.studies import paper
from rankwise.studies.ledgers import communication
from rankwise.studies.plan import Trial
from rankwise.studies.results import Results, best_accuracy, loss_gap, total_s
from rankwise.studies.statistics import Contrast, Estimate

Answer = Literal["holds", "does not hold", "undecided"]
Finding = tuple[Answer, str]
"""An answer and the evidence for it."""

FEW, MANY = 3, 8
"""The first and the last row of the paper's Table 1."""


@dataclass(frozen=True)
class Claim:
    """What the paper claims and where; by which rule it is judged, and which experiment it takes."""

    text: str
    source: str
    rule: str
    experiment: str
    find: Callable[[Results], Finding | None]
    needs_length: bool = True
    """Whether a short form is too short to tell."""


@dataclass(frozen=True)
class Verdict:
    """A claim judged."""

    claim: str
    source: str
    answer: Answer
    evidence: str
    rule: str


def judge(results: Results) -> list[Verdict]:
    """A verdict on each claim. What missing runs or a short form cannot tell is undecided."""
    return [_judge(claim, results) for claim in CLAIMS]


def _judge(claim: Claim, results: Results) -> Verdict:
    found = claim.find(results)
    if found is None:
        answer, evidence = _undecided(f"Not run: rankwise reproduce {claim.experiment}.")
    elif results.scale.quick and claim.needs_length:
        answer, evidence = _undecided(f"A short form trains too little to tell. {found[1]}")
    else:
        answer, evidence = found
    return Verdict(claim.text, claim.source, answer, evidence, claim.rule)


def _accuracy_falls(results: Results) -> Finding | None:
    scale = results.scale
    drop = results.gain(scale.averaging(FEW), scale.averaging(MANY))
    if drop is None:
        return None
    theirs = paper.TABLE_1[FEW].accuracy - paper.TABLE_1[MANY].accuracy
    evidence = (
        f"From {FEW} to {MANY} processes it falls by {points(drop)}; in the paper by {100 * theirs:.1f}. "
    )
    rows = (f"{ranks}: {_accuracy(results, scale.averaging(ranks))}" for ranks in scale.processes)
    return answer_of(drop.above(0), drop.below(0)), evidence + "By processes: " + ", ".join(rows) + "."


def _three_halve_the_time(results: Results) -> Finding | None:
    scale = results.scale
    same_batch = results.slowdown(scale.timed_turns(FEW), scale.timed_turns(1))
    if same_batch is None:
        return None
    evidence = f"At the same batch and epochs they need {times(same_batch)} of the time of one process."
    in_all = results.slowdown([scale.averaging(FEW)], [scale.alone()], total_s)
    an_epoch = results.slowdown([scale.averaging(FEW)], [scale.alone()])
    if in_all and an_epoch:
        theirs = paper.TABLE_1[FEW].time_s / paper.BASELINE.time_s
        evidence += (
            f" Compared as the paper does, {scale.epochs} epochs at batch 16 with {scale.baseline_epochs} of "
            f"one process at batch 4: {times(in_all)} here, {theirs:.2f} there. Epoch against epoch of these "
            f"runs: {times(an_epoch)} here, {theirs * paper.BASELINE_EPOCHS / paper.EPOCHS:.2f} there."
        )
    return answer_of(same_batch.below(0.6), same_batch.above(0.6)), evidence


def _time_grows(results: Results) -> Finding | None:
    scale = results.scale
    all_cores = results.slowdown(scale.threads_turns(MANY, "all"), scale.threads_turns(FEW, "all"))
    if all_cores is None:
        return None
    theirs = paper.TABLE_1[MANY].time_s / paper.TABLE_1[FEW].time_s
    evidence = (
        f"With all cores for every process, as in the paper, an epoch with {MANY} processes takes "
        f"{times(all_cores)} times as long as with {FEW}; in the paper, on {paper.CORES} cores, {theirs:.1f}."
    )
    shared = results.slowdown([scale.averaging(MANY)], [scale.averaging(FEW)])
    if shared:
        evidence += f" With the cores shared out it takes {times(shared)} times as long."
    return answer_of(all_cores.above(1), all_cores.below(1)), evidence


def _batch_8_is_the_sweet_spot(results: Results) -> Finding | None:
    scale = results.scale
    eight = scale.averaging(4, batch_size=8)
    rows: list[str] = []
    better: list[str] = []
    matters_of_taste: list[str] = []
    for size in scale.batch_sizes:
        other = scale.averaging(4, batch_size=size)
        gain, time = results.gain(other, eight), results.slowdown([other], [eight])
        if gain is None or time is None:
            return None
        if size == 8:
            continue
        rows.append(f"batch {size} {points(gain, signed=True)} in {times(time)} of the time")
        if (time.below(1) and not gain.below(0)) or (gain.above(0) and not time.above(1)):
            better.append(str(size))
        elif gain.above(0):
            matters_of_taste.append(str(size))
    evidence = f"Against batch 8: {'; '.join(rows)}. "
    if better:
        evidence += f"Better is batch {' and '.join(better)}."
    elif matters_of_taste:
        evidence += f"More accurate but slower is batch {' and '.join(matters_of_taste)}: a matter of taste."
    else:
        evidence += "None is better."
    return answer_of(not better and not matters_of_taste, bool(better)), evidence


def _communication_under_a_second(results: Results) -> Finding | None:
    runs = {ranks: results.of(results.scale.stopwatch_run(ranks)) for ranks in results.scale.stopwatch}
    if not all(runs.values()):
        return None
    found = {ranks: communication(records, "worker") for ranks, records in runs.items()}
    evidence = " ".join(
        f"With {ranks} processes, for {paper.EPOCHS} epochs in a worker, the author's stopwatch shows "
        f"{one.stopwatch_s:.2f} s; the ledger of the same run {one.transfer_s:.2f} s of transfer and "
        f"{one.wait_s:.1f} s of waiting."
        for ranks, one in found.items()
    )
    under = all(one.transfer_s + one.wait_s < 1 for one in found.values())
    return answer_of(under, not under), evidence


def _replication_is_accurate_but_no_faster(results: Results) -> Finding | None:
    alone, replicated = results.scale.alone(), results.scale.replication()
    gain, slowdown = results.gain(replicated, alone), results.slowdown([replicated], [alone])
    if gain is None or slowdown is None:
        return None
    evidence = (
        f"It reaches {_accuracy(results, replicated)} (the paper {paper.REPLICATION.accuracy:.1%}), one "
        f"process {_accuracy(results, alone)} (the paper {paper.BASELINE.accuracy:.1%}). As many epochs take "
        f"{times(slowdown)} times as long (the paper "
        f"{paper.REPLICATION.time_s / paper.BASELINE.time_s:.1f}). The best accuracy of one process is "
        f"reached {_until(results)} (the paper: in the 8th)."
    )
    fails = gain.below(0) or slowdown.below(1)
    return answer_of(gain.above(0) and not fails, fails), evidence


def _small_shards_overfit(results: Results) -> Finding | None:
    scale = results.scale
    drop = results.gain(scale.averaging(FEW), scale.averaging(MANY))
    regained = results.gain(scale.averaging(MANY, shards="redealt"), scale.averaging(MANY))
    if drop is None or regained is None:
        return None
    evidence = (
        f"From {FEW} to {MANY} processes {points(drop)} are lost; shards dealt anew give back "
        f"{points(regained)}.{_gap(results, FEW)}{_gap(results, MANY)}"
    )
    half = drop.value / 2
    explains = drop.above(0) and regained.above(half)
    return answer_of(explains, drop.above(0) and regained.below(half)), evidence


CLAIMS = (
    Claim(
        "Accuracy falls with more processes",
        "Table 1",
        f"Holds if the best accuracy with {FEW} processes is above that with {MANY} for sure, does not hold "
        "if it is below for sure.",
        "processes",
        _accuracy_falls,
    ),
    Claim(
        "3 processes halve the time of one",
        "section 5.3",
        "Compared at the same batch (16) and epochs: holds if they need less than 0.6 of the time for sure, "
        "does not hold if more for sure.",
        "timing",
        _three_halve_the_time,
    ),
    Claim(
        f"Time grows from {FEW} to {MANY} processes",
        "Table 1",
        "With the paper's threads, all cores for every process: holds if an epoch is longer for sure, does "
        "not hold if it is shorter for sure.",
        "timing",
        _time_grows,
    ),
    Claim(
        "Batch 8 is the sweet spot",
        "Table 2",
        "Does not hold if another batch is faster for sure and not less accurate for sure, or more accurate "
        "for sure and not slower for sure. Holds if that is so for none, and none is more accurate for sure.",
        "batch-size",
        _batch_8_is_the_sweet_spot,
    ),
    Claim(
        "Communication takes less than 1 s",
        "section 5.5, Figure 2",
        f"The mean worker's time in exchanges by the ledger, waiting included, for {paper.EPOCHS} epochs: "
        "holds if it is below 1 s with each number of processes, else it does not.",
        "timing",
        _communication_under_a_second,
        needs_length=False,
    ),
    Claim(
        "Replication gives 66%, but no speedup",
        "section 5.2",
        "Holds if it is more accurate than one process for sure, and not faster for sure. Does not hold if "
        "it is less accurate for sure, or faster for sure.",
        "replication",
        _replication_is_accurate_but_no_faster,
    ),
    Claim(
        "Accuracy falls because small shards overfit",
        "sections 5.3, 6.1",
        "Shards dealt anew each epoch are as small, but every worker sees all samples in time. Holds if "
        f"they give back more than half of what {MANY} processes lose for sure, does not hold if less than "
        "half for sure.",
        "processes",
        _small_shards_overfit,
    ),
)


def answer_of(holds: bool, fails: bool) -> Answer:
    return "holds" if holds else "does not hold" if fails else "undecided"


def _undecided(evidence: str) -> Finding:
    return "undecided", evidence


def _until(results: Results) -> str:
    """When replication is first as accurate as one process at its best, with the first seed."""
    goal = best_accuracy(results.of(results.scale.alone())[0])
    for row in results.of(results.scale.replication())[0].evaluated:
        if row.val_accuracy >= goal:
            return f"in epoch {row.epoch}"
    return "in none of its epochs"


def _gap(results: Results, ranks: int) -> str:
    gap = results.estimate(results.scale.averaging(ranks), loss_gap)
    if gap is None:
        return ""
    side = "above" if gap.mean > 0 else "below"
    return f" With {ranks} the last validation loss is {abs(gap.mean):.2f} {side} the training loss."


def _accuracy(results: Results, trial: Trial) -> str:
    found = results.estimate(trial, best_accuracy)
    return with_interval(found) if found else "not run"


def with_interval(value: Estimate) -> str:
    """An accuracy in percent, with its interval."""
    spread = "" if value.half_width is None else f" ± {100 * value.half_width:.1f}"
    return f"{100 * value.mean:.1f}{spread}%"


def points(gain: Contrast, signed: bool = False) -> str:
    """A difference of accuracies in words, with its interval."""
    sign = "+" if signed else ""
    return f"{100 * gain.value:{sign}.1f} points ({100 * gain.low:.1f} to {100 * gain.high:.1f})"


def times(ratio: Contrast) -> str:
    """A ratio of times in words, with its interval."""
    return f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
