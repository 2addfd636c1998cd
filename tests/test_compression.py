"""What is sent in place of float32: sizes, exactness, and that nothing is lost for good."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rankwise.comm import World, run_in_threads
from rankwise.comm.half_precision import add_bf16, add_fp16, from_words, to_words
from rankwise.strategies.base import State
from rankwise.strategies.compression import INT8_CHUNK, ByPayload, parse
from rankwise.strategies.exchange import Reduction, reduction_of
from rankwise.strategies.powersgd import PowerSGD

SHAPES = ((8, 3, 3, 3), (8,), (10, 12), (10,), (3,))
SIZE = sum(math.prod(shape) for shape in SHAPES)
NAMES = ["fp16", "bf16", "int8", "topk:0.05", "topk:1", "sign", "powersgd:1", "powersgd:4", "powersgd:100"]
EXACT = ["topk:1", "powersgd:100"]

floats = st.floats(-1e4, 1e4, width=32)
vectors = st.integers(1, 200).flatmap(lambda n: arrays(np.float32, n, elements=floats))


def reduce(
    size: int, name: str, topology: str, rows: np.ndarray, times: int = 1
) -> tuple[list[np.ndarray], list[State]]:
    """Add `rows` [ranks, n] up so many times; gives the sums of all totals, and the states at the end."""
    reduction = reduction_of(topology, name, SHAPES)

    def program(world: World) -> tuple[np.ndarray, State]:
        state, added = State(), np.zeros(rows.shape[1])
        for _ in range(times):
            flat = np.append(rows[world.rank], np.float32(0))
            flag, state = reduction(flat, np.ones(size), world, state)
            assert not flag
            state = state.commit()
            added += flat[:-1]
        return added, state

    results = run_in_threads(size, program)
    return [added for added, _ in results], [state for _, state in results]


@given(vectors)
def test_sixteen_bits_round_to_nearest(values: np.ndarray) -> None:
    """fp16 and bf16 are within half a unit in the last place, and adding is adding."""
    for kind, bits, add in (("fp16", 10, add_fp16), ("bf16", 7, add_bf16)):
        words = to_words(values, kind)
        back = from_words(words, kind)
        tiny = 2.0**-25 if kind == "fp16" else 1e-38
        assert np.all(np.abs(back - values) <= np.abs(values) * 2.0 ** -(bits + 1) + tiny)
        assert np.array_equal(to_words(back, kind), words)
        total = words.copy()
        add(words, total, total)
        assert np.array_equal(from_words(total, kind), from_words(to_words(2 * back, kind), kind))


def test_sixteen_bits_of_what_is_no_number() -> None:
    """NaN stays NaN, so that it is found; what is too large becomes the largest number."""
    for kind in ("fp16", "bf16"):
        back = from_words(to_words(np.array([np.nan, 3e38, -3e38, 1e5], np.float32), kind), kind)
        assert np.isnan(back[0])
        assert np.isfinite(back[1:]).all()
        assert back[1] > 6e4
        assert back[2] < -6e4


@given(vectors)
def test_payloads_have_the_sizes_of_the_theory(values: np.ndarray) -> None:
    """Each payload has as many bytes as its formula says, and decodes to as many values."""
    n = len(values)
    sizes = {
        "fp16": 2 * n,
        "bf16": 2 * n,
        "int8": n + 4 * math.ceil(n / INT8_CHUNK),
        "topk:0.05": 8 * math.ceil(0.05 * n),
        "sign": math.ceil(n / 8) + 4,
    }
    for name, size in sizes.items():
        compressor: Any = parse(name)
        assert isinstance(compressor, ByPayload)
        payload = compressor.encode(values, np.random.default_rng(0))
        assert (payload.dtype, len(payload), compressor.payload_bytes(n)) == (np.uint8, size, size), name
        assert compressor.decode(payload, n).shape == (n,)


@pytest.mark.parametrize("rank", [1, 2])
def test_low_rank_has_the_size_of_its_factors(rank: int) -> None:
    """powersgd sends two factors a matrix, and what they would not make smaller as it is."""
    rows = np.random.default_rng(0).normal(size=(2, SIZE)).astype(np.float32)
    _, states = reduce(2, f"powersgd:{rank}", "allreduce", rows)
    expected = 4 * (rank * (8 + 27) + rank * (10 + 12) + 8 + 10 + 3)
    assert states[0].measured["compressed_bytes"] == expected
    assert PowerSGD(rank, SHAPES).payload_bytes(SIZE) == expected


def test_int8_is_right_on_average() -> None:
    """Stochastic rounding has no bias: the mean of many roundings is the value."""
    values = np.linspace(-1, 1, 101, dtype=np.float32)
    compressor: Any = parse("int8")
    rng = np.random.default_rng(0)
    mean = np.mean([compressor.decode(compressor.encode(values, rng), 101) for _ in range(4000)], axis=0)
    assert np.abs(mean - values).max() < 5 * (1 / 127) / math.sqrt(4000)


@given(
    st.lists(st.sampled_from([0, 1e-30, 1e-3, 1, 1e4]), min_size=1, max_size=3),
    st.integers(0, INT8_CHUNK - 1),
)
def test_int8_is_within_a_step_of_the_largest_of_its_chunk(magnitudes: list[float], less: int) -> None:
    """However different the magnitudes of chunks, also where the last is a short one: no value is further off
    than a 127th of its chunk's largest, a chunk of zeros comes back as such, and nothing is divided by 0."""
    values = np.random.default_rng(0).uniform(-1, 1, (len(magnitudes), INT8_CHUNK)).astype(np.float32)
    values *= np.array(magnitudes, np.float32)[:, None]
    largest = np.repeat(np.abs(values).max(axis=1), INT8_CHUNK)
    sent = values.ravel()[: values.size - less]
    if less:  # what is not sent is not the largest either
        largest[-INT8_CHUNK:] = np.abs(sent[-(INT8_CHUNK - less) :]).max()
    compressor: Any = parse("int8")
    with np.errstate(all="raise"):
        payload = compressor.encode(sent, np.random.default_rng(1))
        back = compressor.decode(payload, len(sent))
    assert (np.abs(back - sent) <= largest[: len(sent)] / 127 * (1 + 1e-5)).all()
    assert not back[largest[: len(sent)] == 0].any()


