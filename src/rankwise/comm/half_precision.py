"""Floats of 16 bits, kept as uint16: conversion, and the sum that MPI does not know.

fp16 is IEEE's binary16; bf16 is the upper half of a float32. Both round to nearest, ties to even. torch
converts: numpy knows no bf16, and is up to 800 times slower with fp16 where numbers are tiny.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Kind = Literal["fp16", "bf16"]
Words = NDArray[np.uint16]


def to_words(values: NDArray[np.floating], kind: Kind) -> Words:
    """Round to 16 bits. What is too large becomes the largest number there is, so that a sum stays finite."""
    import torch

    return _round(torch.from_numpy(np.ascontiguousarray(values, np.float32)), kind)


def from_words(words: Words, kind: Kind) -> NDArray[np.float32]:
    """The float32 of the same value."""
    wide: NDArray[np.float32] = _widen(words, kind).numpy()
    return wide


def add_fp16(one: Words, other: Words, out: Words) -> None:
    """out = one + other, rounded; called like a numpy ufunc."""
    out[...] = _round(_widen(one, "fp16") + _widen(other, "fp16"), "fp16")


def add_bf16(one: Words, other: Words, out: Words) -> None:
    """out = one + other, rounded; called like a numpy ufunc."""
    out[...] = _round(_widen(one, "bf16") + _widen(other, "bf16"), "bf16")


def _round(wide: torch.Tensor, kind: Kind) -> Words:
    import torch

    dtype = _dtype(kind)
    largest = torch.finfo(dtype).max
    words: Words = wide.clamp(-largest, largest).to(dtype).view(torch.int16).numpy().view(np.uint16)
    return words


def _widen(words: Words, kind: Kind) -> torch.Tensor:
    import torch

    return torch.from_numpy(words.view(np.int16)).view(_dtype(kind)).to(torch.float32)


def _dtype(kind: Kind) -> Any:
    import torch

    return torch.float16 if kind == "fp16" else torch.bfloat16
