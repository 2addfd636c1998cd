"""One epoch of each strategy of a finished study, over two hosts joined by a slow link.

    sudo python benchmarks/slow_link.py STUDY [--rate 100mbit] [--data-dir DIR]

STUDY is the folder of `rankwise reproduce strategies`; it gains a record for each strategy, and the same
command of `reproduce` then puts the times into its page. The hosts are network namespaces on this
machine, joined by a bridge, so root is needed. ddp is left out, as gloo would need names for the hosts, and
post-local-sgd, whose one epoch would be of its second half alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rankwise.record import RunFolder
from rankwise.studies import contest
from rankwise.studies.folder import StudyFolder
from rankwise.world.surroundings import find_mpiexec, mpi_environment

HOSTS = {"rankwise-a": "10.98.7.1", "rankwise-b": "10.98.7.2"}
NETWORK = "10.98.7.0/24"
BRIDGE = "rankwise-br"
LIMITS = {"paper-cnn": 12_500, "resnet9": 1500}
"""A part of the samples must do, as what counts is the time a sample; but not where rounds are long."""

LONGEST_ROUND = 64
LEFT_OUT = ("ddp", "post-local-sgd")


def call(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


@contextlib.contextmanager
def hosts(rate: str) -> Iterator[None]:
    """Two namespaces whose links carry so much in each direction."""
    try:
        call("ip", "link", "add", BRIDGE, "type", "bridge")
        call("ip", "link", "set", BRIDGE, "up")
        for number, (name, address) in enumerate(HOSTS.items()):
            outside = f"rankwise-v{number}"
            call("ip", "netns", "add", name)
            call("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", name)
            call("ip", "link", "set", outside, "master", BRIDGE, "up")
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            call("ip", "-n", name, "link", "set", "eth0", "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
            limit = ["tbf", "rate", rate, "burst", "32kbit", "latency", "50ms"]
            call("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", *limit)
        yield
    finally:
        for name in HOSTS:
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", BRIDGE], check=False)


def agent(folder: Path) -> Path:
    """What Open MPI calls in place of ssh: drops options, takes the address, runs the rest there."""
    cases = "\n".join(f"  {address}) name={name};;" for name, address in HOSTS.items())
    script = folder / "agent"
    script.write_text(
        "#!/bin/bash\n"
        'while [[ "$1" == -* ]]; do shift; done\n'
        "case $1 in\n" + cases + "\nesac\nshift\n"
        'exec ip netns exec "$name" unshare -u bash -c "hostname $name; $*"\n'
    )
    script.chmod(0o755)
    return script


def train(options: dict[str, object], out: Path, scratch: Path) -> None:
    """Train with the ranks shared out over both hosts."""
    ranks = int(str(options.pop("ranks")))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    slots = [(ranks + 1) // 2, ranks // 2]
    where = ",".join(f"{address}:{n}" for address, n in zip(HOSTS.values(), slots, strict=True))
    settings = [
        *("--prtemca", "plm_ssh_agent", agent(scratch), "--prtemca", "plm_ssh_no_tree_spawn", 1),
        *("--prtemca", "prte_if_include", NETWORK, "--mca", "btl", "self,tcp"),
        *("--mca", "btl_tcp_if_include", NETWORK, "--bind-to", "none", "--host", where),
    ]
    command = [
        find_mpiexec().path,
        *settings,
        sys.executable,
        "-m",
        "rankwise",
        "train",
        *words,
        "--out",
        out,
    ]
    inside = " ".join(shlex.quote(str(word)) for word in command)
    first = next(iter(HOSTS))
    done = subprocess.run(
        ["ip", "netns", "exec", first, "unshare", "-u", "bash", "-c", f"hostname {first}; exec {inside}"],
        env=os.environ | mpi_environment(),
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        sys.exit(f"failed: {inside}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("--rate", default="100mbit")
    parser.add_argument("--data-dir", type=Path)
    arguments = parser.parse_args()
    folder = StudyFolder(arguments.study)
    with tempfile.TemporaryDirectory() as scratch, hosts(arguments.rate):
        for course in contest.COURSES:
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
                train(options, out, Path(scratch))
                record = RunFolder(out).read()
                folder.keep(name, record)
                print(f"{name}: {record.epochs[0].train_s:.1f} s", flush=True)


if __name__ == "__main__":
    main()
