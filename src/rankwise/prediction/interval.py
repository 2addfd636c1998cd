"""How far an epoch may be from what is predicted: each reason by its name, and the interval that they make.

A reason says how many seconds an epoch may take less or more, in 9 of 10 cases. Reasons have nothing to do
with each other, so that their squares add up, on each side of the prediction by itself: what was not measured
mostly makes an epoch longer. The figures below are what runs of this project were found to differ by, and
docs/prediction.md says which.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special  # type: ignore[import-untyped]  # scipy.stats takes a second to import

from rankwise.prediction.network import Cluster, Network
from rankwise.prediction.source import Compute, Source
from rankwise.prediction.steps import compute_at, known_at

LEVEL = 0.9
"""The share of intervals that hold what is measured."""

TELLING = 0.02
"""Of what is predicted: what may change it by less is not told."""

LEAST = 0.1
"""Of what is predicted: no interval begins lower."""

DRIFT, DRIFT_COUNT = 0.07, 8
"""By which part runs of the same differ that are made at other times (standard deviation): other users of
the machine, its clock, where memory lies; as if that many had been seen before the source's."""

EPOCHS, EPOCHS_COUNT = 0.02, 4
"""By which part epochs of a run differ, as if that many had been seen before the source's."""

MODEL, MODEL_CROWDED = 0.05, 0.12
"""How far the model is off beside all this, with a core for each rank and with less."""

EXCHANGE, ASSUMED_EXCHANGE = 0.3, (0.5, 1.0)
"""By which part exchanges of other sizes or between other ranks are off, and assumed ones, less and more."""

EMPTIED = 0.2
"""Of a step: what it takes longer behind an exchange, which empties the caches."""

NEIGHBOUR = 0.6
"""What a step takes longer beside other ranks: nothing, up to what two threads of one core lose."""

PER_STEP = 0.5
"""Of a forward and backward pass: what may not grow with the batch."""

CROWDED = (0.15, 0.5)
"""By which part ranks that share cores take less or more than their work, the turns of the others assumed."""


@dataclass(frozen=True)
class Doubt:
    """A reason why an epoch may take `below_s` less or `above_s` more. `narrower` says what was assumed, and
    which short run would tell; empty where a run of another kind tells no more."""

    name: str
    below_s: float
    above_s: float
    narrower: str = ""

    def told(self, total_s: float) -> str:
        """The line for people: what was not measured, which run narrows the interval, and by how much an
        epoch of `total_s` may be off for its sake. Empty where that is little, or no run would."""
        if not self.narrower or self.below_s + self.above_s < TELLING * total_s:
            return ""
        return f"{self.narrower} narrows it ({-self.below_s / total_s:+.0%} to {self.above_s / total_s:+.0%})"


@dataclass(frozen=True)
class Asked:
    """What was predicted: the seconds of an epoch, of them `computing_s` on the cores (`trained_s` in steps)
    and `exchanged_s` between ranks; the known steps that it is made of (`compute`); a worker's `batch`,
    `threads` of each, `busy` cores of a host and `crowd` threads for each, `workers_here` on a host, whether
    they meet in each step; exchanges in `shared` memory or by `messages`, and the `steps_a_round`."""

    total_s: float
    computing_s: float
    trained_s: float
    exchanged_s: float
    batch: int
    compute: Compute
    threads: int
    busy: int
    meets: bool
    crowd: float
    workers_here: int
    shared: bool
    messages: bool
    steps_a_round: float
    cluster: Cluster
    network: Network | None


def interval(total_s: float, doubts: Iterable[Doubt]) -> tuple[float, float]:
    """From and to: in seconds, never below 0."""
    doubts = tuple(doubts)
    below_s = math.hypot(*(doubt.below_s for doubt in doubts))
    above_s = math.hypot(*(doubt.above_s for doubt in doubts))
    return max(total_s - below_s, LEAST * total_s), total_s + above_s


def _by_factor(name: str, logarithm: float, total_s: float) -> Doubt:
    """An epoch that may take e**logarithm times as long, or as short."""
    return Doubt(name, -math.expm1(-logarithm) * total_s, math.expm1(logarithm) * total_s)


def doubts(source: Source, asked: Asked) -> tuple[Doubt, ...]:
    """All reasons that there are for this prediction."""
    found = [_repeats(asked), _drift(asked)]
    if asked.cluster.ranks > 1:
        found.append(_by_factor("model", MODEL_CROWDED if asked.crowd > 1 else MODEL, asked.total_s))
        found += [_exchanges(source, asked), *_network(asked)]
    found += [*_neighbours(source, asked), *_threads(source, asked), *_batch(source, asked)]
    return (*found, *_crowding(source, asked))


def _repeats(asked: Asked) -> Doubt:
    """Where one more epoch lies, by those of the source."""
    return _by_factor("repeats", _one_more(asked.compute.epochs_s, EPOCHS, EPOCHS_COUNT), asked.total_s)


def _drift(asked: Asked) -> Doubt:
    """Where one more run lies: it drifts itself, however many the source has."""
    return _by_factor("drift", _one_more(asked.compute.by_run_s, DRIFT, DRIFT_COUNT), asked.total_s)


