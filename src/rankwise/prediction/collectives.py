"""Collective exchanges as hops: which algorithm Open MPI takes at each size and count, and what it sends.

Blocking Allreduce and Allgather are those of its module `tuned`, whose fixed decisions for commutative
operations stand in ompi 5.0, ompi/mca/coll/tuned/coll_tuned_decision_fixed.c. Gather and broadcast, which
rankwise starts in the background, are those of `libnbc` (nbc_igather.c: linear; nbc_ibcast.c: linear for up
to 4 ranks, else binomial), and so is the background Allreduce in place (nbc_iallreduce.c: a binomial tree
up and one down). The hops of each algorithm are in Thakur, Rabenseifner, Gropp 2005
(doi:10.1177/1094342005051521). Ranks of one host add up in memory that they share
(`rankwise.comm.shared_memory`), and not by MPI's Allreduce.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from rankwise.comm.shared_memory import CAPACITY, WHOLE

ITEM_BYTES = 4
"""Of a float32, in which weights and gradients are added up."""


@dataclass(frozen=True)
class Hop:
    """`count` messages one after the other, of `bytes` each; `reduced` bytes are added up after each.

    All ranks exchange with one that is `distance` places away, or with `ring` all with their next; `one_way`
    messages, as along a tree, meet none that come back. With `fan` all `count` messages go through one rank's
    port at a time, one way: their latencies overlap. In memory that all ranks have in common (`shared`) a hop
    is one meeting, before which each rank copies `bytes`.
    """

    count: float
    bytes: float
    reduced: float = 0.0
    distance: int = 1
    ring: bool = False
    fan: bool = False
    one_way: bool = False
    shared: bool = False


Hops = tuple[Hop, ...]

_Rules = tuple[tuple[int, tuple[tuple[int, str], ...]], ...]
"""Pairs of the most ranks to which a rule applies and its (fewest bytes, algorithm), in ascending order."""

_RD, _RING, _SEGMENTED, _RABENSEIFNER, _TREES = (
    "recursive doubling",
    "ring",
    "segmented ring",
    "rabenseifner",
    "nonoverlapping",
)

ALLREDUCE: _Rules = (
    (
        3,
        (
            (0, _RING),
            (8, _RD),
            (4096, _RING),
            (8192, _RD),
            (16384, _RING),
            (65536, _SEGMENTED),
            (262144, _RABENSEIFNER),
        ),
    ),
    (7, ((0, _RING), (16, _RD), (8192, _RABENSEIFNER))),
    (15, ((0, _RD), (8192, _RABENSEIFNER))),
    (31, ((0, _SEGMENTED), (64, _RD), (4096, _RABENSEIFNER))),
    (63, ((0, _SEGMENTED), (128, _RABENSEIFNER))),
    (127, ((0, _RD), (262144, _RABENSEIFNER))),
    (255, ((0, _TREES), (131072, _RD), (262144, _RABENSEIFNER))),
    (511, ((0, _TREES), (4096, _RABENSEIFNER))),
    (2047, ((0, _TREES), (2048, _RD), (16384, _RABENSEIFNER))),
    (4095, ((0, _TREES), (2048, _SEGMENTED), (4096, _RD), (16384, _RABENSEIFNER))),
    (2**31, ((0, _TREES), (2048, _SEGMENTED), (16384, _RD), (32768, _RABENSEIFNER))),
)

_BRUCK, _NEIGHBOUR, _TWO = "bruck", "neighbour exchange", "two processes"

ALLGATHER: _Rules = (
    (2, ((0, _TWO),)),
    (31, ((0, _RD),)),
    (63, ((0, _RD), (1024, _NEIGHBOUR), (65536, _RING))),
    (127, ((0, _RD), (512, _NEIGHBOUR), (65536, _RING))),
    (255, ((0, _RD), (512, _NEIGHBOUR), (131072, _RING), (524288, _NEIGHBOUR), (1048576, _RING))),
    (
        511,
        (
            (0, _RD),
            (32, _BRUCK),
            (128, _RD),
            (1024, _NEIGHBOUR),
            (131072, _RING),
            (524288, _NEIGHBOUR),
            (1048576, _RING),
        ),
    ),
    (1023, ((0, _RD), (64, _BRUCK), (256, _RD), (2048, _NEIGHBOUR))),
    (4095, ((0, _RD), (4096, _NEIGHBOUR))),
    (2**31, ((0, _BRUCK), (512, _RD), (4096, _NEIGHBOUR))),
)


def algorithm(rules: _Rules, ranks: int, size: int) -> str:
    """The name of what Open MPI takes for `ranks` ranks and `size` bytes per rank."""
    by_size = next(its for most, its in rules if ranks <= most)
    return by_size[bisect_right([start for start, _ in by_size], size) - 1][1]


def allreduce(ranks: int, size: int) -> Hops:
    """The sum of `size` bytes per rank, on all of them."""
    if ranks == 1:
        return ()
    name = algorithm(ALLREDUCE, ranks, size)
    if name in (_RING, _SEGMENTED):
        # With fewer numbers than ranks there is nothing to go around.
        return _recursive_doubling(ranks, size) if size < ranks * ITEM_BYTES else ring(ranks, size)
    if name == _RABENSEIFNER:
        return _rabenseifner(ranks, size)
    return _trees(ranks, size) if name == _TREES else _recursive_doubling(ranks, size)


def shared_sum(ranks: int, size: int) -> Hops:
    """The sum of `size` bytes per rank, on all ranks of one host, without a message; by MPI if that is more
    than the memory takes."""
    if ranks == 1 or size > CAPACITY:
        return allreduce(ranks, size)
    if ranks == 2 or size <= WHOLE:  # each reads all that the others bring
        return (Hop(1, size, (ranks - 1) * size, shared=True),)
    return (Hop(1, size, (ranks - 1) * size / ranks, shared=True), Hop(1, size, shared=True))


def sum_of_all(hosts: Sequence[int], size: int) -> Hops:
    """The sum of `size` bytes per rank, on all ranks, of which each of `hosts` [hosts] has some."""
    return shared_sum(sum(hosts), size) if len(hosts) == 1 else allreduce(sum(hosts), size)


def background_allreduce(ranks: int, size: int) -> Hops:
    """The same started in the background."""
    return () if ranks == 1 else _trees(ranks, size)


def allgather(ranks: int, size: int) -> Hops:
    """`size` bytes of every rank to all ranks."""
    if ranks == 1:
        return ()
    name = algorithm(ALLGATHER, ranks, size)
    if name == _RING or (name == _NEIGHBOUR and ranks % 2):
        return (Hop(ranks - 1, size, ring=True),)
    if name == _NEIGHBOUR:
        return (Hop(1, size), Hop(ranks / 2 - 1, 2 * size, ring=True))
    if name == _RD and ranks & (ranks - 1):
        name = _BRUCK  # as Open MPI does where ranks are no power of two
    return tuple(
        Hop(1, size * min(step, ranks - step), distance=step, ring=name == _BRUCK) for step in _powers(ranks)
    )


def gather(ranks: int, size: int) -> Hops:
    """`size` bytes of every rank to one."""
    return (Hop(ranks - 1, size, fan=True),) if ranks > 1 else ()


def broadcast(ranks: int, size: int) -> Hops:
    """`size` bytes of one rank to all others."""
    if ranks <= 4:
        return gather(ranks, size)
    return tuple(Hop(1, size, distance=step, one_way=True) for step in _powers(ranks))


def ring(ranks: int, size: int) -> Hops:
    """A sum whose pieces go around a ring twice: Open MPI's, and that of `rankwise.comm.Subgroup`."""
    piece = size / ranks
    return (Hop(ranks - 1, piece, piece, ring=True), Hop(ranks - 1, piece, ring=True)) if ranks > 1 else ()


