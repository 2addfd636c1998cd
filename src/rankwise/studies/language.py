"""A language model under strategies and compressions, each at its own learning rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from rankwise.runs.record import Record
from rankwise.studies.plan import Options
from rankwise.studies.statistics import Estimate, estimate
from rankwise.studies.strategy_comparison import REFERENCE, Entrant

PROGRAM = Path(__file__).parent / "programs" / "language_model.py"
"""What is trained: a program with a `rankwise.Run`, started as `rankwise run` starts any."""

BLOCK = 64
STEP_WINDOWS = 16
"""Windows that all ranks together train in a step."""

EPOCHS, TUNING_EPOCHS, LINK_EPOCHS = 8, 2, 2
RATES = (1e-3, 3e-3)
LONG_ROUND = 500
"""Steps of a round that saves as many bytes as DiLoCo claims to."""

LINK_STEPS = 64
"""Steps of an epoch over the slow link, where a round is no longer than they are."""


def _entrant(name: str, strategy: str = "", **options: Any) -> Entrant:
    return Entrant(name, {"strategy": strategy or name, **options})


@dataclass(frozen=True)
class Task:
    """What is trained, and how far it goes. `tokens` are characters that all ranks of a final run train."""

    ranks: int = 4
    tokens: int = EPOCHS * LONG_ROUND * STEP_WINDOWS * BLOCK
    width: int = 128
    text: Path | None = None
    rates: tuple[float, ...] = RATES
    only: tuple[str, ...] = ()

    @property
    def batch_size(self) -> int:
        """Windows that a rank trains in a step."""
        return max(1, STEP_WINDOWS // self.ranks)

    @property
    def windows(self) -> int:
        """Windows that all ranks train in an epoch."""
        return max(self.tokens // BLOCK // EPOCHS, self.ranks * self.batch_size)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.windows // (self.ranks * self.batch_size))

    @property
    def layers(self) -> int:
        """Of the transformer, which grows in both directions."""
        return max(1, self.width // 32)

    @cached_property
    def entrants(self) -> tuple[Entrant, ...]:
        """Who takes part. An epoch's end ends a round, so none is longer than that."""
        found = (
            _entrant(REFERENCE),
            *(_entrant(f"allreduce {form}", REFERENCE, compress=form)
              for form in ("bf16", "topk:0.01", "powersgd:4")),
            _entrant("local-sgd", sync_every=8),
            _entrant("post-local-sgd", sync_every=8),
            _entrant("slowmo", sync_every=8),
            _entrant("diloco", sync_every=32),
            _entrant("diloco long", "diloco", sync_every=min(LONG_ROUND, self.steps)),
        )  # fmt: skip
        return tuple(one for one in found if not self.only or one.name in self.only)

    @property
    def model_words(self) -> list[str]:
        """What the program is given of its network."""
        return ["--block", str(BLOCK), "--width", str(self.width), "--layers", str(self.layers)]

    def name(self, entrant: Entrant, rate: float, *, final: bool) -> str:
        """The name of a run, but for its seed."""
        return f"language-{entrant.slug}-lr{rate:g}{'' if final else '-tuning'}"

    def run_options(self, entrant: Entrant, *, epochs: int) -> Options:
        """What `rankwise run` is given, but for the seed."""
        return {"ranks": self.ranks, "epochs": epochs, **entrant.options}

    def program(
        self, rate: float, seed: int, *, epochs: int, windows: int = 0, tuning: bool = False
    ) -> list[str]:
        """The program with its arguments."""
        words = ["--text", str(self.text.absolute())] if self.text else []
        numbers = {"epochs": epochs, "windows": windows or self.windows, "batch-size": self.batch_size}
        for name, value in {**numbers, "lr": f"{rate:g}", "seed": seed}.items():
            words += [f"--{name}", str(value)]
        return [str(PROGRAM), *words, *self.model_words, *(["--tuning"] if tuning else [])]

    def link_options(self, entrant: Entrant) -> Options:
        """The options of an entrant's short run over the slow link."""
        return self.run_options(entrant, epochs=LINK_EPOCHS) | {"seed": 0}

    def link_program(self, entrant: Entrant) -> list[str]:
        """The program of that run, whose epochs are whole rounds, and no longer than those of a final run."""
        steps = max(LINK_STEPS, sync_every(entrant, first_half=False))
        windows = min(steps * self.ranks * self.batch_size, self.windows)
        return self.program(self.rates[0], 0, epochs=LINK_EPOCHS, windows=windows)


QUICK = Task(ranks=2, tokens=EPOCHS * 6 * STEP_WINDOWS * BLOCK, width=32,
             only=(REFERENCE, "allreduce powersgd:4", "diloco"))  # fmt: skip
"""A few minutes, to see what the study does."""


def sync_every(entrant: Entrant, *, first_half: bool) -> int:
    """Steps between two exchanges of an entrant, in the first or the second half of its epochs."""
    in_each_step = first_half and entrant.options["strategy"] == "post-local-sgd"
    return 1 if in_each_step else int(entrant.options.get("sync_every", 1))


def held_out_loss(record: Record) -> float:
    """The held-out loss after the last epoch, in nats a character."""
    loss = record.epochs[-1].val_loss
    return math.nan if loss is None else loss


