"""The sum of all ranks' flat arrays: by a master or by allreduce, as they are or compressed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks
from rankwise.strategies import compression
from rankwise.strategies.base import S, State
from rankwise.strategies.compression import Compressor, Flat
from rankwise.strategies.traffic import Collective, Traffic, flat_bytes, gather_and_broadcast

LEFT_OUT = "residual"
"""In a state's memory: what this rank's compression has left out, and adds the next time."""


@dataclass(frozen=True)
class Reduction(ABC):
    """How ranks add flat arrays up, by a `topology`."""

    topology: str
    compresses: ClassVar[bool]
    """Whether what is sent takes the place of float32."""

    @abstractmethod
    def __call__(self, flat: Flat, weights: NDArray[np.float64], world: Ranks, state: S) -> tuple[bool, S]:
        """Overwrite `flat` on every rank with the sum over all ranks.

        Its last element is a flag: returns whether any rank set it, and the state with what the sum has to
        remember. A master leaves out ranks whose weight is 0.
        """

    @abstractmethod
    def collectives(self, numbers: int) -> tuple[Collective, ...]:
        """The exchanges of a sum of arrays of `numbers` numbers."""

    @abstractmethod
    def payload_bytes(self, numbers: int) -> int:
        """What a rank packs for it."""

    @property
    @abstractmethod
    def unpacks_all(self) -> bool:
        """Whether each rank unpacks what every rank packed, and not their sum."""

    @property
    def by_master(self) -> bool:
        """Whether rank 0 adds up for all."""
        return self.topology == "master"

    def traffic(self, numbers: int, ranks: int) -> Traffic:
        """A sum of arrays of `numbers` numbers in each round, on `ranks` ranks."""
        return Traffic(
            self.collectives(numbers),
            payload_bytes=self.payload_bytes(numbers),
            served=ranks - 1 if self.by_master else 0,
            unpacked=ranks if self.unpacks_all else 1,
            compressed=self.compresses,
        )


def reduction_of(topology: str, compress: str, shapes: tuple[tuple[int, ...], ...]) -> Reduction:
    """How `topology` adds up what `compress` makes of arrays, which consist of tensors of these shapes."""
    compressor = compression.parse(compress, shapes)
    return PlainSum(topology) if compressor is None else CompressedSum(topology, compressor)


@dataclass(frozen=True)
class PlainSum(Reduction):
    """The sum of arrays as they are."""

    compresses: ClassVar = False
    unpacks_all: ClassVar = False

    def __call__(self, flat: Flat, weights: NDArray[np.float64], world: Ranks, state: S) -> tuple[bool, S]:
        if self.by_master:
            return add_up_by_master(flat, weights, world), state
        world.allreduce(flat)
        return bool(flat[-1]), state

    def collectives(self, numbers: int) -> tuple[Collective, ...]:
        size = flat_bytes(numbers)
        return gather_and_broadcast(size) if self.by_master else (Collective("allreduce", size),)

    def payload_bytes(self, numbers: int) -> int:
        return flat_bytes(numbers)


@dataclass(frozen=True)
class CompressedSum(Reduction):
    """The sum of what a compressor makes of arrays, with error feedback."""

    compressor: Compressor
    compresses: ClassVar = True

    def __call__(self, flat: Flat, weights: NDArray[np.float64], world: Ranks, state: S) -> tuple[bool, S]:
        with world.ledger.phase("pack"):
            values = flat[:-1].astype(np.float32)
            values += state.memory.get(LEFT_OUT, np.float32(0))
            random = np.random.default_rng([world.rank, state.rounds])
        add_up = self.compressor.sum_by_master if self.by_master else self.compressor.sum_by_allreduce
        reduced = add_up(values, bool(flat[-1]), world, state.memory, random)
        with world.ledger.phase("pack"):
            flat[:-1] = reduced.total
            memory = {**reduced.memory, LEFT_OUT: values - reduced.mine}
        return reduced.flag, replace(
            state, memory=memory, measured=_measured(state, values.nbytes, reduced.payload_bytes)
        )

    def collectives(self, numbers: int) -> tuple[Collective, ...]:
        its = self.compressor
        return its.sent_by_master(numbers) if self.by_master else its.sent_by_allreduce(numbers)

    def payload_bytes(self, numbers: int) -> int:
        return self.compressor.payload_bytes(numbers)

    @property
    def unpacks_all(self) -> bool:
        return self.compressor.gathers and not self.by_master


def _measured(state: State, plain_bytes: int, sent_bytes: int) -> dict[str, float]:
    plain = state.measured.get("uncompressed_bytes", 0) + plain_bytes
    sent = state.measured.get("compressed_bytes", 0) + sent_bytes
    return {
        **state.measured,
        "uncompressed_bytes": plain,
        "compressed_bytes": sent,
        "compression_ratio": plain / sent,
    }


def add_up_by_master(flat: Flat, weights: NDArray[np.float64], world: Ranks) -> bool:
    """Overwrite `flat` on every rank with the sum, which rank 0 forms in rank order, in whatever order the
    arrays arrive.

    Ranks whose weight is 0 are left out. The last element is a flag: returns whether any rank set it.
    """
    stops = gather_sum(flat, weights, world)
    if stops is not None:
        flat[-1] = stops
    world.broadcast(flat, root=0)
    return bool(flat[-1])


def gather_sum(flat: Flat, weights: NDArray[np.float64], world: Ranks) -> bool | None:
    """The first half of `add_up_by_master`: on rank 0 overwrite `flat` with the sum, and return whether a
    flag is set; elsewhere return None."""
    rows = world.gather(flat, root=0)
    if rows is None:
        return None
    with world.ledger.phase("optimizer"):
        stops = bool(rows[:, -1].any())
        add_up_rows(rows, weights, out=flat)
    return stops


def add_up_rows(rows: Flat, weights: NDArray[np.float64], out: Flat) -> None:
    """Write the sum of those `rows` [ranks, n] whose weight is not 0 to `out` [n], added in rank order."""
    first, *rest = np.flatnonzero(weights)
    out[...] = rows[first]
    for rank in rest:
        out += rows[rank]
