"""How long a recipe takes to an accuracy, from launch, over several seeds.

    python benchmarks/time_to_accuracy.py PRESET TARGET [--seeds 5] [--data-dir DIR] [-- OPTION...]

TARGET is a fraction of the test images; what stands behind `--` goes to `rankwise train`. Each seed is a run
of the command line that stops at the target; printed are its time with evaluation, from the launch of the
command to its end, and median, spread and share of the seeds that came so far.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import record_of, spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset")
    parser.add_argument("target", type=float)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("options", nargs="*", help="more options of `rankwise train`, behind --")
    arguments = parser.parse_args()
    common = ["--preset", arguments.preset, "--target-accuracy", str(arguments.target), *arguments.options]
    common += ["--data-dir", str(arguments.data_dir)] if arguments.data_dir else []
    reached, accuracies = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(arguments.seeds):
            out = Path(scratch) / str(seed)
            words = [
                sys.executable,
                "-m",
                "rankwise",
                "train",
                *common,
                "--seed",
                str(seed),
                "--out",
                str(out),
            ]
            start_s = time.monotonic()
            if subprocess.run(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
                sys.exit(f"failed: {' '.join(words)}")
            took_s = time.monotonic() - start_s
            last = record_of(out)["epochs"][-1]
            accuracies.append(100 * last["val_accuracy"])
            if last["val_accuracy"] >= arguments.target:
                reached.append(took_s)
            print(
                f"seed {seed}: {accuracies[-1]:.2f}% after {last['epoch']} epochs, {took_s:.1f} s", flush=True
            )
    print(f"reached by {len(reached)} of {arguments.seeds} seeds; accuracy {spread(accuracies)}%")
    if reached:
        print(f"time to {100 * arguments.target:g}%: {spread(reached, 1)} s")


if __name__ == "__main__":
    main()
