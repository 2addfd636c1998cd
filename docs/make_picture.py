"""Draws the picture of the README from records of real runs.

pip install matplotlib
python docs/make_picture.py docs/training.svg PAPER_ACCURACY:RUN [PAPER_ACCURACY:RUN ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from rankwise import RunFolder
from rankwise.report.summary import GROUPS, group_seconds

COLOURS = {
    "start": "#b0b0b0",
    "train": "#2a7f9e",
    "wait": "#f0d9a0",
    "sync": "#e0902a",
    "eval": "#7a5ea8",
    "save": "#6aa84f",
}
OTHER = "#d9534f"


def main(target: str, *runs: str) -> None:
    """Accuracy of each run over epochs on the left, the time of each of its ranks on the right."""
    plt.rcParams.update(
        {"font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "0"}
    )
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(1, 1.15))
    bars: list[tuple[str, dict[str, float]]] = []
    for number, run in enumerate(runs):
        paper, _, path = run.partition(":")
        record = RunFolder(Path(path)).read()
        colour = f"C{number}"
        name = f"{record.config['ranks']} ranks, batch {record.config['batch_size']}"
        epochs = [row.epoch for row in record.epochs]
        left.plot(epochs, [100 * row.val_accuracy for row in record.epochs], color=colour, label=name)
        left.axhline(float(paper), color=colour, ls=":", lw=1)
        side = "bottom" if number % 2 == 0 else "top"
        left.text(1, float(paper), f"the paper: {paper}%", color=colour, size=8, va=side)
        bars += [(f"{name}: {row.role} {row.rank}", group_seconds(row)) for row in record.ranks]
    left.set(xlabel="epoch", ylabel="accuracy on the test set, %", title="CIFAR-10, the paper's network")
    left.legend(loc="lower right", frameon=False)
    bars.reverse()
    start = [0.0] * len(bars)
    for group in GROUPS:
        widths = [parts[group] for _, parts in bars]
        right.barh(
            [name for name, _ in bars], widths, left=start, label=group, color=COLOURS.get(group, OTHER)
        )
        start = [a + b for a, b in zip(start, widths, strict=True)]
    right.set(xlabel="seconds", title="where each rank's time went (it adds up)")
    right.legend(
        loc="upper center",
        bbox_to_anchor=(0.4, -0.16),
        ncols=7,
        columnspacing=1.0,
        handlelength=1.2,
        frameon=False,
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    main(*sys.argv[1:])
