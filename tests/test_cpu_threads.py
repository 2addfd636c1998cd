"""Threads for each rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from rankwise.training.cpu_threads import RankPlacement, oversubscribed, share_threads

EIGHT = frozenset(range(8))


def seats(
    count: int, cores: frozenset[int] = EIGHT, master: bool = False, quota: float | None = None
) -> list[RankPlacement]:
    return [RankPlacement("a", cores, quota, trains=not (master and rank == 0)) for rank in range(count)]


def test_auto_shares_the_cores_of_a_host() -> None:
    """Ranks that may use the same cores get equal shares of them, rounded down, at least one."""
    assert share_threads(seats(3), "auto") == [2, 2, 2]
    assert share_threads(seats(16), "auto") == [1] * 16


def test_a_master_rests_while_the_others_work() -> None:
    """A master takes no share from the workers, and may use all cores when it is its turn."""
    assert share_threads(seats(5, master=True), "auto") == [8, 2, 2, 2, 2]
    assert oversubscribed(seats(5, master=True), [8, 2, 2, 2, 2]) == []


def test_bound_ranks_keep_their_own_cores() -> None:
    """Ranks bound to cores of their own get exactly those."""
    bound = [
        RankPlacement("a", frozenset({0, 1, 2}), None, True),
        RankPlacement("a", frozenset({3}), None, True),
    ]
    assert share_threads(bound, "auto") == [3, 1]


def test_hosts_are_counted_apart() -> None:
    """Cores of the same number on two hosts are not the same cores."""
    two = [RankPlacement(host, frozenset({0, 1}), None, True) for host in "ab"]
    assert share_threads(two, "auto") == [2, 2]


def test_a_container_shares_its_quota() -> None:
    """In a container with a share of 4 CPUs on a machine of 8, two ranks get 2 threads each."""
    assert share_threads(seats(2, quota=4.0), "auto") == [2, 2]


def test_all_is_the_papers_setting_and_warned_of() -> None:
    """`all` gives every rank every core, and the warning names the numbers."""
    threads = share_threads(seats(3), "all")
    assert threads == [8, 8, 8]
    (warning,) = oversubscribed(seats(3), threads)
    assert "24" in warning
    assert "8 cores" in warning


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.frozensets(st.integers(0, 7), min_size=1), st.booleans()),
        min_size=1,
    )
)
def test_auto_never_oversubscribes_by_more_than_one_thread_a_rank(
    where: list[tuple[str, frozenset[int], bool]],
) -> None:
    """Any binding gives each rank at least one thread, and no more than the cores it may use."""
    places = [RankPlacement(host, cores, None, trains) for host, cores, trains in where]
    for seat, threads in zip(places, share_threads(places, "auto"), strict=True):
        assert 1 <= threads <= len(seat.cores)