def best_rate(tuned: Mapping[float, Record]) -> float:
    """The rate whose short run had the lowest loss in the end; one that diverged has no loss."""
    known = {rate: loss for rate, its in tuned.items() if not math.isnan(loss := held_out_loss(its))}
    return min(known or tuned, key=lambda rate: known.get(rate, rate))


@dataclass(frozen=True)
class Point:
    """Where a run stood after an epoch; what is sent and what time went by are counted from its start.

    Bytes are those of all ranks, shared out over epochs by how often each exchanged. `linked_s` is what the
    same would take over the slow link.
    """

    tokens: int
    bytes_sent: float
    seconds: float
    linked_s: float | None
    loss: float


@dataclass(frozen=True)
class Score:
    """What an entrant came to, over its seeds; losses are held-out ones, in nats a character.

    `curves` holds for each seed where it stood after each epoch. `losses` are those at the end, a seed each;
    `in_time` and `linked_in_time` those when the fastest entrant was through, here and over the slow link,
    None if one was not over with its first epoch by then. `link_epochs_s` are the seconds of the short run's
    epochs over the link.
    """

    entrant: Entrant
    rate: float
    records: Sequence[Record]
    curves: Sequence[Sequence[Point]]
    in_time: Sequence[float] | None
    linked_in_time: Sequence[float] | None
    link_epochs_s: Sequence[float] = ()

    @property
    def losses(self) -> list[float]:
        """After all tokens, by seed."""
        return [curve[-1].loss for curve in self.curves]

    @property
    def seconds(self) -> list[float]:
        """Of training here, by seed, without evaluation and start-up."""
        return [curve[-1].seconds for curve in self.curves]

    @property
    def linked_s(self) -> float | None:
        """Of the same over the slow link."""
        return self.curves[0][-1].linked_s

    @property
    def bytes_sent(self) -> float:
        """By all ranks in the first seed's run."""
        return self.curves[0][-1].bytes_sent

    @property
    def round_steps(self) -> int:
        """Steps of a round, in the end."""
        return sync_every(self.entrant, first_half=False)


def scores(
    task: Task, finals: Mapping[str, tuple[float, Sequence[Record]]], linked: Mapping[str, Record]
) -> list[Score]:
    """The scores of all entrants that came to their end; `finals` holds rate and records by entrant's name,
    `linked` a short run over the slow link."""
    entrants = [one for one in task.entrants if one.name in finals]
    curves = {
        one.name: [curve(one, record, linked.get(one.name)) for record in finals[one.name][1]]
        for one in entrants
    }
    limit_s = min((_mean([its[-1].seconds for its in runs]) for runs in curves.values()), default=0.0)
    linked_s = [its[0][-1].linked_s for its in curves.values()]
    known_s = [seconds for seconds in linked_s if seconds is not None]
    found = []
    for one in entrants:
        rate, records = finals[one.name]
        runs = curves[one.name]
        in_time = _all([loss_at([(p.seconds, p.loss) for p in its], limit_s) for its in runs])
        over_link = None
        if one.name in linked:
            rows = [[(p.linked_s or 0.0, p.loss) for p in its] for its in runs]
            over_link = _all([loss_at(row, min(known_s)) for row in rows])
        link_s = [row.train_s for row in linked[one.name].epochs] if one.name in linked else []
        found.append(Score(one, rate, records, runs, in_time, over_link, link_s))
    return found


def curve(entrant: Entrant, record: Record, link: Record | None) -> list[Point]:
    """Where a run stood after each of its epochs. `link` is a run of two epochs over the slow link, of which
    the second tells the time; the first, which pays for warming up, only where the first half of a run
    exchanges in another way."""
    rows = record.epochs
    firsts = [row.epoch <= len(rows) / 2 for row in rows]
    pairs = list(zip(rows, firsts, strict=True))
    exchanges = [row.steps / sync_every(entrant, first_half=first) for row, first in pairs]
    an_exchange = sum(rank.bytes_sent for rank in record.ranks) / sum(exchanges)
    sent = accumulate(number * an_exchange for number in exchanges)
    tokens = accumulate(row.train_samples * BLOCK for row in rows)
    seconds = accumulate(row.train_s for row in rows)
    linked_s: Iterable[float | None] = [None] * len(rows)
    if link:
        a_window_s = [row.train_s / row.train_samples for row in link.epochs]
        halves_differ = sync_every(entrant, first_half=True) != sync_every(entrant, first_half=False)
        linked_s = accumulate(
            row.train_samples * a_window_s[0 if first and halves_differ else -1] for row, first in pairs
        )
    losses = (math.nan if row.val_loss is None else row.val_loss for row in rows)
    return [Point(*values) for values in zip(tokens, sent, seconds, linked_s, losses, strict=True)]


def loss_at(points: Sequence[tuple[float, float]], limit: float) -> float | None:
    """The loss at `limit`, on straight lines between (x, loss) with rising x; None before the first."""
    before = None
    for x, loss in points:
        if x > limit * (1 + 1e-9):
            if before is None:
                return None
            return before[1] + (loss - before[1]) * (limit - before[0]) / (x - before[0])
        before = x, loss
    return before[1] if before else None


def over_seeds(values: Sequence[float] | None) -> Estimate | None:
    """The mean of seeds with its interval, None without any."""
    return estimate(values) if values else None


def _all(values: Sequence[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
