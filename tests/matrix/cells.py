"""Cells: a model, an optimiser, a strategy, a loop and a number of ranks; and what comes of one."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.errors import RankwiseError
from tests.matrix.models import (
    BATCH_STATISTICS,
    FORWARD_PASSES,
    KEPT_ZEROS,
    MODELS,
    OWN_DRAWS,
    Kind,
    Program,
)
from tests.matrix.oracles import Course, Ended
from tests.matrix.styles import EPOCHS, STYLES, TOGETHER, Style
from tests.matrix.ways import WAYS, Way
from tests.strategies.optimizers import OPTIMIZERS, REFUSED

MOST_S = 60.0
"""What takes longer hangs."""

Verdict = Literal["equal", "different as documented", "refused", "wrong"]


@dataclass(frozen=True)
class Cell:
    """One program on ranks."""

    model: str
    optimizer: str
    way: str
    style: str
    ranks: int

    @property
    def name(self) -> str:
        return f"{self.model}/{self.optimizer}/{self.way}/{self.style}/{self.ranks}"

    @property
    def kind(self) -> Kind:
        return MODELS[self.model]

    @property
    def strategy(self) -> Way:
        return WAYS[self.way]

    @property
    def loop(self) -> Style:
        return STYLES[self.style]

    @property
    def workers(self) -> int:
        return self.ranks - self.strategy.master

    def make(self) -> Program:
        """The user's program."""
        make = OPTIMIZERS[self.optimizer] if self.optimizer in OPTIMIZERS else REFUSED[self.optimizer][0]
        program = Program(self.kind, make)
        self.loop.prepare(program)
        if callable(train := getattr(program.optimizer, "train", None)):
            train()
        return program


@dataclass(frozen=True)
class Outcome:
    """What came of a cell; `words` are the refusal's line, the reason of a difference, or what is wrong.

    `off` is how far ranks are from the rule, in parts of the largest change if one step alone is compared.
    """

    verdict: Verdict
    words: str = ""
    off: float = 0.0

    def __str__(self) -> str:
        return f"{self.verdict}, {self.words}" if self.words else f"{self.verdict}, {self.off:.0e} off"


@dataclass(frozen=True)
class Left:
    """What a rank leaves: its tensors by name, and its batches in each epoch."""

    ended: Ended
    seen: list[list[np.ndarray]]


def fits(cell: Cell) -> bool:
    """Whether the cell means anything: what is left out here is no training at all, or another cell."""
    way = cell.strategy
    few = cell.style == "few-samples"
    return (
        cell.ranks in way.ranks
        # Optimisers with numbers in their groups take one rate for all of them.
        and not (cell.optimizer == "Prodigy" and cell.kind.groups)
        # Muon makes what 8 bits round as large as all else.
        and (cell.model, cell.optimizer) != ("bfloat16", "Muon")
        # What one process refuses by itself.
        and not (cell.model == "sparse-embedding" and cell.optimizer not in TAKES_SPARSE)
        and not (cell.model == "sparse-embedding" and cell.style in ("clip-norm", "clipped-by-hand"))
        and not (cell.model == "sparse-embedding" and way.state == "average")
        # What is compared after one step has no later epoch.
        and not (cell.kind.first_step and cell.style in LATER)
        and not (few and cell.kind.first_step)
        # Which of the ranks have begun is no mean.
        and not (cell.model == "experts" and way.state == "average")
        # Every worker would train on five samples, in one batch each.
        and (way.replicates is False or not few)
    )


BY_RANK = {BATCH_STATISTICS, FORWARD_PASSES}
"""Reasons under which each rank's batch counts by itself, which is a rule too."""

TAKES_SPARSE = {"SGD", "SGD with momentum", "SGD, Nesterov's", "Adagrad", "Lion", "schedule-free SGD"}
"""Optimisers that step by sparse gradients in a plain loop."""

LATER = {"frozen-later", "unfrozen-later", "evaluation", "schedule", "scheduler", "ragged"}
"""Loops in which something happens after the first step."""


def refusal(cell: Cell) -> str | None:
    """The line with which a cell is refused, as a pattern; None if it is trained."""
    if cell.optimizer in REFUSED:
        return rf"the optimiser {cell.optimizer} cannot be kept in step.*{REFUSED[cell.optimizer][1]}"
    if cell.style == "unfrozen-later":
        return "the parameter .* was unfrozen after ranks had been put in step"
    if cell.style == "clipped-by-hand" and not cell.strategy.local:
        return r"gradients were changed between backward\(\) and step\(\)"
    if cell.style == "two-backwards" and cell.way == "allreduce/buckets" and cell.ranks > 1:
        return r"a second backward pass came before step\(\)"
    return None


def difference(cell: Cell) -> str | None:
    """Why ranks may end elsewhere than the rule, as documented; None if they may not."""
    if cell.kind.draws == OWN_DRAWS:
        return OWN_DRAWS
    if cell.strategy.local or cell.strategy.compresses:
        return None
    if (cell.model, cell.style) == ("experts", "kept-zeros"):
        return KEPT_ZEROS
    if cell.workers == 1:
        return None
    if cell.model == "spectral-norm" and cell.style in ("ragged", "schedule"):
        return FORWARD_PASSES
    return cell.kind.draws


