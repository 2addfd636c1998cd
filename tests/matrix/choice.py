"""Which cells are tried: not all there are, but each value of an axis with each of another."""

from __future__ import annotations

import itertools
import random

from tests.matrix.cells import Cell, fits, refusal
from tests.matrix.models import MODELS
from tests.matrix.styles import STYLES
from tests.matrix.ways import WAYS
from tests.strategies.optimizers import OPTIMIZERS, REFUSED

SEED = 22
DRAWN = 24
"""Cells of which the one is taken that covers most."""

KNOWN = [
    Cell("conv", "SGD", "allreduce/buckets", "two-backwards", 2),
    Cell("spectral-norm", "SGD", "allreduce", "ragged", 2),
    Cell("experts", "SGD with dampening", "allreduce", "kept-zeros", 2),
]
"""Cells that are refused or different for a reason that few have."""

Pair = tuple[tuple[int, object], tuple[int, object]]

REFUSING = ("clipped-by-hand", "unfrozen-later")
"""Loops that most strategies refuse: they take part in one pair with each strategy, and in no others."""


def choose(seed: int = SEED) -> list[Cell]:
    """One cell for each model under each strategy, in any of its ways, whose other values are those that
    cover most pairs still missing; then cells for the pairs that are missing yet, and for what is refused."""
    rng = random.Random(seed)
    styles = [name for name in STYLES if name not in REFUSING]
    axes = [list(MODELS), list(OPTIMIZERS), list(WAYS), styles, [1, 2, 3]]
    values = [[(number, value) for value in axis] for number, axis in enumerate(axes)]
    missing: set[Pair] = {
        pair for one, other in itertools.combinations(values, 2) for pair in itertools.product(one, other)
    }
    chosen: list[Cell] = []

    def take(cells: list[Cell]) -> None:
        if cells:
            best = max(cells, key=lambda cell: len(missing & _pairs(cell)))
            missing.difference_update(_pairs(best))
            chosen.append(best)

    rows = list(itertools.product(MODELS, families().values()))
    rng.shuffle(rows)
    for model, ways in rows:
        take(_drawn(rng, [model], OPTIMIZERS, ways, styles))
    for model, optimizer in itertools.product(MODELS, OPTIMIZERS):
        if ((0, model), (1, optimizer)) in missing:
            take(_drawn(rng, [model], [optimizer], WAYS, styles))
    for way, style in itertools.product(WAYS, styles):
        if ((2, way), (3, style)) in missing:
            take(_drawn(rng, MODELS, OPTIMIZERS, [way], [style]))
    for way, style in itertools.product(WAYS, REFUSING):
        take(_drawn(rng, ["mlp", "conv", "linear"], OPTIMIZERS, [way], [style])[:1])
    chosen += [Cell("mlp", optimizer, "allreduce", "plain", 2) for optimizer in REFUSED]
    chosen += KNOWN
    return list(dict.fromkeys(chosen))


def families() -> dict[str, list[str]]:
    """The strategies by name, each with its ways: those that compress apart, and of allreduce, in which ranks
    are one process, each by itself."""
    found: dict[str, list[str]] = {}
    for name, way in WAYS.items():
        strategy = name.split("/")[0]
        own = name if strategy == "allreduce" else strategy
        found.setdefault(f"{strategy}, compressed" if way.compresses else own, []).append(name)
    return found


def part(cells: list[Cell], count: int, seed: int = SEED) -> list[Cell]:
    """A few of them, of each strategy and each loop at least one as far as they go."""
    rng = random.Random(seed)
    left, taken = list(cells), []
    rng.shuffle(left)
    seen: set[tuple[int, object]] = set()
    while left and len(taken) < count:
        best = max(left, key=lambda cell: len(set(_values(cell)) - seen))
        taken.append(best)
        seen.update(_values(best))
        left.remove(best)
    return taken


def _drawn(rng: random.Random, *axes: object) -> list[Cell]:
    """Cells of these models, optimisers, strategies and loops, on any ranks."""
    values = [list(axis) for axis in axes]  # type: ignore[call-overload]
    drawn = [
        Cell(*(rng.choice(its) for its in values), ranks=rng.choice((1, 2, 2, 3, 3))) for _ in range(DRAWN)
    ]
    found = [cell for cell in drawn if fits(cell)]
    if not found:
        fitting = (cell for its in itertools.product(*values, (1, 2, 3)) if fits(cell := Cell(*its)))
        found = list(itertools.islice(fitting, DRAWN))
    return [cell for cell in found if refusal(cell) is None] or found


def _values(cell: Cell) -> list[tuple[int, object]]:
    return list(enumerate((cell.model, cell.optimizer, cell.way, cell.style, cell.ranks)))


def _pairs(cell: Cell) -> set[Pair]:
    return set(itertools.combinations(_values(cell), 2))
