"""Sums of matrices by a few directions that all ranks share (PowerSGD)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from rankwise.comm import Ranks
from rankwise.strategies.compressor import Compressor, Flat, Memory, Reduced
from rankwise.strategies.traffic import ITEM_BYTES, Collective, gather_and_broadcast


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """A sum of matrices by its projection on `rank` directions that all ranks share, P (M^T P)^T.

    `shapes` are those of the tensors that the values are made of. A tensor of two dimensions and more is a
    matrix of its first one and the rest; one that its factors would not make smaller goes as it is.
    """

    rank: int
    shapes: tuple[tuple[int, ...], ...] = ()
    gathers: ClassVar = False

    def payload_bytes(self, size: int) -> int:
        return sum(self._numbers(size)) * ITEM_BYTES

    def sent_by_allreduce(self, size: int) -> tuple[Collective, ...]:
        return tuple(Collective("allreduce", its) for its in self._sums(size))

    def sent_by_master(self, size: int) -> tuple[Collective, ...]:
        return tuple(exchange for its in self._sums(size) for exchange in gather_and_broadcast(its))

    def sum_by_allreduce(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        return self._sum(values, flag, memory, world.allreduce)

    def sum_by_master(
        self, values: Flat, flag: bool, world: Ranks, memory: Memory, random: np.random.Generator
    ) -> Reduced:
        def add_up(buffer: Flat) -> None:
            rows = world.gather(buffer)
            if rows is not None:
                buffer[...] = rows[0]
                for row in rows[1:]:
                    buffer += row
            world.broadcast(buffer)

        return self._sum(values, flag, memory, add_up)

    def _sum(self, values: Flat, flag: bool, memory: Memory, add_up: Callable[[Flat], None]) -> Reduced:
        matrices, rest = self._split(values)
        directions = self._directions(matrices, memory)
        projected = [_product(matrix, q) for matrix, q in zip(matrices, directions, strict=True)]
        first = np.concatenate([*(p.ravel() for p in projected), values[rest], [values.dtype.type(flag)]])
        add_up(first)
        left = [_orthonormal(p) for p in _cut(first, [p.shape for p in projected])]
        right = [_product(matrix.T, p) for matrix, p in zip(matrices, left, strict=True)]
        second = np.concatenate([q.ravel() for q in right]) if right else first[:0].copy()
        mine = self._join(_products(left, right), values[rest], rest, values)
        if right:
            add_up(second)
        right = _cut(second, [q.shape for q in right])
        rest_total = first[len(first) - 1 - rest.sum() : -1]
        total = self._join(_products(left, right), rest_total, rest, values)
        sizes = first.nbytes + second.nbytes - first.itemsize
        return Reduced(total, mine, bool(first[-1]), {**memory, "directions": second}, sizes)

    def _sums(self, size: int) -> list[int]:
        """Bytes of each sum: the left factors, what goes as it is and a flag; then the right factors."""
        first, second = self._numbers(size)
        return [(first + 1) * ITEM_BYTES] + [second * ITEM_BYTES] * bool(second)

    def _numbers(self, size: int) -> tuple[int, int]:
        """Numbers in the left factors and what goes as it is, and in the right factors."""
        left = right = factored = 0
        for rows, columns in filter(None, map(self._matrix, self.shapes)):
            left, right, factored = (
                left + self.rank * rows,
                right + self.rank * columns,
                factored + rows * columns,
            )
        return left + size - factored, right

    def _matrix(self, shape: tuple[int, ...]) -> tuple[int, int] | None:
        """Rows and columns of a tensor that its factors make smaller; None for another."""
        size, rows = math.prod(shape), shape[0] if shape else 1
        columns = size // max(rows, 1)
        return (rows, columns) if self.rank * (rows + columns) < size else None

    def _split(self, values: Flat) -> tuple[list[Flat], NDArray[np.bool_]]:
        """The matrices, and where the values stand that go as they are."""
        matrices, rest, start = [], np.ones(len(values), bool), 0
        for shape in self.shapes:
            end = start + math.prod(shape)
            if matrix := self._matrix(shape):
                matrices.append(values[start:end].reshape(matrix))
                rest[start:end] = False
            start = end
        return matrices, rest

    def _directions(self, matrices: list[Flat], memory: Memory) -> list[Flat]:
        shapes = [(matrix.shape[1], self.rank) for matrix in matrices]
        stored = memory.get("directions")
        if stored is None:
            size = sum(math.prod(shape) for shape in shapes)
            stored = np.random.default_rng(0).standard_normal(size).astype(np.float32)
        return _cut(stored, shapes)

    def _join(self, matrices: list[Flat], others: Flat, rest: NDArray[np.bool_], like: Flat) -> Flat:
        joined = np.empty_like(like)
        joined[rest] = others
        if matrices:
            joined[~rest] = np.concatenate([matrix.ravel() for matrix in matrices])
        return joined


def _product(one: Flat, other: Flat) -> Flat:
    """Their matrix product, by torch: numpy's would take all cores, whatever this rank's share of them is."""
    import torch

    return (torch.from_numpy(one) @ torch.from_numpy(other)).numpy()


def _products(left: list[Flat], right: list[Flat]) -> list[Flat]:
    return [_product(p, q.T) for p, q in zip(left, right, strict=True)]


def _orthonormal(columns: Flat) -> Flat:
    import torch

    basis: Flat = torch.linalg.qr(torch.from_numpy(columns))[0].contiguous().numpy()
    return basis


def _cut(flat: Flat, shapes: Sequence[tuple[int, ...]]) -> list[Flat]:
    ends = np.cumsum([math.prod(shape) for shape in shapes], dtype=int)
    return [
        flat[end - math.prod(shape) : end].reshape(shape) for end, shape in zip(ends, shapes, strict=True)
    ]
