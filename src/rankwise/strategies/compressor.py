"""What every compressor is: a sum of flat arrays over all ranks, and what that sends."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks
from rankwise.strategies.traffic import Collective

Flat = NDArray[np.floating]
Memory = Mapping[str, NDArray[np.floating]]


@dataclass(frozen=True)
class Reduced:
    """A sum: the `total` over all ranks, `mine` of it from this rank, whether any rank raised the flag, the
    compressor's memory after it, and the bytes of this rank's payload."""

    total: Flat
    mine: Flat
    flag: bool
    memory: Memory
    payload_bytes: int


class Compressor(ABC):
    """Adds flat arrays up over all ranks. Frozen; what changes from one sum to the next is in `memory`."""

    gathers: ClassVar[bool] = True
    """Whether by allreduce all payloads go to all ranks; otherwise they are added up on the way."""

    @abstractmethod
    def sum_by_allreduce(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        """Among all ranks without a master; all find the same total."""

    @abstractmethod
    def sum_by_master(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        """By rank 0, in rank order, which sends the total to all."""

    @abstractmethod
    def payload_bytes(self, size: int) -> int:
        """Of the payload of `size` values."""

    @abstractmethod
    def sent_by_allreduce(self, size: int) -> tuple[Collective, ...]:
        """The exchanges of `sum_by_allreduce` for `size` values."""

    @abstractmethod
    def sent_by_master(self, size: int) -> tuple[Collective, ...]:
        """The exchanges of `sum_by_master` for `size` values."""
