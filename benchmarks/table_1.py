"""The paper's Table 1 predicted from runs of a single rank, beside what `rankwise reproduce` measured.

    python benchmarks/table_1.py [--data-dir DIR] [--repeats 3] [--records docs/reproduction/records]

With the cores shared out among ranks (`--threads auto`) an epoch of 50,000 images; with every core for every
rank, as in the paper (`--threads all`), one of the 2,500 that the reproduction trained so. A single rank runs
on each number of threads that ranks have there, on 10,000 images; medians of the repeats count. Prints CSV.
 The records may be of another day: a drift of the machine counts as an error of the prediction.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

from rankwise.system.machine import usable_cores

STEM = "averaging-r{ranks}-b16-"
"""Names of the reproduction's records begin so."""

COLUMNS = {
    "auto": ("e25-seed0", 50_000, 10_000, 1),
    "all": ("e2-all-threads-n2500*seed0", 2_500, 500, usable_cores()),
}
"""--threads -> (how names go on, samples an epoch and evaluated, threads of a rank)."""


def predicted(arguments: argparse.Namespace, column: str, out: Path) -> dict[int, dict[str, float]]:
    """What the command line says of a run of one rank, by number of ranks."""
    _, samples, evaluated, threads = COLUMNS[column]
    words: list[object] = ["--strategy", "single", "--batch-size", 16, "--threads", threads, "--epochs", 3]
    words += ["--train-limit", 10_000]
    common.finish(common.start(common.command(arguments, *words, out=out, val_limit=evaluated)))
    words = [sys.executable, "-m", "rankwise", "predict", "--format", "json", "--ranks", "2-8"]
    words += ["--strategy", "parameter-averaging", "--topology", "master", "--threads", column]
    words += ["--samples", samples, "--from", out]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return {row["ranks"]: row for row in json.loads(done.stdout)["points"]}


def measured(records: Path, ranks: int, threads: str) -> float | None:
    """The median of the epochs but the first of all its runs, in seconds."""
    found = []
    for path in records.glob(f"{STEM.format(ranks=ranks)}{COLUMNS[threads][0]}.json"):
        found += [row["wall_s"] for row in json.loads(path.read_bytes())["epochs"][1:]]
    return statistics.median(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--records", type=Path, default=Path("docs/reproduction/records"))
    arguments = parser.parse_args()
    guesses: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for turn in range(arguments.repeats):
            for column in COLUMNS:
                for ranks, row in predicted(arguments, column, Path(scratch) / f"{turn}-{column}").items():
                    guesses.setdefault((column, ranks), []).append(row)
    print("threads,processes,predicted (s),from (s),to (s),measured (s),error (%)")
    for (column, ranks), rows in guesses.items():
        guess, low, high = (
            statistics.median(row[key] for row in rows) for key in ("epoch_s", "low_s", "high_s")
        )
        truth = measured(arguments.records, ranks, column)
        if truth is not None:
            error = 100 * (guess / truth - 1)
            print(f"{column},{ranks},{guess:.3g},{low:.3g},{high:.3g},{truth:.3g},{error:+.0f}")


if __name__ == "__main__":
    main()
