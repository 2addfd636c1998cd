"""What the ranks of a strategy send: the exchanges of a round and of an epoch's end, with bytes and hops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankwise.config import TrainConfig
from rankwise.prediction import collectives
from rankwise.prediction.collectives import ITEM_BYTES, Hop, Hops
from rankwise.strategies import compression
from rankwise.strategies.compression import ByPayload, PowerSGD

ASYNCHRONOUS = ("easgd", "downpour")
GRADIENTS = ("allreduce", "gradient-server")


@dataclass(frozen=True)
class Model:
    """What of a model is sent: the `shapes` of its parameters, and how many numbers its buffers have,
    floating-point ones and integers."""

    shapes: tuple[tuple[int, ...], ...]
    buffers: int = 0
    integers: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(shape) for shape in self.shapes)


@dataclass(frozen=True)
class Exchange:
    """Payload that all ranks together hand to MPI, as the record counts it, and the hops that it takes."""

    bytes_sent: int
    hops: Hops

    def __add__(self, other: Exchange) -> Exchange:
        return Exchange(self.bytes_sent + other.bytes_sent, self.hops + other.hops)


NOTHING = Exchange(0, ())


@dataclass(frozen=True)
class Traffic:
    """What a run sends. `each_step` is exchanged in every step, `each_round` at a round's end, and
    `each_epoch` when an epoch ends.

    `payload_bytes` is what a rank hands over in a round. A master takes `served_bytes` in hand before it
    answers, and ranks unpack `unpacked_bytes`. `buckets` of the round go out while the backward pass runs.
    """

    each_step: Exchange
    each_round: Exchange
    each_epoch: Exchange
    payload_bytes: int
    served_bytes: int
    unpacked_bytes: int
    buckets: int = 1


def traffic(config: TrainConfig, model: Model, hosts: Sequence[int]) -> Traffic:
    """The traffic of a resolved configuration whose ranks are on `hosts`, so many on each."""
    ranks, name = sum(hosts), config.strategy
    closing = _closing(config, model, ranks)
    plain = (_numbers(config, model) + 1) * ITEM_BYTES  # and a flag behind them
    if ranks == 1:
        return Traffic(NOTHING, NOTHING, closing, 0, 0, 0)
    if name in ASYNCHRONOUS:
        # Between hosts the system sends an answer while the master takes the next message.
        each = _messages(2, plain, one_way=len(hosts) == 1 or ranks == 2)
        return Traffic(NOTHING, each, closing, plain, plain, plain)
    if name == "gossip":
        many = neighbours(config.topology or "ring", ranks)
        each = Exchange(ranks * many * plain, (Hop(many, plain, distance=1, ring=True),))
        return Traffic(NOTHING, each, closing, plain, 0, many * plain)
    if name == "two-level":
        return _two_levels(config, model, hosts, plain, closing)
    buckets = 1
    if config.compress != "none":
        each, payload = compressed(config, model, ranks)
    elif config.topology == "master":
        payload = plain
        each = _gather(ranks, plain) + _broadcast(ranks, plain)
    else:
        payload = plain
        buckets = _buckets(config, model)
        if buckets > 1:
            hops = collectives.background_allreduce(ranks, plain // buckets)
            each = Exchange(ranks * plain, hops * buckets)
        else:
            each = _allreduce(ranks, plain)
    by_master = config.topology == "master"
    rows = (ranks - 1) * payload if by_master else 0
    gathers = config.compress != "none" and not by_master and config.compress not in ("fp16", "bf16")
    return Traffic(NOTHING, each, closing, payload, rows, payload * (ranks if gathers else 1), buckets)


def neighbours(topology: str, ranks: int) -> int:
    """To how many others each rank sends in a round of gossip."""
    return {"complete": ranks - 1, "ring": min(2, ranks - 1), "exponential": 1}[topology]


def compressed(config: TrainConfig, model: Model, ranks: int) -> tuple[Exchange, int]:
    """A compressed sum, and the bytes of a rank's payload in it."""
    numbers, by_master = _numbers(config, model), config.topology == "master"

    def add_up(size: int) -> Exchange:
        return _gather(ranks, size) + _broadcast(ranks, size) if by_master else _allreduce(ranks, size)

    found = compression.parse(config.compress, model.shapes)
    if isinstance(found, PowerSGD):
        first, second = _factors(found.rank, model, numbers)
        each = add_up((first + 1) * ITEM_BYTES)
        each += add_up(second * ITEM_BYTES) if second else NOTHING
        return each, (first + second) * ITEM_BYTES
    assert isinstance(found, ByPayload)
    payload = len(found.encode(np.ones(numbers, np.float32), np.random.default_rng(0)))
    if not by_master and config.compress in ("fp16", "bf16"):
        return _allreduce(ranks, payload + 2), payload
    if by_master:
        return add_up(payload + 1), payload
    size = payload + 1
    return Exchange(ranks * (ranks - 1) * size, collectives.allgather(ranks, size)), payload


