"""Predicts epochs first, then runs them, and prints every error, and how many intervals held.

    python benchmarks/prediction.py [--minutes M | --quick] [--all] [--data-dir DIR] [--links] [--match TEXT]
        [--out DIR]

The fit sees two and four ranks that meet in each step with batches of 16, and one rank with 16 and with 64;
the points that it has not seen are 2 to 8 ranks, both topologies, five strategies and three batch sizes: a
third of their combinations, in which any two of these meet as often as any others, or with --all each of
them. As the machine drifts, the sources run again after every eighth point, and each point is predicted from
those before it and once more from those behind it, from all together and from each alone; medians over the
repeats are compared. An interval counts as one that held if the median of all repeats lies in it. With
--minutes 12 points are measured as often as fit, with 4,000 images an epoch. With --links
also two and three hosts, network namespaces on this machine on links of 50, 100 and 1000 Mbit/s, for which
root is needed. With --match only points whose name holds the text, such as easgd. Runs stay in --out, if it
is given: started again there, it measures what is missing, and predicts all anew.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import common
import numpy as np
from scipy import stats

from rankwise.prediction.interval import LEVEL
from rankwise.prediction.options import PredictionOptions
from rankwise.prediction.points import Point
from rankwise.prediction.predict import predict
from rankwise.prediction.source import Source, read_source
from rankwise.system.machine import usable_cores

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.hosts import Hosts

RATES = (50, 100, 1000)
SOURCES = {
    "pair": ("--ranks", 2, "--strategy", "allreduce", "--batch-size", 16, "--threads", 1),
    "alone": ("--ranks", 1, "--strategy", "single", "--batch-size", 16, "--threads", 1),
    "alone-64": ("--ranks", 1, "--strategy", "single", "--batch-size", 64, "--threads", 1),
    "crowd": ("--ranks", 4, "--strategy", "allreduce", "--batch-size", 16, "--threads", 1),
}
"""The first says the options of what is predicted."""

GROUP = 8
"""Points that are predicted from the same runs: the machine drifts by more than the model errs."""

ALL = "all"
"""The sources together."""

RANKS = (2, 3, 4, 8)
BATCHES = (8, 16, 64)


@dataclass(frozen=True)
class Case:
    """A point: options that training and prediction share, and the rate of its hosts' links, if any."""

    ranks: int
    strategy: str
    topology: str
    batch: int
    mbit_s: int = 0

    @property
    def options(self) -> list[object]:
        words = ["--strategy", self.strategy, "--topology", self.topology]
        return [*words, "--ranks", self.ranks, "--batch-size", self.batch, "--threads", 1]

    @property
    def name(self) -> str:
        link = f" {self.mbit_s} Mbit/s" if self.mbit_s else ""
        return f"{self.strategy} {self.topology} {self.ranks} ranks, batch {self.batch}{link}"

    @property
    def file_name(self) -> str:
        return self.name.replace(",", "").replace(" ", "-").replace("/", "-")

    @property
    def crowded(self) -> bool:
        return self.ranks - (self.topology == "master") > usable_cores()


FAMILIES = (
    ("parameter-averaging", "master"),
    ("parameter-averaging", "allreduce"),
    ("allreduce", "allreduce"),
    ("gradient-server", "master"),
    ("local-sgd", "allreduce"),
    ("local-sgd", "master"),
    ("easgd", "master"),
)


SEEN = {"pair": Case(2, "allreduce", "allreduce", 16), "crowd": Case(4, "allreduce", "allreduce", 16)}
"""Sources that are points for the others."""

FEW = (
    Case(2, "allreduce", "allreduce", 8),
    Case(2, "allreduce", "allreduce", 64),
    Case(2, "local-sgd", "allreduce", 16),
    Case(2, "parameter-averaging", "allreduce", 64),
    Case(2, "local-sgd", "master", 8),
    Case(3, "gradient-server", "master", 16),
    Case(3, "parameter-averaging", "master", 16),
    Case(3, "easgd", "master", 64),
    Case(3, "allreduce", "allreduce", 16),
    Case(4, "parameter-averaging", "allreduce", 64),
    Case(4, "local-sgd", "allreduce", 16),
    Case(4, "gradient-server", "master", 64),
)
"""Points of --minutes: those first that have a core for each rank that trains."""


def cases(arguments: argparse.Namespace) -> list[Case]:
    if arguments.quick:
        return [Case(2, "local-sgd", "allreduce", 16), Case(3, "gradient-server", "master", 64)]
    if arguments.minutes:
        return list(FEW)
    found = [
        Case(ranks, *way, batch)
        for (i, way), (j, ranks), (k, batch) in itertools.product(*map(enumerate, (FAMILIES, RANKS, BATCHES)))
        if arguments.all or (i + j + k) % len(BATCHES) == 0
    ]
    return [case for case in found if case not in SEEN.values()]