def run(cell: Cell, *, harm: Any = None) -> Outcome:
    """Train a cell, and compare. `harm(rank, program)` may spoil gradients before each step."""
    found: list[Outcome] = []
    thread = threading.Thread(target=lambda: found.append(_judge(cell, harm)), daemon=True)
    thread.start()
    thread.join(MOST_S)
    return found[0] if found else Outcome("wrong", f"it hangs, or takes more than {MOST_S:.0f} s")


def _judge(cell: Cell, harm: Any) -> Outcome:
    expected = refusal(cell)
    try:
        left = _on_ranks(cell, harm)
    except RankwiseError as error:
        if expected and re.search(expected, str(error)) and "\n" not in str(error):
            return Outcome("refused", str(error))
        return Outcome("wrong", f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}")
    if expected:
        return Outcome("wrong", "it was trained, and should have been refused")
    try:
        return compare(cell, left)
    except Exception as error:
        return Outcome("wrong", f"the rule itself fails: {type(error).__name__}: {error}")


def _on_ranks(cell: Cell, harm: Any) -> list[Left]:
    style, kind = cell.loop, cell.kind
    programs = [cell.make() for _ in range(cell.ranks)]
    samples, epochs = (TOGETHER, 1) if kind.first_step else (style.samples, EPOCHS)
    if cell.strategy.replicates and kind.first_step:
        samples = TOGETHER // cell.workers

    def program(world: World) -> Left:
        mine = programs[world.rank]
        if world.rank:  # ranks that start apart are brought together
            nn.init.zeros_(mine.parameters[-1])
        ranks = synchronise(
            mine.model,
            mine.optimizer,
            world,
            samples=samples,
            batch_size=style.batch_size(cell.workers),
            **{**cell.strategy.options, **style.options},
        )
        seen: list[list[np.ndarray]] = []

        def step() -> None:
            if harm:
                harm(world.rank, mine)
            ranks.step()

        def turn(batch: Any) -> None:
            seen[-1].append(batch.indices)
            style.body(mine, batch.indices, step)

        for epoch in range(epochs):
            style.before(mine, epoch)
            seen.append([])
            style.drive(ranks.batches(epoch + style.first_epoch), turn)
            style.after(mine, epoch)
        return Left({name: its.detach().clone() for name, its in mine.tensors()}, seen)

    return run_in_threads(cell.ranks, program, hosts=cell.strategy.hosts)


def compare(cell: Cell, left: list[Left]) -> Outcome:
    """What ranks have left, with what the rule says."""
    workers = left[cell.strategy.master :]
    if words := _badly_dealt(cell, workers):
        return Outcome("wrong", words)
    if words := _apart(cell, left):
        return Outcome("wrong", words)
    start = dict(cell.make().tensors())
    if not any(name in start and not torch.equal(its, start[name]) for name, its in workers[0].ended.items()):
        return Outcome("wrong", "nothing was trained")
    reason = difference(cell)
    rule = cell.strategy.by_rank if reason else cell.strategy.rule
    if reason and (rule is None or reason not in BY_RANK):
        return Outcome("different as documented", reason)
    seen = [[its.seen[epoch] for its in workers] for epoch in range(len(left[0].seen))]
    course = Course(cell.make, cell.loop, seen, cell.loop.batch_size(cell.workers))
    expected = rule(course)
    if cell.strategy.master:  # which holds what workers hold, or a centre, and has looked at nothing
        centre = {name: its for name, its in expected[0].items() if not name.startswith("look")}
        expected = [centre, *expected[len(expected) > cell.workers :]]
    scale = 1.0
    if cell.kind.first_step:
        scale = max(_apart_by(its, start[name]) for name, its in expected[0].items() if name in start)
    off, where = max(
        (_apart_by(its.ended[name], value) / scale, f"{name} of rank {rank}")
        for rank, (its, rule) in enumerate(zip(left, expected, strict=True))
        for name, value in rule.items()
    )
    if off <= max(cell.kind.tolerance, cell.strategy.tolerance):
        return Outcome("different as documented", reason) if reason else Outcome("equal", off=off)
    return Outcome("wrong", f"{where} is {off:.1e} off", off)


def _apart_by(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference; none between infinities, nor by the last digit of what is shorter than
    float64."""
    if torch.equal(one, other):
        return 0.0
    off = (one.double() - other.double()).abs()
    if one.dtype in (torch.float32, torch.bfloat16):
        off = (off - torch.finfo(one.dtype).eps * other.double().abs()).clamp(min=0)
    return torch.nan_to_num(off, nan=math.inf).max().item()


def _badly_dealt(cell: Cell, workers: list[Left]) -> str | None:
    """What is wrong with the batches: each sample counts once an epoch, or once for each worker."""
    for epoch in range(len(workers[0].seen)):
        each = [np.concatenate([[-1], *its.seen[epoch]])[1:] for its in workers]
        for some in each if cell.strategy.replicates else [np.concatenate(each)]:
            if not np.array_equal(np.sort(some), np.arange(len(some))) or not len(some):
                return f"samples are not dealt once in epoch {epoch}"
    return None


def _apart(cell: Cell, left: list[Left]) -> str | None:
    """Where ranks differ that must not."""
    if not cell.strategy.alike:
        return None
    for name, its in left[0].ended.items():
        for rank, other in enumerate(left[1:], 1):
            if not name.startswith("look") and not torch.equal(its, other.ended[name]):
                return f"ranks 0 and {rank} differ in {name}"
    return None
