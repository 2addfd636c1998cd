"""Floats of 16 bits, kept as uint16: conversion, and the sum that MPI does not know.

fp16 is IEEE's binary16; bf16 is the upper half of a float32. Both round to nearest, ties to even.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["fp16", "bf16"]
Words = NDArray[np.uint16]

_LARGEST = {"fp16": np.float32(65504.0), "bf16": np.float32(3.3895314e38)}


def to_words(values: NDArray[np.floating], kind: Kind) -> Words:
    """Round to 16 bits. What is too large becomes the largest number there is, so that a sum stays finite."""
    wide = np.clip(values.astype(np.float32, copy=False), -_LARGEST[kind], _LARGEST[kind])
    if kind == "fp16":
        return wide.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(wide), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_words(words: Words, kind: Kind) -> NDArray[np.float32]:
    """The float32 of the same value."""
    if kind == "fp16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << np.uint32(16)).view(np.float32)


def add_fp16(one: Words, other: Words, out: Words) -> None:
    """out = one + other, rounded; called like a numpy ufunc."""
    out[...] = to_words(from_words(one, "fp16") + from_words(other, "fp16"), "fp16")


def add_bf16(one: Words, other: Words, out: Words) -> None:
    """out = one + other, rounded; called like a numpy ufunc."""
    out[...] = to_words(from_words(one, "bf16") + from_words(other, "bf16"), "bf16")
