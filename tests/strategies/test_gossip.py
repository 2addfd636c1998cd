"""Averaging with neighbours alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise import synchronise
from rankwise.comm import World, run_in_threads
from rankwise.errors import Interrupted
from rankwise.strategies.gossip import neighbours

from .loops import BATCH, SAMPLES, assert_alike, gradients, make, train_all

TOPOLOGIES = ["ring", "exponential", "complete"]


@given(st.sampled_from(TOPOLOGIES), st.integers(1, 40), st.integers(0, 100))
def test_mixing_is_doubly_stochastic(topology: str, ranks: int, number: int) -> None:
    """In each round who sends to whom is who receives from whom, nobody from itself, and all with the same
    number of others, so that the mean over all ranks stays."""
    pairs = [neighbours(topology, rank, ranks, number) for rank in range(ranks)]
    sent = {(rank, to) for rank, (tos, _) in enumerate(pairs) for to in tos}
    received = {(source, rank) for rank, (_, sources) in enumerate(pairs) for source in sources}
    assert sent == received
    assert all(one != other for one, other in sent)
    assert len({len(sources) for _, sources in pairs}) == 1


@given(st.integers(2, 40), st.integers(0, 100))
def test_the_exponential_graph_reaches_all(ranks: int, start: int) -> None:
    """Whatever the first round, after log2 of the ranks everybody has heard of everybody."""
    heard = [{rank} for rank in range(ranks)]
    for number in range(start, start + (ranks - 1).bit_length()):
        before = [set(known) for known in heard]
        for rank in range(ranks):
            for source in neighbours("exponential", rank, ranks, number)[1]:
                heard[rank] |= before[source]
    assert all(len(known) == ranks for known in heard)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("ranks", [2, 3, 5])  # one has nobody to gossip with
def test_all_end_with_the_mean(topology: str, ranks: int) -> None:
    """All ranks end an epoch with the mean of all, each sample is committed once, and how far they were from
    it is told: not at all where all are neighbours."""
    results = train_all(ranks, 3, strategy="gossip", topology=topology)
    assert_alike(results)
    states = [result.ranks.state for result in results]
    assert sum(state.committed for state in states) == 3 * SAMPLES
    distances = {state.measured["consensus_distance"] for state in states}
    assert len(distances) == 1
    if topology == "complete" or ranks == 2 or (topology, ranks) == ("ring", 3):
        assert distances.pop() < 1e-5
    else:
        assert distances.pop() > 1e-4


def test_the_mean_is_for_looking_only() -> None:
    """Ranks go on with weights of their own after an epoch's evaluation."""
    results = train_all(5, 1, strategy="gossip", topology="ring")
    own = [result.ranks.state.memory["weights"] for result in results]
    assert not np.array_equal(own[0], own[1])
    assert np.allclose(np.mean(own, axis=0), results[0].weights, atol=1e-6)


@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_one_rank_that_stops_stops_all(topology: str, ranks: int) -> None:
    """A wish to stop travels from neighbour to neighbour, and all stop in the same round."""

    def program(world: World) -> int:
        model, optimizer = make()
        together = synchronise(
            model, optimizer, world, samples=SAMPLES, batch_size=BATCH, strategy="gossip", topology=topology
        )
        try:
            for epoch in range(1, 20):
                for batch in together.batches(epoch):
                    gradients(model, optimizer, batch.indices)
                    world.stopping = world.stopping or (
                        together.state.rounds == 5 and world.rank == world.size - 1
                    )
                    together.step()
        except Interrupted:
            return together.state.rounds
        raise AssertionError("went on")

    assert len(set(run_in_threads(ranks, program))) == 1
