"""One epoch of each strategy of a finished study, over two hosts joined by a slow link.

    sudo python benchmarks/slow_link.py STUDY [--rate 100mbit] [--data-dir DIR] [--text FILE]

STUDY is the folder of `rankwise reproduce strategies`, on images or with `--task language`, whose `--text` is
given again; it gains a record for each strategy, and the same command of `reproduce` then puts the times into
its page. The hosts are network namespaces on this
machine, joined by a bridge, so root is needed. ddp is left out, as gloo would need names for the hosts, and
post-local-sgd on images, whose one epoch would be of its second half alone. On language there are two epochs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.runs.folder import RunFolder
from rankwise.studies import strategy_comparison
from rankwise.studies.folder import StudyFolder
from rankwise.studies.language_study import link_name, task_of
from rankwise.studies.study import Study

sys.path.insert(0, str(Path(__file__).parent.parent))
from tests.hosts import Hosts

LIMITS = {"paper-cnn": 12_500, "resnet9": 1500}
"""A part of the samples must do, as what counts is the time a sample; but not where rounds are long."""

LONGEST_ROUND = 64
LEFT_OUT = ("ddp", "post-local-sgd")


def train(hosts: Hosts, options: Mapping[str, object], out: Path, program: Sequence[str] = ()) -> None:
    """Train with the ranks shared out over both hosts, by a program if one is given."""
    ranks = int(str(options["ranks"]))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    slots = [(ranks + 1) // 2, ranks // 2]
    where = ",".join(f"{address}:{n}" for address, n in zip(hosts.addresses, slots, strict=True))
    command = [sys.executable, "-m", "rankwise", "run" if program else "train"]
    process = hosts.start(*command, *words, f"--hosts={where}", f"--out={out}", *program)
    _, err = process.communicate()
    if process.returncode:
        sys.exit(f"failed: {' '.join(process.args)}\n{err}")


def on_images(hosts: Hosts, folder: StudyFolder, scratch: Path, data_dir: Path | None) -> None:
    """An epoch of each strategy, of all networks."""
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
            if data_dir:
                options["data_dir"] = data_dir
            train(hosts, options, scratch / name)
            keep(folder, name, scratch / name)


def on_language(hosts: Hosts, folder: StudyFolder, scratch: Path, text: Path | None) -> None:
    """Two epochs of each strategy, with as few windows as tell the time of one."""
    given: dict[str, Any] = {name: folder.settings()[name] for name in ("quick", "ranks", "tokens", "width")}
    task = task_of(Study("strategies", task="language", text=text, **given))
    for entrant in task.entrants:
        name = link_name(entrant)
        if not (folder.records / f"{name}.json").exists():
            train(hosts, task.link_options(entrant), scratch / name, task.link_program(entrant))
            keep(folder, name, scratch / name)


def keep(folder: StudyFolder, name: str, out: Path) -> None:
    """Put a run's record to those of the study."""
    record = RunFolder(out).read()
    folder.keep(name, record)
    print(f"{name}: {', '.join(f'{row.train_s:.1f} s' for row in record.epochs)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--text", type=Path)
    arguments = parser.parse_args()
    folder = StudyFolder(arguments.study)
    with tempfile.TemporaryDirectory() as scratch, Hosts(arguments.rate, arguments.rate) as hosts:
        if folder.settings().get("task") == "language":
            on_language(hosts, folder, Path(scratch), arguments.text)
        else:
            on_images(hosts, folder, Path(scratch), arguments.data_dir)


if __name__ == "__main__":
    main()