def _recursive_doubling(ranks: int, size: int) -> Hops:
    steps = tuple(Hop(1, size, size, distance=step) for step in _powers(_power_below(ranks)))
    return (*steps, *_left_over(ranks, Hop(1, size, size), Hop(1, size)))


def _rabenseifner(ranks: int, size: int) -> Hops:
    """Halving sizes with doubling distances, and back."""
    steps = _powers(_power_below(ranks))
    down = tuple(Hop(1, size / (2 * step), size / (2 * step), distance=step) for step in steps)
    up = tuple(Hop(1, size / (2 * step), distance=step) for step in reversed(steps))
    half = Hop(1, size / 2, size / 2)
    return (*_left_over(ranks, half, Hop(1, size / 2)), *down, *up, *_left_over(ranks, Hop(1, size)))


def _trees(ranks: int, size: int) -> Hops:
    """Up a binomial tree and down again."""
    up = tuple(Hop(1, size, size, distance=step, one_way=True) for step in _powers(ranks))
    return (*up, *(Hop(1, size, distance=step, one_way=True) for step in reversed(_powers(ranks))))


def _left_over(ranks: int, *hops: Hop) -> Hops:
    """What it takes to fold the ranks above a power of two into the others."""
    return hops if ranks & (ranks - 1) else ()


def _powers(ranks: int) -> tuple[int, ...]:
    """1, 2, 4, ... below the number of ranks."""
    return tuple(1 << place for place in range((ranks - 1).bit_length()))


def _power_below(ranks: int) -> int:
    return 1 << (ranks.bit_length() - 1)
