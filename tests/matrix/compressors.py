"""Compressed sums in plain torch: the ranks' values, what each holds back, and what all of them get."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

DRAWS = 4096
"""That int8 makes for each payload of as many values or fewer."""

Shapes = list[tuple[int, ...]]


@dataclass
class Sums:
    """Sums over ranks with error feedback: what a rank's message leaves out is added to its next values.

    `ranks` send by the `name` of a compression, ``none`` for what is sent as it is, of tensors of these
    `shapes`; with a `master` rank 0 adds up, and compresses the sum once more.
    """

    name: str
    ranks: int
    shapes: Shapes
    master: bool
    held: list[Tensor] = field(default_factory=list)
    held_by_master: Tensor | None = None
    directions: list[Tensor] = field(default_factory=list)
    rounds: int = 0

    def add_up(self, flats: list[Tensor]) -> Tensor:
        """The sum of the ranks' values, which the next sum reckons with."""
        if self.name == "none":
            return sum(flats[1:], start=flats[0])
        values = [flat.to(torch.float32) for flat in flats]
        self.held = self.held or [torch.zeros_like(its) for its in values]
        values = [its + left for its, left in zip(values, self.held, strict=True)]
        if self.name.startswith("powersgd"):
            total, mine = self._low_rank(values)
        else:
            random = [np.random.default_rng([rank, self.rounds]) for rank in range(self.ranks)]
            mine = [self._sent(its, rng) for its, rng in zip(values, random, strict=True)]
            total = self._total(mine, random[0])
        self.held = [its - sent for its, sent in zip(values, mine, strict=True)]
        self.rounds += 1
        return total

    def _total(self, mine: list[Tensor], random: np.random.Generator) -> Tensor:
        if self.master:
            before = torch.zeros_like(mine[0]) if self.held_by_master is None else self.held_by_master
            total = sum(mine, start=before)
            reply = self._sent(total, random)
            self.held_by_master = total - reply
            return reply
        total = mine[0]
        for its in mine[1:]:  # halves are added up as halves
            total = _half(total + its, self.name) if self.name in ("bf16", "fp16") else total + its
        return total

    def _sent(self, values: Tensor, random: np.random.Generator) -> Tensor:
        """What the message with these values stands for."""
        if self.name in ("bf16", "fp16"):
            return _half(values, self.name)
        if self.name == "int8":
            draws = torch.from_numpy(random.random(DRAWS, np.float32))[: len(values)]
            step = values.abs().max() / 127
            return (values / step + draws).floor().clamp(-127, 127) * step if step else values.clone()
        if self.name == "sign":
            size = values.abs().numpy().mean(dtype=np.float32).item()
            return torch.where(values >= 0, size, -size)
        least = len(values) - math.ceil(float(self.name.removeprefix("topk:")) * len(values))
        # Of equal ones, as recurrent layers have in their two biases, those that numpy takes.
        places = torch.from_numpy(np.argpartition(values.abs().numpy(), least)[least:])
        return torch.zeros_like(values).index_copy(0, places, values[places])

    def _low_rank(self, values: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """PowerSGD: M is sent as P (M' P)', with one P for all ranks."""
        rank, total, mine = int(self.name.removeprefix("powersgd:")), [], [[] for _ in values]
        sizes = [math.prod(shape) for shape in self.shapes]
        matrices = [
            (shape[0], size // shape[0]) if shape and rank * (shape[0] + size // shape[0]) < size else None
            for shape, size in zip(self.shapes, sizes, strict=True)
        ]
        if not self.directions:
            count = sum(rank * its[1] for its in matrices if its)
            drawn = torch.from_numpy(np.random.default_rng(0).standard_normal(count)).float()
            parts = drawn.split([rank * its[1] for its in matrices if its])
            self.directions = [part.view(-1, rank) for part in parts]
        found = []
        pieces = zip(*(its.split(sizes) for its in values), strict=True)
        for piece, matrix in zip(pieces, matrices, strict=True):
            if matrix is None:
                total.append(sum(piece[1:], start=piece[0]))
                for its, own in zip(mine, piece, strict=True):
                    its.append(own)
                continue
            q = self.directions[len(found)]
            ms = [own.view(matrix) for own in piece]
            p = torch.linalg.qr(sum((m @ q for m in ms[1:]), start=ms[0] @ q))[0]
            rights = [m.T @ p for m in ms]
            found.append(sum(rights[1:], start=rights[0]))
            total.append((p @ found[-1].T).flatten())
            for its, right in zip(mine, rights, strict=True):
                its.append((p @ right.T).flatten())
        self.directions = found
        return torch.cat(total), [torch.cat(its) for its in mine]


def _half(values: Tensor, name: str) -> Tensor:
    return values.to(torch.bfloat16 if name == "bf16" else torch.float16).to(torch.float32)
