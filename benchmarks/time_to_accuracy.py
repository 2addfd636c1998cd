"""How long it takes to an accuracy, from the command on, over several seeds.

    python benchmarks/time_to_accuracy.py --target 0.6606 [--seeds 10] [--data-dir DIR] -- --preset paper-fast

What stands behind -- are options of `rankwise train`. A run stops at the first epoch whose evaluation reaches
the target; start-up and evaluations count. Prints each seed, the median and the spread of those that reached
it, and how many did. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from common import finish, record_of, spread, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", type=float, required=True)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--data-dir")
    parser.add_argument("options", nargs="*", help="options of rankwise train, behind --")
    arguments = parser.parse_args()
    options = [*arguments.options, "--target-accuracy", str(arguments.target)]
    options += ["--data-dir", arguments.data_dir] if arguments.data_dir else []
    reached: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(arguments.seeds):
            out = Path(scratch) / str(seed)
            words = [
                sys.executable,
                "-m",
                "rankwise",
                "train",
                *options,
                "--seed",
                str(seed),
                "--out",
                str(out),
            ]
            finish(start(words))
            record = record_of(out)
            target = record["target"]
            best = max(row["val_accuracy"] or 0.0 for row in record["epochs"])  # None: not evaluated
            told = "not reached"
            if target["reached"]:
                reached.append(target)
                told = f"{target['from_launch_s']:.1f} s, epoch {target['epoch']}"
            print(
                f"seed {seed}: {told}; best {best:.2%}, last {record['epochs'][-1]['val_accuracy']:.2%}",
                flush=True,
            )
    print(f"{len(reached)} of {arguments.seeds} seeds reached {arguments.target:.2%}")
    for key, what in (
        ("from_launch_s", "from launch"),
        ("from_first_step_s", "from the first step"),
        ("evaluation_s", "of it evaluation"),
    ):
        if reached:
            print(f"{what}: {spread([row[key] for row in reached], 1)} s")


if __name__ == "__main__":
    main()
