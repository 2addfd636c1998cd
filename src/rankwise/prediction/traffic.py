"""What a strategy's exchanges come to: bytes of all ranks together, and hops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rankwise.plan import RunPlan
from rankwise.prediction import collectives
from rankwise.prediction.collectives import Hop, Hops
from rankwise.strategies.base import marks_traffic
from rankwise.strategies.traffic import ITEM_BYTES, Collective, Exchange, Messages, ModelSize, Traffic

SUMMARY = (32, 8, 8)
"""Bytes per rank of each of the sums by which an epoch is summarised: its losses, the proof that no sample is
missing, and its time."""


@dataclass(frozen=True)
class Transfer:
    """Payload that all ranks together hand to MPI, as the record counts it, and the hops that it takes; those
    of one worker where each meets the server alone."""

    bytes_sent: int
    hops: Hops

    def __add__(self, other: Transfer) -> Transfer:
        return Transfer(self.bytes_sent + other.bytes_sent, self.hops + other.hops)


NOTHING = Transfer(0, ())


@dataclass(frozen=True)
class RunTraffic:
    """What a run sends in each step, at the end of each round, and at the end of each epoch; `said` is what
    its strategy says of steps and rounds."""

    said: Traffic
    each_step: Transfer
    each_round: Transfer
    each_epoch: Transfer


def traffic(config: RunPlan, model: ModelSize, hosts: Sequence[int]) -> RunTraffic:
    """The traffic of a resolved configuration, with `hosts` [hosts] ranks on each host.

    Raises ConfigError for a strategy that does not say what it sends.
    """
    if sum(hosts) == 1:
        return RunTraffic(Traffic(), NOTHING, NOTHING, NOTHING)
    strategy = config.entry.build(config)
    model = replace(model, moments=_moments(config))
    said = strategy.traffic(model, hosts)
    summary = tuple(Collective("allreduce", size) for size in SUMMARY)
    if config.keep_copies:
        copy = Messages("neighbours", ITEM_BYTES * _own_numbers(config, model), count=1)
        said = replace(said, each_round=(*said.each_round, copy))
    return RunTraffic(
        said,
        _transfer(said.each_step, hosts),
        _transfer(said.each_round, hosts),
        _transfer((*strategy.closing_traffic(model), *marks_traffic(strategy.recovery), *summary), hosts),
    )


def _own_numbers(config: RunPlan, model: ModelSize) -> int:
    """What only one rank has of a model: its optimiser's state and what its compression leaves out."""
    of_optimizer = config.spares > 0 and not config.entry.strategy.shares_optimizer
    return model.parameters * (model.moments * of_optimizer + (config.compress != "none"))


def _moments(config: RunPlan) -> int:
    """How many tensors the optimiser keeps for each parameter, in its shape."""
    return int(config.momentum > 0) if config.optimizer == "sgd" else 2


def _transfer(exchanges: Iterable[Exchange], hosts: Sequence[int]) -> Transfer:
    return sum((_transfer_of(exchange, hosts) for exchange in exchanges), NOTHING)


def _transfer_of(exchange: Exchange, hosts: Sequence[int]) -> Transfer:
    ranks = sum(hosts)
    match exchange:
        case Messages("server", size, count):
            # Between hosts the system sends an answer while the server takes the next message.
            one_way = len(hosts) == 1 or ranks == 2
            return Transfer((ranks - 1) * count * size, (Hop(count, size, one_way=one_way),))
        case Messages(_, size, count):
            return Transfer(ranks * count * size, (Hop(count, size, distance=1, ring=True),))
        case Collective(among="all"):
            return _of_all(exchange, hosts)
        case Collective(among="host"):
            return _by_messages(exchange, hosts)
        case Collective():
            found = _by_messages(exchange, [len(hosts)])
            return Transfer(found.bytes_sent, tuple(_far(hop, max(hosts)) for hop in found.hops))


def _of_all(exchange: Collective, hosts: Sequence[int]) -> Transfer:
    """All ranks at once: by MPI, or in the memory of a host that has them all."""
    size, pieces, ranks = exchange.bytes, exchange.pieces, sum(hosts)
    match exchange.kind:
        case "allreduce" if pieces > 1:
            return Transfer(ranks * size, collectives.background_allreduce(ranks, size // pieces) * pieces)
        case "allreduce":
            return Transfer(ranks * size, collectives.sum_of_all(hosts, size))
        case "allgather":
            return Transfer(ranks * (ranks - 1) * size, collectives.allgather(ranks, size))
        case "gather":
            return Transfer((ranks - 1) * size, collectives.gather(ranks, size))
        case "broadcast":
            return Transfer((ranks - 1) * size, collectives.broadcast(ranks, size))


def _by_messages(exchange: Collective, groups: Sequence[int]) -> Transfer:
    """Groups of ranks at the same time, `groups` [groups] ranks in each, as `rankwise.comm.Subgroup` does."""
    size, largest = exchange.bytes, max(groups)
    if largest == 1:
        return NOTHING
    match exchange.kind:
        case "allreduce":
            sent, hops = sum(2 * (ranks - 1) for ranks in groups), collectives.ring(largest, size)
        case "allgather":
            sent, hops = sum(ranks * (ranks - 1) for ranks in groups), (Hop(largest - 1, size, ring=True),)
        case "gather" | "broadcast":
            sent, hops = sum(ranks - 1 for ranks in groups), collectives.gather(largest, size)
    return Transfer(sent * size, hops)


def _far(hop: Hop, ranks_per_host: int) -> Hop:
    """The same between leaders of hosts, one of which is on each."""
    return replace(hop, distance=hop.distance if hop.ring else ranks_per_host)
