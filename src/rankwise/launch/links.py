"""What `rankwise doctor --hosts` finds: whether hosts answer and fit together, and what lies between them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.comm.mpi_environment import find_mpiexec
from rankwise.errors import LaunchError
from rankwise.launch.command_line import command_line
from rankwise.launch.hosts import ask, differences
from rankwise.launch.supervision import Line, start, supervise
from rankwise.system.hosts import Host

MARK = "rankwise-link "
"""What begins a line of rank 0 that is for `survey`."""

WORTH_TELLING_S = 1.0
"""Wall clocks that are further apart confuse who reads logs; the ledger measures its own offsets."""


def survey(hosts: Sequence[Host], say: Callable[[str], None]) -> dict[str, Any]:
    """What each host says of itself, and latency, bandwidth and clocks of each pair, as JSON can hold them.

    `say` gets a line for each pair that was measured. Raises LaunchError, one line, that names all hosts that
    do not answer, or if no message passes between some.
    """
    mpiexec = find_mpiexec()
    answers = ask(hosts, Path.cwd())
    silent = [
        f"{host.name}: {answer.trouble}"
        for host, answer in zip(hosts, answers, strict=True)
        if answer.trouble
    ]
    if silent:
        raise LaunchError(f"{len(silent)} of {len(hosts)} hosts cannot be used: {'; '.join(silent)}")
    from rankwise.comm.link_probe import pairs_of

    pairs = len(pairs_of(len(hosts)))
    links: list[dict[str, Any]] = []

    def hear(line: Line) -> None:
        if not line.text.startswith(MARK):
            say(line.text)
            return
        for link in links_in(line.text):
            links.append({"hosts": [hosts[rank].name for rank in link.pop("ranks")]} | link)
            say(f"measured {' - '.join(links[-1]['hosts'])}, {len(links)} of {pairs}")

    program = [sys.executable, "-m", "rankwise.launch.links"]
    if pairs:
        single = [Host(host.name, 1) for host in hosts]
        command = command_line(mpiexec, len(hosts), program, hosts=single)
        ending = supervise(start(command, hear, is_hydra=mpiexec.is_hydra))
        if len(links) < pairs:
            words = " ".join(ending.last_words.split())[:300] or f"mpiexec ended with code {ending.code}"
            raise LaunchError(f"{pairs - len(links)} of {pairs} links could not be measured: {words}")
    slowest = min(links, key=lambda link: float(link["bytes_per_s"]), default=None)
    return {
        "hosts": [
            {"name": host.name, "calls_itself": answer.name, "versions": dict(answer.versions)}
            for host, answer in zip(hosts, answers, strict=True)
        ],
        "links": links,
        "slowest": slowest["hosts"] if slowest else None,
        "problems": [
            *(line for pair in zip(hosts, answers, strict=True) for line in differences(*pair)),
            *_clocks(links),
        ],
    }


def links_in(text: str) -> list[dict[str, Any]]:
    """The links in a line of a rank's. MPICH's mpiexec may end it behind that of another rank only."""
    decoder = json.JSONDecoder()
    return [decoder.raw_decode(piece)[0] for piece in text.split(MARK)[1:]]


def _clocks(links: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"the clocks of {' and '.join(link['hosts'])} are {abs(link['ahead_s']):.1f} s apart: set them by NTP"
        for link in links
        if abs(link["ahead_s"]) > WORTH_TELLING_S
    ]


def main() -> None:
    """One rank, on one of the hosts; rank 0 prints one line per link."""
    from rankwise.comm.link_probe import measure_links
    from rankwise.comm.mpi import mpi_transport

    transport = mpi_transport()
    for link in measure_links(transport):
        if transport.rank == 0:
            rates = {"bytes_per_s": link.bytes_per_s, "both_bytes_per_s": link.both_bytes_per_s}
            print(MARK + json.dumps(asdict(link) | rates), flush=True)
    transport.close()


if __name__ == "__main__":
    main()
