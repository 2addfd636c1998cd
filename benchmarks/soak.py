"""A long run with a fault of a random kind every so many seconds, beside one without.

    python benchmarks/soak.py [--minutes 20] [--every 20] [--seed 0] [--data-dir DIR] [--out DIR]

Ranks are killed, crash, hang, sleep, become slow, or compute what is not a number, in a random phase. As many
of these are deadly as spares and --min-ranks allow, and then one more, after which as many as at first take
over; and so on to the end. The same seed gives the same faults. Exit code 1 if a sample is lost or trained
twice, a ledger does not close, or accuracy is a point below that of the run without faults.

Throughput is told twice: of the epochs that no fault struck, by their median; and in all, by the time from
launch to end. With --out the runs stay there.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import command, record_of

DEADLY = ("kill", "crash", "hang")
HARMLESS = ("sleep", "slow", "nan")
PHASES = ("compute", "exchange", "evaluation", "checkpoint")
CALIBRATION_EPOCHS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--every", type=float, default=20, help="seconds between faults")
    parser.add_argument("--ranks", type=int, default=6)
    parser.add_argument("--spares", type=int, default=2)
    parser.add_argument("--min-ranks", type=int, default=4)
    parser.add_argument("--train-limit", type=int, default=20_000)
    parser.add_argument("--strategy", default="local-sgd")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a new folder for the runs")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = arguments.out or Path(scratch)
        short = run(arguments, place / "short", CALIBRATION_EPOCHS, [])
        epoch_s = statistics.median(row["wall_s"] for row in short["epochs"][1:])
        epochs = max(2, round(60 * arguments.minutes / epoch_s))
        faults = list(draw(arguments, epochs, max(1, round(arguments.every / epoch_s))))
        print(f"an epoch takes {epoch_s:.1f} s: {epochs} epochs, {len(faults)} faults", flush=True)
        whole = run(arguments, place / "whole", epochs, [])
        struck = run(arguments, place / "struck", epochs, faults)
    sys.exit(tell(whole, struck, arguments))


def draw(arguments: argparse.Namespace, epochs: int, every: int) -> Any:
    """A fault each so many epochs; who is struck is alive by then, if all before had their effect."""
    chance = random.Random(arguments.seed)
    live = list(range(arguments.ranks))
    waiting = list(range(arguments.ranks, arguments.ranks + arguments.spares))
    for epoch in range(2, epochs, every):
        kind = chance.choice((*DEADLY, *HARMLESS))
        rank = chance.choice(live)
        phase = chance.choice(PHASES) if kind not in ("slow", "nan") else "compute"
        step = chance.randint(1, 20) if phase in ("compute", "exchange") else 1
        yield f"{kind}:rank={rank},epoch={epoch},step={step},phase={phase}"
        if kind in DEADLY:
            live.remove(rank)
            if waiting:
                live.append(waiting.pop(0))
            if len(live) < arguments.min_ranks:  # others take over
                live = list(range(arguments.ranks))
                waiting = list(range(arguments.ranks, arguments.ranks + arguments.spares))


def run(arguments: argparse.Namespace, out: Path, epochs: int, faults: list[str]) -> dict[str, Any]:
    options: list[object] = ["--model", "paper-cnn", "--strategy", arguments.strategy, "--lr", 0.01]
    options += ["--ranks", arguments.ranks, "--spares", arguments.spares, "--epochs", epochs]
    options += ["--min-ranks", arguments.min_ranks, "--train-limit", arguments.train_limit]
    options += ["--max-restarts", 100, "--hang-timeout", 2, "--schedule", "cosine"]
    options += [word for fault in faults for word in ("--fault", fault)]
    words = command(arguments, *options, out=out, val_limit=2000)
    started_s = time.monotonic()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"a run failed with code {done.returncode}:\n{done.stderr[-2000:]}")
    return record_of(out) | {"launched_s": time.monotonic() - started_s}


def tell(whole: dict[str, Any], struck: dict[str, Any], arguments: argparse.Namespace) -> int:
    """Print what came of it; returns the exit code."""
    samples = struck["samples"]
    exact = samples["trained"] == samples["expected"] and not samples["lost"] + samples["duplicated"]
    closes = all(sum(row["phases_ns"].values()) == row["wall_ns"] for row in struck["ranks"])
    accuracy = [run["epochs"][-1]["val_accuracy"] for run in (whole, struck)]
    hit = {fault["epoch"] for fault in struck["faults"]}
    rates = [
        statistics.median(row["train_samples"] / row["wall_s"] for row in run if row["epoch"] not in hit)
        for run in (whole["epochs"], struck["epochs"])
    ]
    in_all = [
        sum(row["train_samples"] for row in run["epochs"]) / run["launched_s"] for run in (whole, struck)
    ]
    kinds = [fault["kind"] for fault in struck["faults"]]
    starts = sum(fault["action"] == "restart" for fault in struck["faults"])
    # Until a hang is found its timeout passes, whatever else is done.
    hang_s = sum(its["detected_after_s"] or 0 for its in struck["faults"] if its["kind"] == "hang")
    lost = ", ".join(f"{cause} {share:.2%}" for cause, share in struck["efficiency"]["goodput_lost"].items())
    met = ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds)))
    print(f"faults met: {met}; {starts} starts anew; {struck['generation']} generations after the first one")
    print(f"goodput {struck['efficiency']['goodput']:.2%}; lost to {lost}")
    print(
        f"samples: {samples['trained']:,} of {samples['expected']:,}, {samples['lost']} lost, "
        f"{samples['duplicated']} trained twice; ledgers {'close' if closes else 'do NOT close'}"
    )
    print(f"accuracy: {accuracy[1]:.2%}, without faults {accuracy[0]:.2%}")
    print(f"throughput of epochs that no fault struck: {rates[1] / rates[0]:.1%} of that without faults")
    print(f"throughput in all, from launch to end: {in_all[1] / in_all[0]:.1%}")
    without = in_all[1] * struck["launched_s"] / (struck["launched_s"] - hang_s)
    print(f"the same without the {hang_s:.1f} s in which hangs were found: {without / in_all[0]:.1%}")
    return 0 if exact and closes and accuracy[1] > accuracy[0] - 0.01 else 1


if __name__ == "__main__":
    main()
