"""`python -m tests.matrix`: all cells, or those with a word in their name; code 1 if one is wrong."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

from tests.matrix.cells import run
from tests.matrix.choice import choose
from tests.matrix.page import page, summary

PAGE = Path(__file__).parents[2] / "docs" / "matrix.md"


def main(*words: str) -> int:
    """Try the cells that hold one of these words, all without; only all of them make the page."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    cells = [cell for cell in choose() if not words or any(word in cell.name for word in words)]
    results = {}
    for number, cell in enumerate(cells, 1):
        results[cell] = found = run(cell)
        print(f"[{number}/{len(cells)}] {cell.name}: {found}", flush=True)
    print(summary(results))
    if not words:
        PAGE.write_text(page(results), "utf-8")
    return int(any(its.verdict == "wrong" for its in results.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
