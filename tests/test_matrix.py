"""The matrix of models, optimisers, strategies and loops: N ranks end where one process does."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from . import effort
from .matrix.cells import Cell, run
from .matrix.choice import choose, part
from .matrix.models import Program
from .matrix.page import page, summary
from .matrix.styles import STYLES
from .matrix.ways import WAYS

CELLS = choose()
DAILY = 39
"""Cells of every day, together of each strategy and each loop one at least."""

pytestmark = pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Models are small, and ranks are threads already."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("cell", part(CELLS, DAILY), ids=lambda cell: cell.name)
def test_ranks_are_one_process(cell: Cell) -> None:
    """Ranks end where the rule of their strategy does, differ as documented, or are refused in the line that
    is expected."""
    found = run(cell)
    assert found.verdict != "wrong", found


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_no_cell_is_wrong() -> None:
    """In the whole matrix none is wrong, and most are equal: refusing is no way around."""
    results = {cell: run(cell) for cell in CELLS}
    verdicts = [its.verdict for its in results.values()]
    assert not [f"{cell.name}: {its}" for cell, its in results.items() if its.verdict == "wrong"]
    assert len(verdicts) >= 400
    assert verdicts.count("equal") >= 300


def test_each_value_of_an_axis_is_tried() -> None:
    """Every strategy meets every loop that it takes, the cells of every day hold all of both, and the choice
    is the same each time."""
    assert choose() == CELLS
    met = {(cell.way, cell.style) for cell in CELLS}
    missing = set(itertools.product(WAYS, STYLES)) - met
    assert {style for _, style in missing} <= {"few-samples"}
    assert {way for way, _ in missing} <= {"replication"}
    assert {cell.way for cell in part(CELLS, DAILY)} == set(WAYS)
    assert {cell.style for cell in part(CELLS, DAILY)} == set(STYLES)


def _scale_one(rank: int, program: Program) -> None:
    for parameter in program.parameters:
        if rank == 1 and parameter.grad is not None:
            parameter.grad = parameter.grad * 1.001


def _nothing_left(rank: int, program: Program) -> None:
    if rank == 1:
        raise ValueError("a rank fails")


@pytest.mark.parametrize(
    ("way", "harm"),
    effort.rotating(
        ["local-sgd", "slowmo", "gossip/ring", "allreduce/bf16", "allreduce"], [_scale_one, _nothing_left]
    ),
)
def test_a_broken_rank_is_found(way: str, harm: Any) -> None:
    """A rank whose gradients are a thousandth larger, and one that fails with an error that is not ours, make
    a cell wrong."""
    cell = Cell("mlp", "SGD", way, "plain", 2)
    assert run(cell).verdict == "equal"
    assert run(cell, harm=harm).verdict == "wrong"


def test_a_refusal_is_not_taken_for_right() -> None:
    """A cell that is refused where it should be trained, or trained where it should be refused, is wrong."""
    fine = Cell("mlp", "SGD", "allreduce", "plain", 2)
    refused = Cell("mlp", "SGD", "allreduce", "clipped-by-hand", 2)
    assert run(refused).verdict == "refused"

    def clip(rank: int, program: Program) -> None:
        torch.nn.utils.clip_grad_norm_(program.parameters, 0.01)

    def put_back(rank: int, program: Program) -> None:
        program.optimizer.zero_grad()
        program.loss([0, 1]).backward()

    assert "OutOfStepError" in run(fine, harm=clip).words
    assert run(refused, harm=put_back).words == "it was trained, and should have been refused"


def test_the_page_has_all() -> None:
    """The page counts every cell and names each refusal and each reason."""
    cells = [
        Cell("mlp", "SGD", "allreduce", "plain", 2),
        Cell("mlp", "SGD", "allreduce", "clipped-by-hand", 2),
        Cell("batch-norm", "SGD", "allreduce", "plain", 2),
    ]
    results = {cell: run(cell) for cell in cells}
    assert summary(results) == "3 cells: 1 equal, 1 different as documented, 1 refused, 0 wrong"
    text = page(results)
    assert "gradients were changed between backward() and step()" in text
    assert "BatchNorm normalises the batch of its rank" in text
    assert "!SGD/clipped-by-hand/2" in text
