"""What messages and packing cost, fitted to the exchanges of a run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls  # type: ignore[import-untyped]

from rankwise.ledger.phases import PHASES
from rankwise.ledger.timeline import RankTimeline
from rankwise.ledger.waits import Pattern
from rankwise.plan import RunPlan
from rankwise.prediction import collectives
from rankwise.prediction.collectives import Hops
from rankwise.prediction.network import Link, coefficients
from rankwise.prediction.step_phases import spent_in_steps
from rankwise.prediction.traffic import SUMMARY, traffic
from rankwise.strategies.traffic import Collective, Messages, ModelSize, Traffic


@dataclass(frozen=True)
class MessageCosts:
    """Costs inside a host: of a message (`local`), of a meeting in shared memory (`shared`), of adding up a
    byte on the way, of packing and unpacking a byte of what is exchanged, and of a byte that a master adds
    up. Whether a run tells of messages, and of sums in shared memory, say `knows_messages` and
    `knows_sums`; what none tells is assumed."""

    local: Link
    shared: Link
    reduce_s_per_byte: float
    pack_s_per_byte: float
    serve_s_per_byte: float
    knows_messages: bool = False
    knows_sums: bool = False

    @property
    def measured(self) -> bool:
        """Whether a run tells anything of exchanges."""
        return self.knows_messages or self.knows_sums

    def or_else(self, other: MessageCosts) -> MessageCosts:
        """These costs, with what another run knows and this one does not."""
        known = self if self.measured else other
        return replace(
            known,
            local=self.local if self.knows_messages else other.local,
            shared=self.shared if self.knows_sums else other.shared,
            knows_messages=self.knows_messages or other.knows_messages,
            knows_sums=self.knows_sums or other.knows_sums,
        )


ASSUMED = MessageCosts(Link(20e-6, 0.2e-9), Link(20e-6, 0.2e-9), 0.1e-9, 0.5e-9, 0.25e-9)
"""For a source that exchanged nothing: ranks that share memory, at some GB/s."""

WEAKLY = 0.01
"""How much what is assumed weighs beside a measured exchange."""


def fit_messages(
    config: RunPlan, model: ModelSize, lines: list[RankTimeline], hosts: Sequence[int]
) -> MessageCosts:
    """Latency and bandwidth that fit the exchanges of a run best, by relative error, apart for messages and
    for sums in shared memory.

    Each mean transfer time is a sum of latency and bytes times what the hops of the exchange say. Adding up
    cannot be separated from bandwidth, so its cost is assumed. What exchanges do not tell apart, as those of
    a single size do not, stays near what is assumed.
    """
    groups = _transfers(lines)
    rows: dict[bool, list[tuple[float, float, float]]] = {False: [], True: []}
    for key, hops in _known(config, model, hosts).items():
        times_s = groups.get(key, [])
        if len(times_s) >= 3:
            latency, size, reduced = coefficients(hops)
            mean_s = float(np.mean(times_s))
            rest_s = max(mean_s - reduced * ASSUMED.reduce_s_per_byte, 0.2 * mean_s)
            weight = math.sqrt(len(times_s))
            rows[hops[0].shared].append((weight, weight * latency / rest_s, weight * size / rest_s))
    if not any(rows.values()):
        return ASSUMED
    said = traffic(config, model, hosts).said
    return MessageCosts(
        _fit(rows[False], ASSUMED.local),
        _fit(rows[True], ASSUMED.shared),
        ASSUMED.reduce_s_per_byte,
        _packing(lines, said) or ASSUMED.pack_s_per_byte,
        _serving(lines, said) or ASSUMED.serve_s_per_byte,
        knows_messages=bool(rows[False]),
        knows_sums=bool(rows[True]),
    )


def _fit(rows: list[tuple[float, float, float]], assumed: Link) -> Link:
    """The link with whose latency and seconds per byte the last two of each of `rows` make the first."""
    scale = np.array([1.0, assumed.latency_s, assumed.s_per_byte])
    guess = WEAKLY * np.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    table = np.concatenate([np.array(rows).reshape(-1, 3) * scale, guess])
    found, _ = nnls(table[:, 1:], table[:, 0])
    latency_s, s_per_byte = found * scale[1:]
    return Link(float(latency_s), float(s_per_byte))


def _transfers(lines: list[RankTimeline]) -> dict[tuple[int, int], list[float]]:
    """Seconds in transfer of the exchanges in all timelines, by pattern and bytes. Of exchanges of all
    ranks those of rank 0 are taken."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for line in lines:
        for row in line.exchanges:
            of_two = row["pattern"] in (Pattern.SEND, Pattern.RECEIVE)
            if line.rank == 0 or of_two:
                transfer_ns = int(row["left_ns"] - row["entered_ns"] - row["wait_ns"])
                found[int(row["pattern"]), int(row["bytes"])].append(max(transfer_ns, 1) / 1e9)
    return found


def _known(config: RunPlan, model: ModelSize, hosts: Sequence[int]) -> dict[tuple[int, int], Hops]:
    """The exchanges whose hops are known, by pattern and bytes."""
    ranks = sum(hosts)
    if ranks == 1:
        return {}
    said = traffic(config, model, hosts).said
    known = {(int(Pattern.ALL_TO_ALL), size): collectives.sum_of_all(hosts, size) for size in set(SUMMARY)}
    size = said.payload_bytes + said.compressed  # with a flag behind it
    for exchange in said.each_round:
        match exchange:
            case Messages() | Collective(kind="broadcast", among="host"):
                known[int(Pattern.RECEIVE), size] = (collectives.Hop(1, size),)
            case Collective(kind="gather", among="all"):
                known[int(Pattern.ALL_TO_ONE), size] = collectives.gather(ranks, size)
            case Collective(kind="broadcast", among="all"):
                known[int(Pattern.ONE_TO_ALL), size] = collectives.broadcast(ranks, size)
            case Collective(kind="allreduce", among="all") if not said.compressed:
                known[int(Pattern.ALL_TO_ALL), size] = collectives.sum_of_all(hosts, size)
    return known


def _packing(lines: list[RankTimeline], said: Traffic) -> float:
    """Seconds per byte of packing, unpacking and keeping what is needed to go back, in rounds of workers."""
    columns = [PHASES.index("pack"), PHASES.index("recovery")]
    times = []
    for line in lines:
        if line.role == "worker" and not said.compressed:
            spent = spent_in_steps(line)[line.steps["step"] > 0][:, columns].sum(1)
            times += spent[spent > 0].tolist()
    return float(np.median(times)) / 1e9 / said.payload_bytes if times else 0.0


def _serving(lines: list[RankTimeline], said: Traffic) -> float:
    """Seconds per byte that a server adds up."""
    if said.server_steps or said.compressed or not said.served:
        return 0.0
    spent = [spent_in_steps(line) for line in lines if line.role == "master"]
    times = [row[PHASES.index("optimizer")] for rows in spent for row in rows]
    busy = [ns for ns in times if ns > 0]
    return float(np.median(busy)) / 1e9 / said.served_bytes if busy else 0.0
