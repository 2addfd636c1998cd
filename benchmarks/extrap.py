"""Sets Extra-P's model of an epoch beside `rankwise predict`, on numbers of ranks that neither has seen.

    python benchmarks/extrap.py [--ranks 1,2,3,4] [--repeats 2] [--epochs 8] [--out DIR]

Runs paper-cnn on the digits with each number of ranks, in turn. Then each number is held out once: from the
runs on all others Extra-P finds a model of the epoch's wall time (`rankwise export`, medians), and `rankwise
predict` predicts it. Runs stay in --out, if it is given: started again there, it runs what is
missing. Extra-P is installed into `build/`, as for the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.readers import ask, find_or_install

MODEL = """
import json, sys
from extrap.entities.measurement import Measure
from extrap.fileio.file_reader.json_file_reader import JsonFileReader
from extrap.modelers.model_generator import ModelGenerator
found = JsonFileReader().read_experiment(sys.argv[1])
models = ModelGenerator(found, use_measure=Measure.MEDIAN)
models.model_all()
(function,) = (its.hypothesis.function for (path, _), its in models.models.items() if path.name == "epoch")
print(json.dumps([str(function).replace("p", "ranks"), float(function.evaluate(float(sys.argv[2])))]))
"""


def rankwise(*words: object) -> str:
    """What a command of rankwise prints."""
    words = (sys.executable, "-m", "rankwise", *words)
    return subprocess.run([str(word) for word in words], check=True, stdout=subprocess.PIPE, text=True).stdout


def strategy_of(ranks: int) -> str:
    return "single" if ranks == 1 else "allreduce"


def train(ranks: int, epochs: int, out: Path) -> None:
    if not (out / "record.json").exists():
        options = ("--dataset", "digits", "--lr", 0.02, "--epochs", epochs, "--threads", 1)
        rankwise("train", *options, "--ranks", ranks, "--strategy", strategy_of(ranks), "--out", out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", default="1,2,3,4")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    numbers = [int(word) for word in arguments.ranks.split(",")]
    readers = find_or_install() or sys.exit("Extra-P cannot be installed")
    with contextlib.ExitStack() as stack:
        folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        runs = {n: [folder / f"ranks-{n}-turn-{t}" for t in range(arguments.repeats)] for n in numbers}
        for turn in range(arguments.repeats):
            for ranks in numbers:
                train(ranks, arguments.epochs, runs[ranks][turn])
        print("| ranks | measured s | Extra-P s | its model of the others | `rankwise predict` s |")
        print("|---|---|---|---|---|")
        for held in numbers:
            # The first source says the options of what is predicted: one that keeps ranks in step.
            others = [run for n in sorted(numbers, key=lambda n: (n == 1, n)) if n != held for run in runs[n]]
            lines = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "epochs.jsonl"
            rankwise("export", *others, "--format", "extrap", "--output", lines)
            model, extrap_s = ask(readers, MODEL, lines, str(held))
            sources = [word for run in others for word in ("--from", run)]
            words = (*sources, "--ranks", held, "--strategy", strategy_of(held), "--format", "json")
            (point,) = json.loads(rankwise("predict", *words))["points"]
            measured = [row["wall_s"] for run in runs[held] for row in common.record_of(run)["epochs"]]
            ours = f"{point['epoch_s']:.2f} ({point['low_s']:.2f} to {point['high_s']:.2f})"
            error = [value / statistics.median(measured) - 1 for value in (extrap_s, point["epoch_s"])]
            print(
                f"| {held} | {common.spread(measured)} | {extrap_s:.2f}, {error[0]:+.0%} | `{model}` | "
                f"{ours}, {error[1]:+.0%} |"
            )


if __name__ == "__main__":
    main()
