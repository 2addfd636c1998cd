"""What messages and packing cost, fitted to the exchanges of a run."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

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
from rankwise.runs.record import Record
from rankwise.strategies.traffic import Collective, Messages, ModelSize, Traffic


@dataclass(frozen=True)
class MessageCosts:
    """Costs inside a host: of a message, of adding up a byte on the way, of packing and unpacking a byte of
    what is exchanged, and of a byte that a master adds up. `low` and `high` are the quartiles of an
    exchange over its median; `measured` is whether they come from a run."""

    local: Link
    reduce_s_per_byte: float
    pack_s_per_byte: float
    serve_s_per_byte: float
    low: float
    high: float
    measured: bool


ASSUMED = MessageCosts(Link(20e-6, 0.2e-9), 0.1e-9, 0.5e-9, 0.25e-9, 0.5, 2.0, False)
"""For a source that exchanged nothing: ranks that share memory, at some GB/s."""


def fit_messages(
    record: Record, config: RunPlan, model: ModelSize, lines: list[RankTimeline]
) -> MessageCosts:
    """Latency and bandwidth that fit the exchanges of a run best, by relative error.

    Each median transfer time is a sum of latency and bytes times what the hops of the exchange say. Adding up
    cannot be separated from bandwidth, so its cost is assumed.
    """
    ranks = len(lines)
    groups = _transfers(lines)
    rows, spread = [], []
    for key, hops in _known(config, model, record).items():
        times_s = groups.get(key, [])
        if len(times_s) >= 3:
            latency, size, reduced = coefficients(hops)
            middle = float(np.median(times_s))
            rest = max(middle - reduced * ASSUMED.reduce_s_per_byte, 0.2 * middle)
            rows.append((latency / rest, size / rest))
            spread.append(np.quantile(times_s, [0.25, 0.75]) / middle)
    if ranks == 1 or not rows:
        return ASSUMED
    said = traffic(config, model, [ranks]).said
    scale = np.array([1e-6, 1e-9])
    found, _ = nnls(np.array(rows) * scale, np.ones(len(rows)))
    latency_s, s_per_byte = found * scale
    low, high = np.array(spread).mean(axis=0)
    return MessageCosts(
        Link(float(latency_s), float(s_per_byte) or ASSUMED.local.s_per_byte),
        ASSUMED.reduce_s_per_byte,
        _packing(lines, said) or ASSUMED.pack_s_per_byte,
        _serving(lines, said) or ASSUMED.serve_s_per_byte,
        float(low),
        float(high),
        True,
    )


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


def _known(config: RunPlan, model: ModelSize, record: Record) -> dict[tuple[int, int], Hops]:
    """The exchanges whose hops are known, by pattern and bytes."""
    ranks = sum(row.role != "spare" for row in record.ranks)
    if ranks == 1:
        return {}
    said = traffic(config, model, [ranks]).said
    known = {(int(Pattern.ALL_TO_ALL), SUMMARY[0]): collectives.allreduce(ranks, SUMMARY[0])}
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
                known[int(Pattern.ALL_TO_ALL), size] = collectives.allreduce(ranks, size)
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