def linked(quick: bool) -> list[Case]:
    """Each rank on a host of its own.

    The hosts share this machine's cores, which no prediction can know: so three of them have a master, which
    rests while the two others train, and without a master there are two.
    """
    rates = RATES[1:2] if quick else RATES
    return [
        Case(3 if topology == "master" else 2, strategy, topology, 16, rate)
        for rate in rates
        for strategy, topology in FAMILIES
    ]


def run(arguments: argparse.Namespace, options: list[object], out: Path, case: Case | None = None) -> float:
    """The median of the epochs after the first; a run that is there is not made again."""
    words = ["--epochs", arguments.epochs, "--train-limit", arguments.limit, *options]
    if not finished(out):
        shutil.rmtree(out, ignore_errors=True)
        if case and case.mbit_s:
            run_linked(arguments, words, out, case.ranks, f"{case.mbit_s}mbit")
        else:
            common.finish(common.start(common.command(arguments, *words, out=out)))
    return statistics.median(row["wall_s"] for row in common.record_of(out)["epochs"][1:])


def finished(out: Path) -> bool:
    return (out / "record.json").exists() and common.record_of(out)["outcome"] == "completed"


def run_linked(
    arguments: argparse.Namespace, options: list[object], out: Path, ranks: int, rate: str
) -> None:
    """Each rank on a host of its own, on a link of this rate."""
    with Hosts(*[rate] * ranks) as hosts:
        where = ",".join(f"{address}:1" for address in hosts.addresses)
        on(hosts, *common.command(arguments, *options, "--hosts", where, out=out))


def measured_link(mbit_s: int, scratch: Path) -> Path:
    """What rankwise finds between two such hosts: one machine does not carry all that tc allows."""
    found = scratch / f"{mbit_s}-mbit-s.json"
    if not found.exists():
        with Hosts(*[f"{mbit_s}mbit"] * 2) as hosts:
            where = ",".join(hosts.addresses)
            words = [sys.executable, "-m", "rankwise", "doctor", "--hosts", where, "--format", "json"]
            found.write_text(on(hosts, *words))
    return found


def on(hosts: Hosts, *words: str) -> str:
    """What a command prints that is started on the first host. The hosts share cores, and do not know it."""
    process = hosts.start(*words, environment={"OMPI_MCA_mpi_yield_when_idle": "1"})
    output, error = process.communicate()
    if process.returncode:
        sys.exit(error)
    return output


@cache
def source_of(folders: tuple[Path, ...]) -> Source:
    return read_source(folders)


def predicted(case: Case, sources: tuple[Path, ...], scratch: Path) -> Point:
    """What the command line says."""
    its = source_of(sources)
    options = {
        "ranks": str(case.ranks),
        "strategy": case.strategy,
        "topology": case.topology,
        "batch_size": case.batch,
        "threads": 1,
    }
    if case.mbit_s:
        network = str(measured_link(case.mbit_s, scratch))
        options |= {"network": network, "ranks_per_host": 1, "cores_per_host": 1}
    (point,) = predict(its, PredictionOptions(**options)).points
    return point