@pytest.mark.parametrize("topology", ["allreduce", "master"])
@pytest.mark.parametrize("name", EXACT)
def test_nothing_left_out_is_exact(name: str, topology: str, ranks: int) -> None:
    """topk of all and low rank of full rank are the plain sum."""
    rows = np.random.default_rng(1).normal(size=(ranks, SIZE)).astype(np.float32)
    for added in reduce(ranks, name, topology, rows)[0]:
        assert np.allclose(added, rows.sum(axis=0), atol=1e-5)


def test_low_rank_finds_a_matrix_of_low_rank() -> None:
    """If the sum is of the rank that powersgd keeps, a second time it is exact: the directions are learnt."""
    rng = np.random.default_rng(2)
    row = np.zeros(SIZE, np.float32)
    row[8 * 27 + 8 : 8 * 27 + 8 + 120] = np.outer(rng.normal(size=10), rng.normal(size=12)).ravel()
    rows = np.stack([row, 2 * row, -row])
    for added in reduce(3, "powersgd:1", "allreduce", rows, times=2)[0]:
        assert np.allclose(added, 2 * 2 * row, atol=1e-4)


@pytest.mark.parametrize("topology", ["allreduce", "master"])
@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 2**32 - 1), times=st.integers(1, 5), size=st.sampled_from([1, 2, 3]))
def test_error_feedback_keeps_the_sum(name: str, topology: str, seed: int, times: int, size: int) -> None:
    """What was added up and what all ranks still hold back is, together, all that was ever given."""
    rows = np.random.default_rng(seed).normal(size=(size, SIZE)).astype(np.float32)
    added, states = reduce(size, name, topology, rows, times)
    for other in added[1:]:
        assert np.array_equal(other, added[0])
    held_back = sum(state.memory["residual"].astype(np.float64) for state in states)
    held_back = held_back + states[0].memory.get("reply_residual", np.zeros(SIZE))
    # MPI's sum of 16 bits rounds once more at each addition, and that is nobody's residual.
    rounding = times * size * 8 * 2.0**-8 if name in ("fp16", "bf16") and topology == "allreduce" else 0
    assert np.allclose(added[0] + held_back, times * rows.sum(axis=0), atol=1e-3 + rounding)


def test_a_flag_reaches_everybody() -> None:
    """With every compression a flag that one rank raises is seen by all."""
    for topology in ("allreduce", "master"):
        for name in NAMES:
            reduction = reduction_of(topology, name, SHAPES)

            def program(world: World, reduction: Reduction = reduction) -> bool:
                flat = np.zeros(SIZE + 1, np.float32)
                flat[-1] = world.rank == 2
                return reduction(flat, np.ones(3), world, State())[0]

            assert run_in_threads(3, program) == [True] * 3


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name: str) -> None:
    """A rank that has nothing to give disturbs nobody: no division by zero, no NaN."""
    added, _ = reduce(2, name, "allreduce", np.zeros((2, SIZE), np.float32))
    assert np.array_equal(added[0], np.zeros(SIZE))
