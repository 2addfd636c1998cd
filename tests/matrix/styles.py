"""Loops as people write them: each is a body, and what stands around it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from tests.matrix.models import SAMPLES, Program

EPOCHS = 6
TOGETHER = 12
"""Samples in a step of all workers together."""

Step = Callable[[], None]
Body = Callable[[Program, Any, Step], None]
T = TypeVar("T")


def plain(program: Program, indices: Any, step: Step) -> None:
    program.optimizer.zero_grad()
    program.loss(indices).backward()
    step()


def kept_zeros(program: Program, indices: Any, step: Step) -> None:
    program.optimizer.zero_grad(set_to_none=False)
    program.loss(indices).backward()
    step()


def zeros_last(program: Program, indices: Any, step: Step) -> None:
    program.loss(indices).backward()
    step()
    program.optimizer.zero_grad()


def two_backwards(program: Program, indices: Any, step: Step) -> None:
    program.optimizer.zero_grad()
    program.loss(indices).backward()
    (0.5 * program.loss(indices)).backward()
    step()


def sum_of_two(program: Program, indices: Any, step: Step) -> None:
    program.optimizer.zero_grad()
    first = next(p for p in program.parameters if p.requires_grad)
    (0.7 * program.loss(indices) + 0.01 * first.square().sum()).backward()
    step()


def clipped(program: Program, indices: Any, step: Step) -> None:
    program.optimizer.zero_grad()
    program.loss(indices).backward()
    nn.utils.clip_grad_norm_(program.parameters, 0.001)  # any gradient is longer
    step()


def looks_on_the_way(program: Program, indices: Any, step: Step) -> None:
    program.turns += 1
    if program.turns % 5 == 2:
        program.model.eval()
        with torch.no_grad():
            program.seen.append(program.model(program.kind.data[:7]).double())
        program.model.train()
    plain(program, indices, step)


def every(batches: Iterable[T], turn: Callable[[T], None]) -> None:
    for batch in batches:
        turn(batch)


def numbered(batches: Iterable[T], turn: Callable[[T], None]) -> None:
    for _, batch in enumerate(batches):
        turn(batch)


def beside_others(batches: Iterable[T], turn: Callable[[T], None]) -> None:
    for batch, _ in zip(batches, itertools.count(), strict=False):
        turn(batch)


def nothing(program: Program) -> None:
    """Do nothing."""


def nothing_in(program: Program, epoch: int) -> None:
    """Do nothing in an epoch."""


def make_scheduler(program: Program) -> None:
    program.scheduler = torch.optim.lr_scheduler.ExponentialLR(program.optimizer, 0.8)


def freeze_first(program: Program, epoch: int) -> None:
    if epoch == EPOCHS // 2:
        program.parameters[0].requires_grad_(False)


def hold_first(program: Program) -> None:
    program.parameters[0].requires_grad_(False)


def let_first_go(program: Program, epoch: int) -> None:
    if epoch == EPOCHS // 2:
        program.parameters[0].requires_grad_(True)


@dataclass(frozen=True)
class Style:
    """A user's loop.

    `prepare` comes before ranks are put in step, `before` and `after` an epoch, counted from 0; `drive` goes
    through an epoch's batches, `body` is a turn. `options` are those of `synchronise`, and `rate` what they
    make of the learning rate when a part of the training is done. `first_epoch` is the number of the first,
    `samples` are those of the training set.
    """

    body: Body = plain
    drive: Callable[[Iterable[Any], Callable[[Any], None]], None] = every
    prepare: Callable[[Program], None] = nothing
    before: Callable[[Program, int], None] = nothing_in
    after: Callable[[Program, int], None] = nothing_in
    options: Mapping[str, Any] = field(default_factory=dict)
    rate: Callable[[float], float] | None = None
    first_epoch: int = 1
    samples: int = SAMPLES

    def batch_size(self, workers: int) -> int:
        """Samples in a step of one worker: more than it has where there are few."""
        return TOGETHER // workers


STYLES: dict[str, Style] = {
    "plain": Style(),
    "epochs-from-0": Style(first_epoch=0),
    "two-backwards": Style(two_backwards),
    "sum-of-two": Style(sum_of_two),
    "clip-norm": Style(options={"clip_norm": 0.05}),
    "scheduler": Style(prepare=make_scheduler, after=lambda program, epoch: program.scheduler.step()),
    "schedule": Style(
        options={"schedule": "cosine", "epochs": EPOCHS},
        rate=lambda done: (1 + math.cos(math.pi * done)) / 2,
        samples=SAMPLES - 11,
    ),
    "frozen-later": Style(before=freeze_first),
    "evaluation": Style(looks_on_the_way),
    "enumerate": Style(drive=numbered),
    "zip": Style(drive=beside_others),
    "ragged": Style(samples=SAMPLES - 11),
    "few-samples": Style(samples=5),
    "zeros-last": Style(zeros_last),
    "kept-zeros": Style(kept_zeros),
    "clipped-by-hand": Style(clipped),
    "unfrozen-later": Style(prepare=hold_first, before=let_first_go),
}
"""What a loop leaves early (`break`, `continue` without a step, an early return) is a `drive` or a `body`."""