class Tally:
    """What was predicted of each point from which sources, and what was measured."""

    def __init__(self) -> None:
        self.predicted: dict[tuple[str, Case], list[Point]] = defaultdict(list)
        self.measured: dict[Case, list[float]] = defaultdict(list)
        self.runs: dict[str, list[float]] = defaultdict(list)

    def predict(self, cases: Iterable[Case], scratch: Path) -> None:
        """From the sources in this folder, together and each alone."""
        folders = {name: (scratch / name,) for name in SOURCES}
        for case in cases:
            self.predicted[ALL, case].append(
                predicted(case, tuple(scratch / name for name in SOURCES), scratch)
            )
        for name, alone in folders.items():
            for case in (*cases, *SEEN.values()):
                if SEEN.get(name) != case:
                    self.predicted[name, case].append(predicted(case, alone, scratch))

    def held(self, name: str, *, crowded: bool | None = None) -> tuple[int, int, float]:
        """How many intervals hold the median that was measured, of how many, and half their width in the
        median, as part of the prediction."""
        found = [
            (point.low_s <= statistics.median(self.measured[case]) <= point.high_s, point)
            for (source, case), points in self.predicted.items()
            if source == name and crowded in (None, case.crowded)
            for point in points
        ]
        widths = [(point.high_s - point.low_s) / 2 / point.epoch_s for _, point in found]
        return sum(hit for hit, _ in found), len(found), statistics.median(widths) if widths else math.nan

    def print(self, chosen: list[Case]) -> None:
        print(f"{'point':52} {'predicted s':>12} {'measured s':>24} {'error':>8} {'held':>8}")
        errors: dict[bool, list[float]] = {False: [], True: []}
        for case in chosen:
            points, truth = self.predicted[ALL, case], statistics.median(self.measured[case])
            guess = statistics.median(point.epoch_s for point in points)
            held = sum(point.low_s <= truth <= point.high_s for point in points)
            error = guess / truth - 1
            errors[case.crowded].append(abs(error))
            spread = common.spread(self.measured[case], 3)
            print(f"{case.name:52} {guess:12.3f} {spread:>24} {error:+8.1%} {f'{held} of {len(points)}':>8}")
        for crowded, found in errors.items():
            if found:
                which = "with more ranks than cores" if crowded else "a core for each rank that trains"
                print(
                    f"{which}: median {statistics.median(found):.1%}, worst {max(found):.1%} of {len(found)}"
                )
        print(f"\n{LEVEL:.0%} intervals that held what was measured, and half their width in the median")
        print(f"{'predicted from':16} {'held':>12} {'at least':>9} {'a core each':>12} {'more ranks':>12}")
        for name in (ALL, *SOURCES):
            hits, count, _ = self.held(name)
            fewest = int(stats.binom.ppf(0.05, count, LEVEL))
            widths = [self.held(name, crowded=crowded)[2] for crowded in (False, True)]
            print(f"{name:16} {f'{hits} of {count}':>12} {fewest:9} {widths[0]:12.1%} {widths[1]:12.1%}")
        apart = [np.std(np.log(times), ddof=1) for times in self.runs.values() if len(times) > 1]
        if apart:
            text = ", ".join(f"{spread:.1%}" for spread in apart)
            print(f"runs of the same source are apart by (standard deviation): {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, default=10_000, help="training samples an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="of a run; the first is left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minutes", type=float, help="12 points, as often as fit, in place of --repeats")
    parser.add_argument("--out", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--links", action="store_true", help="also three hosts on slow links (root)")
    parser.add_argument("--match", default="", help="only points whose name holds this text")
    parser.add_argument("--all", action="store_true", help="every combination, three times as many points")
    parser.add_argument("--quick", action="store_true", help="two points, once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.limit = 1, min(arguments.limit, 2000)
    if arguments.minutes:
        arguments.limit = min(arguments.limit, 4000)
    chosen = cases(arguments) + (linked(arguments.quick) if arguments.links else [])
    chosen = [case for case in chosen if arguments.match in case.name]
    if not chosen:
        parser.error(f"--match {arguments.match}: no point's name holds that")
    # Whoever ends it by SIGTERM leaves no host behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; with --out it goes on from here"))
    with contextlib.ExitStack() as stack:
        folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tally = measure(arguments, chosen, folder)
    tally.print(chosen)


def measure(arguments: argparse.Namespace, chosen: list[Case], folder: Path) -> Tally:
    """All turns: before each group of points the sources run, and once more at the end."""
    tally = Tally()
    size = len(chosen) if arguments.minutes else GROUP
    groups = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    begun_s, before = time.monotonic(), list[Case]()

    def is_over(turns: int) -> bool:
        if not arguments.minutes:
            return turns >= arguments.repeats
        spent_s = time.monotonic() - begun_s
        return turns > 0 and spent_s * (turns + 1) / turns > 60 * arguments.minutes

    def sources(scratch: Path, group: list[Case]) -> None:
        scratch.mkdir(parents=True, exist_ok=True)
        for name, options in SOURCES.items():
            epoch_s = run(arguments, list(options), scratch / name)
            tally.runs[name].append(epoch_s)
            if name in SEEN:
                tally.measured[SEEN[name]].append(epoch_s)
        tally.predict((*before, *group), scratch)

    turn = 0
    while not is_over(turn):
        for group in groups:
            scratch = folder / f"turn-{turn}" / group[0].file_name
            sources(scratch, group)
            for case in group:
                tally.measured[case].append(run(arguments, case.options, scratch / case.file_name, case))
                number = chosen.index(case) + 1
                print(f"\rturn {turn + 1}, point {number} of {len(chosen)}", end="", file=sys.stderr)
            before = group
        turn += 1
    print(file=sys.stderr)
    if not arguments.minutes:
        sources(folder / f"turn-{turn - 1}" / "end", [])
    return tally


if __name__ == "__main__":
    main()
