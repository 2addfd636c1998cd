"""How long it takes from the death of a rank until the others have committed a round without it.

    python benchmarks/recovery.py [--ranks 4] [--repeats 10] [--strategies allreduce local-sgd]

Each run kills one rank, another one each time, in the middle of an exchange or of computing, and reads
from the record how long it took to find out and until the next round was committed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from common import command, finish, record_of, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="synthetic:8000")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="paper-cnn")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--strategies", nargs="+", default=["allreduce", "local-sgd"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for strategy in arguments.strategies:
            found_ms, recovered_ms = [], []
            for turn in range(arguments.repeats):
                out = Path(scratch) / f"{strategy}-{turn}"
                phase = ("compute", "exchange")[turn % 2]
                fault = f"kill:rank={turn % arguments.ranks},epoch=2,step=20,phase={phase}"
                options = ["--model", arguments.model, "--strategy", strategy, "--ranks", arguments.ranks]
                finish(start(command(arguments, *options, "--epochs", 2, "--fault", fault, out=out)))
                (row,) = record_of(out)["faults"]
                found_ms.append(1e3 * row["detected_after_s"])
                recovered_ms.append(1e3 * row["recovered_after_s"])
            print(
                f"{strategy}, {arguments.ranks} ranks, {arguments.repeats} kills: found after "
                f"{_told(found_ms)} ms, committed again after {_told(recovered_ms)} ms",
                flush=True,
            )


def _told(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} (median; worst {max(values):.0f})"


if __name__ == "__main__":
    main()
