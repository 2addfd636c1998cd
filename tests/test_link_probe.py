"""What lies between hosts: latency, bandwidth and clocks of each pair."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import pytest

from rankwise.comm import World, run_in_threads
from rankwise.comm.link_probe import SIZES, Link, measure_links
from rankwise.launch.links import MARK, links_in

from .conftest import Command
from .hosts import Hosts, why_not


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_all_pairs_are_measured_and_all_know(ranks: int) -> None:
    """Each pair once, in order; every rank has the same list. One rank has no link."""

    def program(world: World) -> list[Link]:
        return list(measure_links(world._transport))

    found = run_in_threads(ranks, program)
    assert [link.ranks for link in found[0]] == list(itertools.combinations(range(ranks), 2))
    assert all(links == found[0] for links in found)
    for link in found[0]:
        assert link.latency_s >= 0
        assert [message.bytes for message in link.messages] == list(SIZES[: len(link.messages)])
        assert all(message.one_way_s > 0 and message.both_ways_s > 0 for message in link.messages)


def test_clocks_that_are_apart() -> None:
    """How far one clock is ahead of another, within the error that is told; the truth is injected."""
    ahead_s = [0.0, 5.0, -86_400.0]

    def program(world: World) -> list[Link]:
        wrong = ahead_s[world.rank]
        return list(measure_links(world._transport, wall_ns=lambda: time.monotonic_ns() + int(wrong * 1e9)))

    links = run_in_threads(3, program)[0]
    assert len(links) == 3
    for link in links:
        first, second = link.ranks
        assert link.ahead_s == pytest.approx(ahead_s[second] - ahead_s[first], abs=link.ahead_error_s + 1e-6)


def test_messages_of_growing_size() -> None:
    """On an injected clock on which a message takes a ms and a second a MiB each takes just that, twice as
    long where two pass each other, as one waits there for the other, and messages grow no further than they
    must."""
    sizes: list[int] = []

    def program(world: World) -> list[Link]:
        now_s = 0.0
        plain_send, plain_receive = world._transport.send, world._transport.receive

        def passed(size: int) -> None:
            nonlocal now_s
            now_s += 0.001 + size / 2**20
            sizes.append(size)

        def send(buffer, dest, tag=0):  # type: ignore[no-untyped-def]
            passed(buffer.nbytes)
            return plain_send(buffer, dest, tag)

        def receive(buffer, source, tag=0):  # type: ignore[no-untyped-def]
            passed(buffer.nbytes)
            return plain_receive(buffer, source, tag)

        world._transport.send, world._transport.receive = send, receive  # type: ignore[method-assign]
        return list(measure_links(world._transport, timer=lambda: now_s))

    (link,) = run_in_threads(2, program)[0]
    assert link.latency_s == pytest.approx(0.001, rel=0.01)
    for message in link.messages:
        expected_s = 0.001 + message.bytes / 2**20
        assert message.one_way_s == pytest.approx(expected_s, rel=0.02)
        assert message.both_ways_s == pytest.approx(2 * expected_s, rel=0.02)
    assert max(sizes) == link.messages[-1].bytes == 2**16
    assert link.bytes_per_s == pytest.approx(2**20, rel=0.02)
    assert link.both_bytes_per_s == pytest.approx(2**19, rel=0.02)


def test_a_doctor_for_hosts_that_cannot_be_reached(command: Command, tmp_path: Path) -> None:
    """Every one of them is named in one line, with code 2; so is nonsense."""
    agent = tmp_path / "agent"
    agent.write_text("#!/bin/sh\necho no route >&2\nexit 255\n")
    agent.chmod(0o755)
    words = [command.python, "-m", "rankwise", "doctor", "--hosts"]
    process = command.start(*words, "localhost,x.invalid,y.invalid:2", PRTE_MCA_plm_ssh_agent=str(agent))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert (
        err.strip()
        .splitlines()[-1]
        .endswith("2 of 3 hosts cannot be used: x.invalid: no route; y.invalid: no route")
    )
    done = command(*words, "a:2,a:none")
    assert done.code == 2
    assert "host a has 'none' slots" in done.err


def test_lines_that_are_mixed() -> None:
    """Links of two ranks in one line are two links, and a line's end that is another's does no harm."""
    one, two = ({"ranks": [0, rank], "latency_s": 1e-5} for rank in (1, 2))
    told = [MARK + json.dumps(link) for link in (one, two)]
    assert links_in(told[0] + told[1]) == [one, two]
    assert links_in(told[0] + "[1] ") == [one]


@pytest.mark.mpi
@pytest.mark.alone
def test_the_slowest_link_is_named(command: Command, tmp_path: Path) -> None:
    """Of three hosts one sits behind 50 Mbit/s: its links have that bandwidth, and one is the slowest."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with Hosts(None, None, "50mbit") as hosts:
        where = ",".join(hosts.addresses)
        words = [sys.executable, "-m", "rankwise", "doctor", "--hosts", where, "--format", "json"]
        process = hosts.start(*words, cwd=tmp_path)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 0, err
        facts = json.loads(out)
        assert [host["calls_itself"] for host in facts["hosts"]] == hosts.names
        rates = {tuple(link["hosts"]): link["bytes_per_s"] * 8 for link in facts["links"]}
        a, b, slow = hosts.addresses
        assert slow in facts["slowest"]
        assert rates[a, b] > 2 * max(rates[a, slow], rates[b, slow])
        assert 10e6 < rates[a, slow] < 60e6  # a limit of the link, whatever the machine does
        assert facts["problems"] == []
        assert [hosts.processes(host) for host in range(3)] == [[]] * 3