def _one_more(seen_s: Sequence[float], spread: float, count: int) -> float:
    """How far the logarithm of one more may be from the mean of those seen: Student's interval for it, with a
    guess of how much they differ that weighs like `count` of them that were seen before."""
    logarithms = np.log(seen_s)
    freedom = count + len(logarithms) - 1
    variance = (count * spread**2 + float(((logarithms - logarithms.mean()) ** 2).sum())) / freedom
    quantile = float(special.stdtrit(freedom, (1 + LEVEL) / 2))
    return quantile * math.sqrt(variance * (1 + 1 / len(logarithms)))


def _exchanges(source: Source, asked: Asked) -> Doubt:
    messages = source.messages
    known = (messages.knows_sums or not asked.shared) and (messages.knows_messages or not asked.messages)
    less, more = (EXCHANGE, EXCHANGE) if known else ASSUMED_EXCHANGE
    above_s = more * asked.exchanged_s
    has_met = any(its.meets for its in source.compute)
    if not has_met:
        above_s += EMPTIED * asked.trained_s / max(asked.steps_a_round, 1.0)
    if known and has_met:
        return Doubt("exchanges", less * asked.exchanged_s, above_s)
    if messages.knows_sums:
        what, run = "messages to a master or between neighbours", "--strategy gradient-server"
    else:
        what, run = "exchanges", "--strategy allreduce"
    return Doubt(
        "exchanges",
        less * asked.exchanged_s,
        above_s,
        f"{what} were not measured, but assumed; a short run with --ranks 2 {run} --threads {asked.threads}",
    )


def _network(asked: Asked) -> list[Doubt]:
    if len(asked.cluster.hosts) == 1 or asked.network is None:
        return []
    if asked.network.link.measured:
        return [Doubt("network", EXCHANGE * asked.exchanged_s, EXCHANGE * asked.exchanged_s)]
    text = (
        f"the network is {asked.network.name} as it is described; rankwise doctor --hosts A,B --format json"
    )
    less, more = ASSUMED_EXCHANGE
    return [Doubt("network", less * asked.exchanged_s, more * asked.exchanged_s, text)]


def _neighbours(source: Source, asked: Asked) -> list[Doubt]:
    """Ranks that compute at once share memory and caches, and of some processors the cores."""
    known, busy = asked.compute.busy, asked.busy
    if known == busy:
        return []
    text = (
        f"the steps were made while {known} of a host's cores worked, and {busy} are to; a short run with "
        f"--ranks {asked.workers_here} --threads {asked.threads}"
    )
    there = known_at(source, asked.threads)
    if beside := [its for its in there if (its.busy, its.batch) == (busy, asked.compute.batch)]:
        # That steps of ranks that meet take longer may be for the meeting, or for the neighbours.
        part = 0.0 if asked.meets else beside[0].mean_s / asked.compute.mean_s - 1
        return [
            Doubt("neighbours", max(-part, 0) * asked.computing_s, max(part, 0) * asked.computing_s, text)
        ]
    if busy > known:
        missing = 1 - (known - 1) / (busy - 1)
        return [Doubt("neighbours", 0.0, NEIGHBOUR * missing * asked.computing_s, text)]
    missing = 1 - (busy - 1) / (known - 1)
    less_s = (1 - 1 / (1 + NEIGHBOUR)) * missing * asked.computing_s
    return [Doubt("neighbours", less_s, 0.0, text)]


def _threads(source: Source, asked: Asked) -> list[Doubt]:
    """Steps on other threads: between no use of more of them and their full use."""
    known = known_at(source, asked.threads)[0].threads
    if known == asked.threads:
        return []
    text = (
        f"no run had {asked.threads} threads a rank: steps on {known} stand for them; a short run with "
        f"--threads {asked.threads}"
    )
    if asked.threads > known:
        return [Doubt("threads", (1 - known / asked.threads) * asked.computing_s, 0.0, text)]
    return [Doubt("threads", 0.0, (known / asked.threads - 1) * asked.computing_s, text)]


def _batch(source: Source, asked: Asked) -> list[Doubt]:
    """Steps of another batch than the only one of the source: what of a pass grows with it is not known."""
    there = known_at(source, asked.threads)
    if len({its.batch for its in there}) > 1 or there[0].batch == asked.batch:
        return []
    known = there[0]
    changed_s = abs(known.per_sample_s * (asked.batch - known.batch))
    step_s = float(compute_at(source, asked.threads, asked.batch)[1].mean())
    much_s = PER_STEP * min(changed_s / step_s, asked.batch / known.batch + known.batch / asked.batch)
    much_s *= asked.trained_s
    text = (
        f"all steps had batches of {known.batch}: forward and backward are taken to grow with the batch, the "
        f"rest of a step not; a short run with --batch-size {asked.batch}"
    )
    larger = asked.batch > known.batch
    little_s = much_s / 5
    return [Doubt("batch", much_s if larger else little_s, little_s if larger else much_s, text)]


def _crowding(source: Source, asked: Asked) -> list[Doubt]:
    if asked.crowd <= 1 or asked.workers_here == 1:
        return []
    if asked.threads > 1:
        text = (
            "ranks of several threads that share cores hold each other up far more than their work says, and "
            f"no run tells how much; a run with --threads 1 or {asked.cluster.cores_per_host} ranks a host"
        )
        return [Doubt("shared cores", 0.0, asked.crowd**2 * asked.total_s, text)]
    if source.crowds:
        return []
    less, more = CROWDED
    text = (
        f"no run had more ranks than cores; a short run with --ranks {2 * source.cores} --strategy allreduce "
        "--threads 1"
    )
    return [Doubt("shared cores", less * asked.total_s, more * asked.total_s, text)]
