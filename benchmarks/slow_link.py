"""One epoch of each strategy of a finished study, over two hosts joined by a slow link.

    sudo python benchmarks/slow_link.py STUDY [--rate 100mbit] [--data-dir DIR]

STUDY is the folder of `rankwise reproduce strategies`; it gains a record for each strategy, and the same
command of `reproduce` then puts the times into its page. The hosts are network namespaces on this
machine, joined by a bridge, so root is needed. ddp is left out, as gloo would need names for the hosts, and
post-local-sgd, whose one epoch would be of its second half alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rankwise.runs.folder import RunFolder
from rankwise.studies import strategy_comparison
from rankwise.studies.folder import StudyFolder

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.hosts import Hosts

LIMITS = {"paper-cnn": 12_500, "resnet9": 1500}
"""A part of the samples must do, as what counts is the time a sample; but not where rounds are long."""

LONGEST_ROUND = 64
LEFT_OUT = ("ddp", "post-local-sgd")


def train(hosts: Hosts, options: dict[str, object], out: Path) -> None:
    """Train with the ranks shared out over both hosts."""
    ranks = int(str(options["ranks"]))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    slots = [(ranks + 1) // 2, ranks // 2]
    where = ",".join(f"{address}:{n}" for address, n in zip(hosts.addresses, slots, strict=True))
    program = [sys.executable, "-m", "rankwise", "train", *words, f"--hosts={where}", f"--out={out}"]
    process = hosts.start(*program)
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"failed: {' '.join(program)}\n{err}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    folder = StudyFolder(arguments.study)
    with tempfile.TemporaryDirectory() as scratch, Hosts(arguments.rate, arguments.rate) as hosts:
        for course in strategy_comparison.COURSES:
            for entrant in course.entrants:
                name = f"{course.model}-{entrant.slug}-link"
                found = sorted(folder.records.glob(f"{course.model}-{entrant.slug}-lr*-seed0.json"))
                final = [path for path in found if "tuning" not in path.name]
                if entrant.name in LEFT_OUT or not final or (folder.records / f"{name}.json").exists():
                    continue
                stored = folder.record_of(final[0].stem)
                assert stored is not None
                names = {*course.run_options(entrant, 0.0, final=True), "dataset", "seed"}
                options = {key: stored.config[key] for key in names} | {"epochs": 1, "val_limit": 500}
                every = stored.config["sync_every"]
                if every != "epoch" and every <= LONGEST_ROUND:
                    options["train_limit"] = LIMITS[course.model]
                if arguments.data_dir:
                    options["data_dir"] = arguments.data_dir
                out = Path(scratch) / name
                train(hosts, options, out)
                record = RunFolder(out).read()
                folder.keep(name, record)
                print(f"{name}: {record.epochs[0].train_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
