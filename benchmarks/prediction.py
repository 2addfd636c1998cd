"""Predicts epochs first, then runs them, and prints every error.

    python benchmarks/prediction.py [--quick] [--all] [--data-dir DIR] [--links] [--match TEXT] [--out DIR]

The fit sees two and four ranks that meet in each step with batches of 16, and one rank with 16 and with 64;
the points that it has not seen are 2 to 8 ranks, both topologies, five strategies and three batch sizes: a
third of their combinations, in which any two of these meet as often as any others, or with --all each of
them. As the machine drifts, the sources run again after every eighth point, each point is predicted from
those before it and once more from those behind it, and medians over the repeats are compared. With --links
also two and three hosts, network namespaces on this machine on links of 50, 100 and 1000 Mbit/s, for which
root is needed. With --match only points whose name holds the text, such as easgd. Runs stay in --out, if it
is given: started again there, it measures what is missing, and predicts all anew.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import common

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


def cases(quick: bool, all_of_them: bool) -> list[Case]:
    if quick:
        return [Case(2, "local-sgd", "allreduce", 16), Case(3, "gradient-server", "master", 64)]
    found = [
        Case(ranks, *way, batch)
        for (i, way), (j, ranks), (k, batch) in itertools.product(*map(enumerate, (FAMILIES, RANKS, BATCHES)))
        if all_of_them or (i + j + k) % len(BATCHES) == 0
    ]
    seen = [Case(ranks, "allreduce", "allreduce", 16) for ranks in (2, 4)]
    return [case for case in found if case not in seen]


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


def predicted_s(case: Case, sources: list[Path], scratch: Path) -> float:
    """What the command line says."""
    words = [sys.executable, "-m", "rankwise", "predict", "--format", "json", *map(str, case.options)]
    for folder in sources:
        words += ["--from", str(folder)]
    if case.mbit_s:
        network = str(measured_link(case.mbit_s, scratch))
        words += ["--network", network, "--ranks-per-host", "1", "--cores-per-host", "1"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return float(json.loads(done.stdout)["points"][0]["epoch_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--limit", type=int, default=10_000, help="training samples an epoch")
    parser.add_argument("--epochs", type=int, default=6, help="of a run; the first is left out")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="keep the runs here, and go on with those that are there")
    parser.add_argument("--links", action="store_true", help="also three hosts on slow links (root)")
    parser.add_argument("--match", default="", help="only points whose name holds this text")
    parser.add_argument("--all", action="store_true", help="every combination, three times as many points")
    parser.add_argument("--quick", action="store_true", help="two points, once")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.limit = 1, min(arguments.limit, 2000)
    chosen = cases(arguments.quick, arguments.all) + (linked(arguments.quick) if arguments.links else [])
    chosen = [case for case in chosen if arguments.match in case.name]
    if not chosen:
        parser.error(f"--match {arguments.match}: no point's name holds that")
    # Whoever ends it by SIGTERM leaves no host behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; with --out it goes on from here"))
    predictions: dict[Case, list[float]] = {case: [] for case in chosen}
    measured: dict[Case, list[float]] = {case: [] for case in chosen}
    with contextlib.ExitStack() as stack:
        folder = arguments.out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        groups = [chosen[start : start + GROUP] for start in range(0, len(chosen), GROUP)]
        for turn in range(arguments.repeats):
            before: list[Case] = []
            for group in [*groups, []]:
                name = group[0].file_name if group else "end"
                scratch = folder / f"turn-{turn}" / name
                scratch.mkdir(parents=True, exist_ok=True)
                sources = [scratch / source for source in SOURCES]
                for path, options in zip(sources, SOURCES.values(), strict=True):
                    run(arguments, list(options), path)
                for case in (*before, *group):
                    predictions[case].append(predicted_s(case, sources, scratch))
                for case in group:
                    measured[case].append(run(arguments, case.options, scratch / case.file_name, case))
                    number = chosen.index(case) + 1
                    print(f"\rturn {turn + 1}, point {number} of {len(chosen)}", end="", file=sys.stderr)
                before = group
        print(file=sys.stderr)
    print(f"{'point':52} {'predicted s':>12} {'measured s':>24} {'error':>8}")
    errors: dict[bool, list[float]] = {False: [], True: []}
    for case in chosen:
        guess, truth = statistics.median(predictions[case]), statistics.median(measured[case])
        error = guess / truth - 1
        errors[case.crowded].append(abs(error))
        print(f"{case.name:52} {guess:12.3f} {common.spread(measured[case], 3):>24} {error:+8.1%}")
    for crowded, found in errors.items():
        if found:
            which = "with more ranks than cores" if crowded else "a core for each rank that trains"
            print(f"{which}: median {statistics.median(found):.1%}, worst {max(found):.1%} of {len(found)}")


if __name__ == "__main__":
    main()
