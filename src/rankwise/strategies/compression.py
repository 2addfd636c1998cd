"""What ranks send in place of float32, with error feedback.

A compressor turns the values of one rank into a payload and back. What its payload leaves out, the
residual, is kept and added to the values of the next time (error feedback: Seide et al. 2014;
Karimireddy et al. 2019, arXiv:1901.09847), so over time all of it is sent. With n values a payload has

=================  =======================================  ==========================================
``fp16``, ``bf16``  2 n bytes                                rounded to nearest
``int8``            n + 4 ceil(n / 4096)                     stochastic rounding (Alistarh et al. 2017)
``topk:FRACTION``   8 k, k = ceil(FRACTION n)                the largest by magnitude, with their places
``sign``            ceil(n / 8) + 4                          signs and the mean magnitude
``powersgd:RANK``   4 (RANK (rows + columns) of each matrix  low rank, by one step of subspace iteration
                    + the rest)                              (Vogels et al. 2019, arXiv:1905.13727)
=================  =======================================  ==========================================
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks
from rankwise.comm.half_precision import Kind, from_words, to_words
from rankwise.errors import ConfigError, unknown_name
from rankwise.strategies.compressor import Compressor, Flat, Memory, Reduced
from rankwise.strategies.powersgd import PowerSGD
from rankwise.strategies.traffic import Collective, gather_and_broadcast

Payload = NDArray[np.uint8]

INT8_CHUNK = 4096
"""Values that share one scale."""

FORMS = ("none", "fp16", "bf16", "int8", "topk:FRACTION", "sign", "powersgd:RANK")


class ByPayload(Compressor):
    """A compressor whose payload stands for itself, so that it can be sent to one rank too."""

    @abstractmethod
    def encode(self, values: Flat, random: np.random.Generator) -> Payload:
        """The payload of the values [n]."""

    @abstractmethod
    def decode(self, payload: Payload, size: int) -> Flat:
        """The values [size] that a payload stands for."""

    def sent_by_allreduce(self, size: int) -> tuple[Collective, ...]:
        return (Collective("allgather", self.payload_bytes(size) + 1),)

    def sent_by_master(self, size: int) -> tuple[Collective, ...]:
        return gather_and_broadcast(self.payload_bytes(size) + 1)

    def sum_by_allreduce(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        """All payloads to all ranks; each adds them up in rank order."""
        payload = self.encode(values, random)
        rows = world.allgather(np.append(payload, np.uint8(flag)))
        parts = [self.decode(row[:-1], len(values)) for row in rows]
        total = parts[0].copy()
        for part in parts[1:]:
            total += part
        return Reduced(total, parts[world.rank], bool(rows[:, -1].any()), memory, len(payload))

    def sum_by_master(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        """All payloads to rank 0, which compresses the sum too, and keeps a residual of that."""
        payload = self.encode(values, random)
        mine = self.decode(payload, len(values))
        rows = world.gather(np.append(payload, np.uint8(flag)))
        reply = np.empty(len(payload) + 1, np.uint8)
        if rows is not None:
            total = memory.get("reply_residual", np.zeros_like(mine)).copy()
            for row in rows:
                total += self.decode(row[:-1], len(values))
            reply[:-1] = self.encode(total, random)
            reply[-1] = rows[:, -1].any()
            memory = {**memory, "reply_residual": total - self.decode(reply[:-1], len(values))}
        world.broadcast(reply)
        return Reduced(self.decode(reply[:-1], len(values)), mine, bool(reply[-1]), memory, len(payload))


@dataclass(frozen=True)
class Half(ByPayload):
    """Floats of 16 bits; by allreduce MPI adds them up as such."""

    kind: Kind
    gathers: ClassVar = False

    def payload_bytes(self, size: int) -> int:
        return 2 * size

    def sent_by_allreduce(self, size: int) -> tuple[Collective, ...]:
        return (Collective("allreduce", self.payload_bytes(size) + 2),)

    def encode(self, values: Flat, random: np.random.Generator) -> Payload:
        return to_words(values, self.kind).view(np.uint8)

    def decode(self, payload: Payload, size: int) -> Flat:
        return from_words(np.ascontiguousarray(payload).view(np.uint16), self.kind)

    def sum_by_allreduce(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        words = to_words(np.append(values, values.dtype.type(flag)), self.kind)
        mine = from_words(words[:-1], self.kind)
        world.allreduce(words, op="sum-fp16" if self.kind == "fp16" else "sum-bf16")
        total = from_words(words, self.kind)
        return Reduced(total[:-1], mine, bool(total[-1]), memory, words.nbytes - 2)


@dataclass(frozen=True)
class Int8(ByPayload):
    """Whole numbers from -127 to 127 times a scale, rounded by chance so that the mean is right."""

    def payload_bytes(self, size: int) -> int:
        return size + 4 * _chunks(size)

    def encode(self, values: Flat, random: np.random.Generator) -> Payload:
        padded = np.zeros((_chunks(len(values)), INT8_CHUNK), np.float32)
        padded.ravel()[: len(values)] = values
        scales = np.abs(padded).max(axis=1, initial=0) / np.float32(127)
        steps = padded / np.where(scales > 0, scales, 1)[:, None]
        whole = np.floor(steps + random.random(steps.shape, np.float32)).clip(-127, 127).astype(np.int8)
        return np.concatenate([scales.view(np.uint8), whole.ravel()[: len(values)].view(np.uint8)])

    def decode(self, payload: Payload, size: int) -> Flat:
        head = 4 * _chunks(size)
        scales = np.ascontiguousarray(payload[:head]).view(np.float32)
        return payload[head:].view(np.int8) * np.repeat(scales, INT8_CHUNK)[:size]


@dataclass(frozen=True)
class TopK(ByPayload):
    """The largest `fraction` of the values by magnitude, each with its place."""

    fraction: float

    def payload_bytes(self, size: int) -> int:
        return 8 * self._kept(size)

    def encode(self, values: Flat, random: np.random.Generator) -> Payload:
        kept = self._kept(len(values))
        places = np.argpartition(np.abs(values), len(values) - kept)[len(values) - kept :].astype(np.int32)
        places.sort()  # one order whatever numpy's partition does
        return np.concatenate([places.view(np.uint8), values[places].astype(np.float32).view(np.uint8)])

    def decode(self, payload: Payload, size: int) -> Flat:
        half = len(payload) // 2
        values = np.zeros(size, np.float32)
        places = np.ascontiguousarray(payload[:half]).view(np.int32)
        values[places] = np.ascontiguousarray(payload[half:]).view(np.float32)
        return values

    def _kept(self, size: int) -> int:
        return math.ceil(self.fraction * size)


@dataclass(frozen=True)
class Sign(ByPayload):
    """One bit per value: its sign, times the mean magnitude of all."""

    def payload_bytes(self, size: int) -> int:
        return 4 - (-size // 8)

    def encode(self, values: Flat, random: np.random.Generator) -> Payload:
        scale = (
            np.abs(values).mean(dtype=np.float32, keepdims=True) if len(values) else np.zeros(1, np.float32)
        )
        return np.concatenate([scale.astype(np.float32).view(np.uint8), np.packbits(values >= 0)])

    def decode(self, payload: Payload, size: int) -> Flat:
        scale = np.ascontiguousarray(payload[:4]).view(np.float32)[0]
        return np.asarray(np.where(np.unpackbits(payload[4:], count=size), scale, -scale))


def _chunks(size: int) -> int:
    return -(-size // INT8_CHUNK)


@cache
def parse(name: str, shapes: tuple[tuple[int, ...], ...] = ()) -> Compressor | None:
    """The compressor of this name, None for ``none``; `shapes` are those of the tensors to be sent.

    Raises ConfigError for another name, or a number out of range.
    """
    form, colon, argument = name.partition(":")
    plain: dict[str, Compressor | None] = {
        "none": None,
        "fp16": Half("fp16"),
        "bf16": Half("bf16"),
        "int8": Int8(),
        "sign": Sign(),
    }
    if not colon and form in plain:
        return plain[form]
    if form == "topk":
        return TopK(_number(name, argument, float, "a fraction above 0 and at most 1, e.g. topk:0.01", 0, 1))
    if form == "powersgd":
        rank = _number(name, argument, int, "a whole number of at least 1, e.g. powersgd:2", 0, math.inf)
        return PowerSGD(int(rank), shapes)
    raise ConfigError(unknown_name("--compress", name, FORMS))


def _number(
    name: str, text: str, kind: Callable[[str], float], expected: str, above: float, most: float
) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not above < value <= most:
        raise ConfigError(f"--compress {name}: {text!r} was given, expected {expected}")
    return value


__all__ = ["FORMS", "ByPayload", "Compressor", "Flat", "Memory", "parse"]
