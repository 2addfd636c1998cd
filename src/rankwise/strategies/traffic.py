"""What a strategy sends, as values: it says how many bytes go which way, and a prediction turns that into
hops and seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

ITEM_BYTES = 4
"""Of a float32, in which weights and gradients are added up."""


@dataclass(frozen=True)
class ModelSize:
    """What of a model is sent: the `shapes` of its parameters, how many numbers its buffers have,
    floating-point ones and integers, how many tensors the floating-point ones are (`buffer_tensors`), and how
    many its optimiser keeps for each parameter, in its shape (`moments`)."""

    shapes: tuple[tuple[int, ...], ...]
    buffers: int = 0
    integers: int = 0
    buffer_tensors: int = 0
    moments: int = 0

    @property
    def parameters(self) -> int:
        """Numbers in all parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def with_moments(self) -> int:
        """Numbers in parameters and moments, and which parameters have begun: what a replica packs that
        shares its optimiser's state."""
        return self.parameters * (1 + self.moments) + len(self.shapes) * bool(self.moments)


@dataclass(frozen=True)
class Collective:
    """An exchange of a group, to which each of its ranks contributes `bytes`.

    The group is `all` ranks, the ranks of each `host`, or one leader of each host; MPI does those of all, and
    messages do the others, as in `rankwise.comm.Subgroup`. One in several `pieces` runs in the background
    during the backward pass.
    """

    kind: Literal["allreduce", "allgather", "gather", "broadcast"]
    bytes: int
    among: Literal["all", "host", "leaders"] = "all"
    pieces: int = 1


@dataclass(frozen=True)
class Messages:
    """`count` messages of `bytes` each: between each worker and the server, its answers included, or of each
    rank to its neighbours."""

    to: Literal["server", "neighbours"]
    bytes: int
    count: int
    among: ClassVar = "all"
    pieces: ClassVar = 1


Exchange = Collective | Messages


@dataclass(frozen=True)
class Barrier:
    """At the end of a round no rank goes on before all have come."""


@dataclass(frozen=True)
class Server:
    """Each worker meets rank 0 alone, which serves one after the other. With `max_staleness` it holds a
    worker back that is ahead of the slowest by more exchanges."""

    max_staleness: int | None = None


@dataclass(frozen=True)
class Neighbours:
    """A rank waits for its neighbours alone. With `distances(ranks, round)` = d, e, ... rank r receives from
    the ranks r - d, r - e, ... (modulo `ranks`) in a round, counted from 0."""

    distances: Callable[[int, int], Sequence[int]]


Meeting = Barrier | Server | Neighbours


@dataclass(frozen=True)
class Traffic:
    """What ranks exchange in every step and at the end of every round, and how they meet there.

    A rank packs `payload_bytes` in a round. A server adds up `served` such payloads before it answers, and
    each rank unpacks `unpacked`. `compressed` says whether a payload takes the place of
    float32, `server_steps` whether the server's optimiser makes the step of all.
    """

    each_round: tuple[Exchange, ...] = ()
    each_step: tuple[Exchange, ...] = ()
    meeting: Meeting = Barrier()
    payload_bytes: int = 0
    served: int = 0
    unpacked: int = 1
    compressed: bool = False
    server_steps: bool = False

    @property
    def served_bytes(self) -> int:
        """What the server adds up in a round."""
        return self.served * self.payload_bytes

    @property
    def unpacked_bytes(self) -> int:
        """What each rank unpacks in a round."""
        return self.unpacked * self.payload_bytes

    @property
    def pieces(self) -> int:
        """How many pieces of a round are on their way while the backward pass runs; 1 for none."""
        return max((exchange.pieces for exchange in self.each_round), default=1)


def flat_bytes(numbers: int) -> int:
    """Of a flat array of `numbers` float32, with a flag behind them."""
    return (numbers + 1) * ITEM_BYTES


def gather_and_broadcast(size: int) -> tuple[Collective, Collective]:
    """Bytes from all ranks to the server, and as many back to each."""
    return Collective("gather", size), Collective("broadcast", size)