def _factors(rank: int, model: Model, numbers: int) -> tuple[int, int]:
    """Numbers in the first of PowerSGD's two sums (left factors and what goes as it is) and in the second."""
    left = right = matrices = 0
    for shape in model.shapes:
        size, rows = math.prod(shape), shape[0] if shape else 1
        columns = size // max(rows, 1)
        if rank * (rows + columns) < size:
            left, right, matrices = left + rank * rows, right + rank * columns, matrices + size
    return left + numbers - matrices, right


def _numbers(config: TrainConfig, model: Model) -> int:
    """Numbers that a rank sends in place of its weights or gradients."""
    if config.optimizer_state != "average" or config.strategy in GRADIENTS:
        return model.parameters
    moments = int(config.momentum > 0) if config.optimizer == "sgd" else 2
    begun = len(model.shapes) * bool(moments)  # which of them have begun is sent as well
    return model.parameters * (1 + moments) + begun


def _buckets(config: TrainConfig, model: Model) -> int:
    """In how many pieces the gradients go, each of whole parameters."""
    if config.strategy != "allreduce":
        return 1
    most, count, filled = (config.bucket_mb or 25.0) * 1e6 // ITEM_BYTES, 1, 0
    for shape in reversed(model.shapes):
        size = math.prod(shape)
        if filled and filled + size > most:
            count, filled = count + 1, 0
        filled += size
    return count


def _two_levels(
    config: TrainConfig, model: Model, hosts: Sequence[int], plain: int, closing: Exchange
) -> Traffic:
    inside = Exchange(sum(2 * (here - 1) * plain for here in hosts), collectives.ring(max(hosts), plain))
    wishes = Exchange(
        sum(2 * (here - 1) * ITEM_BYTES for here in hosts), collectives.ring(max(hosts), ITEM_BYTES)
    )
    out = Exchange(sum((here - 1) * plain for here in hosts), collectives.gather(max(hosts), plain))
    leaders, apart = len(hosts), max(hosts)
    if leaders == 1:
        across, payload = NOTHING, plain
    elif config.compress == "none":
        across, payload = Exchange(2 * (leaders - 1) * plain, collectives.ring(leaders, plain)), plain
    else:
        across, payload = _compressed_in_a_circle(config, model, leaders)
    across = Exchange(across.bytes_sent, tuple(_far(hop, apart) for hop in across.hops))
    return Traffic(inside, wishes + across + out, closing, payload, 0, payload)


def _compressed_in_a_circle(config: TrainConfig, model: Model, size: int) -> tuple[Exchange, int]:
    found = compression.parse(config.compress, model.shapes)
    numbers = _numbers(config, model)
    if isinstance(found, PowerSGD):
        parts = [
            (part + last) * ITEM_BYTES
            for part, last in zip(_factors(found.rank, model, numbers), (1, 0), strict=True)
        ]
        hops = tuple(hop for part in parts if part for hop in collectives.ring(size, part))
        return Exchange(sum(2 * (size - 1) * part for part in parts), hops), sum(parts) - ITEM_BYTES
    assert isinstance(found, ByPayload)
    payload = len(found.encode(np.ones(numbers, np.float32), np.random.default_rng(0)))
    if config.compress in ("fp16", "bf16"):
        return Exchange(2 * (size - 1) * (payload + 2), collectives.ring(size, payload + 2)), payload
    hops = (Hop(size - 1, payload + 1, ring=True),)
    return Exchange(size * (size - 1) * (payload + 1), hops), payload


def _far(hop: Hop, ranks_per_host: int) -> Hop:
    """The same between leaders of hosts, one of which is on each."""
    return replace(hop, distance=hop.distance if hop.ring else ranks_per_host)


def _closing(config: TrainConfig, model: Model, ranks: int) -> Exchange:
    """What all ranks exchange after an epoch's last round: buffers, what the strategy asks, and the epoch's
    losses, its proof that no sample is missing, and its time."""
    if ranks == 1:
        return NOTHING
    sizes = [model.buffers * ITEM_BYTES, model.integers * 8]
    if config.strategy == "gossip":
        sizes += [model.parameters * ITEM_BYTES, 8]
    if config.strategy in ASYNCHRONOUS:
        sizes.append(8)
    total = NOTHING
    for size in (*sizes, *SUMMARY):
        total += _allreduce(ranks, size) if size else NOTHING
    return total


SUMMARY = (32, 8, 8)
"""Bytes a rank in each of the sums by which an epoch is summarised."""


def _allreduce(ranks: int, size: int) -> Exchange:
    return Exchange(ranks * size, collectives.allreduce(ranks, size))


def _gather(ranks: int, size: int) -> Exchange:
    return Exchange((ranks - 1) * size, collectives.gather(ranks, size))


def _broadcast(ranks: int, size: int) -> Exchange:
    return Exchange((ranks - 1) * size, collectives.broadcast(ranks, size))


def _messages(count: int, size: int, *, one_way: bool) -> Exchange:
    """Of one worker and the master, to and fro."""
    return Exchange(count * size, (Hop(count, size, one_way=one_way),))
