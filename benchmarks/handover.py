"""How long nobody trains while a run goes on with other ranks: handed over, and stopped and resumed, in turn.

    python benchmarks/handover.py [--ranks 4] [--other 3] [--repeats 5]

From the last step of the ranks before to the first of those after, by what they write into `.progress`, at
which this looks each 2 ms. Ranks of the next generation get ready beside those that train, so this machine
is crowded then: `slowed` is the rate of that time, of that before. Nothing else may run beside it.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import command, spread, start

from rankwise.runs.progress import read_progress

LOOK_S = 0.002


class Watched:
    """A run whose steps are looked at: when each was seen, and the samples that were trained by then."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".progress"
        self.seen: list[tuple[float, float]] = []
        self._last: tuple[int, int] | None = None

    def look(self) -> None:
        now = read_progress(self._path)
        mark = (now.epoch, now.samples) if now else None
        if mark is not None and mark != self._last:
            gained = mark[1] - self._last[1] if self._last and self._last[0] == mark[0] else 0
            before = self.seen[-1][1] if self.seen else 0.0
            self.seen.append((time.monotonic(), before + max(gained, 0)))
            self._last = mark
        time.sleep(LOOK_S)

    def for_s(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()

    def beside(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.look()

    def longest_gap_s(self, since: int) -> float:
        times = [at for at, _ in self.seen[since:]]
        return max(after - before for before, after in itertools.pairwise(times))

    def rate(self, first: int, last: int) -> float:
        (began, before), (ended, after) = self.seen[first], self.seen[last]
        return (after - before) / (ended - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--dataset", default="synthetic:8000")
    parser.add_argument("--data-dir")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--other", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    its = parser.parse_args()
    rankwise = [sys.executable, "-m", "rankwise"]
    handed_s, stopped_s, slowed = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        options = [
            "--model",
            "paper-cnn",
            "--strategy",
            "allreduce",
            "--ranks",
            its.ranks,
            "--epochs",
            10_000,
        ]
        process = start(command(its, *options, out=out))
        run = Watched(out)
        while len(run.seen) < 100:
            run.look()
        for turn in range(2 * its.repeats):
            ranks = (its.other, its.ranks)[turn % 2]
            run.for_s(3)
            began = len(run.seen)
            run.for_s(3)
            asked = len(run.seen) - 1
            run.beside(start([*rankwise, "resize", str(out), "--ranks", str(ranks)]))
            run.for_s(1)
            handed_s.append(run.longest_gap_s(asked))
            times = [at for at, _ in run.seen]
            over = next(k for k in range(asked, len(times) - 1) if times[k + 1] - times[k] == handed_s[-1])
            slowed.append(run.rate(asked, over) / run.rate(began, asked))
            run.for_s(3)
            before = len(run.seen) - 1
            process.send_signal(signal.SIGINT)
            run.beside(process)
            process = start([*rankwise, "train", "--resume", str(out)])
            while len(run.seen) < before + 50:
                run.look()
            run.for_s(1)
            stopped_s.append(run.longest_gap_s(before))
        process.send_signal(signal.SIGINT)
        process.wait()
    print(f"paper-cnn, {its.ranks} and {its.other} ranks, {2 * its.repeats} changes, seconds without a step")
    print(f"handed over          {spread(handed_s)}")
    print(f"stopped and resumed  {spread(stopped_s)}")
    ratios = [one / other for one, other in zip(handed_s, stopped_s, strict=True)]
    print(f"handed over / stopped and resumed  {spread(ratios, 3)}")
    print(f"rate while the next ranks get ready, of that before  {spread(slowed)}")


if __name__ == "__main__":
    main()
