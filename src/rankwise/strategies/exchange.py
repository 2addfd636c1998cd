"""The sum of all ranks' flat arrays: by a master or by allreduce, as they are or compressed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks
from rankwise.strategies import compression
from rankwise.strategies.base import State
from rankwise.strategies.compression import Compressor, Flat

S = TypeVar("S", bound=State)


@dataclass(frozen=True)
class Reduction:
    """How ranks add up. `compressor` is None where arrays go as they are."""

    topology: str
    compressor: Compressor | None

    @classmethod
    def of(cls, topology: str, compress: str, shapes: tuple[tuple[int, ...], ...]) -> Reduction:
        """With the compressor of this name, for arrays that are made of tensors of these shapes."""
        return cls(topology, compression.parse(compress, shapes))

    def __call__(self, flat: Flat, weights: NDArray[np.float64], world: Ranks, state: S) -> tuple[bool, S]:
        """Overwrite `flat` everywhere with the sum over all ranks of what it was.

        Its last element is a flag: returns whether any rank set it, and the state with the compressor's
        memory. A master leaves out ranks whose weight is 0.
        """
        if self.compressor is None:
            if self.topology == "master":
                return add_up_by_master(flat, weights, world), state
            world.allreduce(flat)
            return bool(flat[-1]), state
        with world.ledger.phase("pack"):
            values = flat[:-1].astype(np.float32)
            values += state.memory.get("residual", np.float32(0))
            random = np.random.default_rng([world.rank, state.rounds])
        by_master = self.topology == "master"
        add_up = self.compressor.sum_by_master if by_master else self.compressor.sum_by_allreduce
        reduced = add_up(values, bool(flat[-1]), world, state.memory, random)
        with world.ledger.phase("pack"):
            flat[:-1] = reduced.total
            memory = {**reduced.memory, "residual": values - reduced.mine}
        return reduced.flag, replace(
            state, memory=memory, measured=_measured(state, values.nbytes, reduced.payload_bytes)
        )


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
    """Overwrite `flat` everywhere with the sum, formed by rank 0 in rank order whoever arrived first.

    Ranks whose weight is 0 are left out. The last element is a flag: returns whether any rank set it.
    """
    stops = gather_sum(flat, weights, world)
    if stops is not None:
        flat[-1] = stops
    world.broadcast(flat, root=0)
    return bool(flat[-1])


def gather_sum(flat: Flat, weights: NDArray[np.float64], world: Ranks) -> bool | None:
    """The first half of it: on rank 0 the sum, and whether a flag is set; elsewhere None."""
    rows = world.gather(flat, root=0)
    if rows is None:
        return None
    with world.ledger.phase("optimizer"):
        stops = bool(rows[:, -1].any())
        if not stops:
            add_up_rows(rows, weights, out=flat)
    return stops


def add_up_rows(rows: Flat, weights: NDArray[np.float64], out: Flat) -> None:
    """The sum of `rows` [ranks, n] whose weight is not 0, added in rank order."""
    first, *rest = np.flatnonzero(weights)
    out[...] = rows[first]
    for rank in rest:
        out += rows[rank]
