"""What faults and stops cost a run, in shares of the time of the ranks that were asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.errors import Interrupted
from rankwise.plan import RunPlan
from rankwise.report import words
from rankwise.runs.record import LOSSES, Efficiency
from rankwise.training.goodput import Goodput
from rankwise.training.observer import Recovered
from rankwise.training.snapshots import Progress

from . import effort, records
from .test_stops import stopping


def test_each_second_is_lost_once() -> None:
    """Of 4 ranks over 100 s, one is lost after 40: what each cause is charged is what the formula says, and
    with the goodput it adds up to one."""
    goodput = Goodput(asked=4, size=4)
    goodput.training_begins(10)
    goodput.recovered(Recovered([2], [], 0.5, Progress(), waited_s=2.0, undone_s=3.0), 50)
    goodput.recovered(Recovered([1], [9], 0.5, Progress(), waited_s=1.0, undone_s=2.0, drops=True), 60)
    found = goodput.efficiency(110, [])
    paid = 4 * 100
    assert found["paid_rank_s"] == paid
    assert found["goodput_lost"] == {
        "lost_work": pytest.approx((1 * 3.0 + 3 * 2.0) / paid),
        "detection": pytest.approx((4 * 2.0 + 3 * 1.0) / paid),
        "repair": pytest.approx((4 * 0.5 + 3 * 0.5) / paid),
        "pauses": 0.0,
        "fewer_ranks": pytest.approx(60 / paid),
    }
    assert found["goodput"] == pytest.approx(1 - sum(Efficiency(**found).goodput_lost.values()))
    assert found["mean_recovery_s"] is None


def test_nothing_is_told_before_the_first_step() -> None:
    """A run that has not begun has no goodput, and start-up is no loss."""
    goodput = Goodput(asked=2, size=2)
    assert goodput.efficiency(5, []) == {}
    goodput.training_begins(5)
    assert goodput.efficiency(5, []) == {}
    assert goodput.efficiency(6, [])["goodput"] == 1


@given(pause_s=st.integers(0, 500), undone_s=st.integers(0, 20), start_up_s=st.integers(0, 20))
@effort.examples(20, 100)
def test_a_sitting_goes_on_from_the_one_before(pause_s: int, undone_s: int, start_up_s: int) -> None:
    """What a sitting has lost stays lost in the next one, the time between them and its start-up are a pause,
    and what was trained behind the checkpoint is lost work."""
    ran_s = 100
    at = [f"2026-01-01T{s // 3600:02}:{s // 60 % 60:02}:{s % 60:02}.000+00:00" for s in range(1000)]
    before = records.record(
        written_at=at[ran_s],
        efficiency=Efficiency(goodput=0.9, goodput_lost={"repair": 0.1}, paid_rank_s=2.0 * ran_s),
    )
    ranks = before.config["ranks"]
    goodput = Goodput.after(before, 3, at[ran_s - undone_s], began_at=at[ran_s + pause_s])
    goodput.training_begins(start_up_s)
    found = Efficiency(**goodput.efficiency(start_up_s + 10, []))  # type: ignore[arg-type]
    assert found.paid_rank_s == pytest.approx(2 * ran_s + 3 * (pause_s + start_up_s + 10))
    lost = {cause: share * found.paid_rank_s for cause, share in found.goodput_lost.items()}
    assert lost == pytest.approx(
        dict.fromkeys(LOSSES, 0.0)
        | {"repair": 20, "pauses": 3 * (pause_s + start_up_s), "lost_work": ranks * undone_s}
    )


def test_a_run_with_faults_and_stops(
    config: Callable[..., RunPlan], train_in_threads: Callable[..., Any]
) -> None:
    """A run that loses a rank and is stopped tells what each cost; one that met neither tells of nothing."""
    plan = config(ranks=3, strategy="allreduce", on_failure="continue", fault=("kill:rank=2,epoch=1,step=2",))
    with pytest.raises(Interrupted), stopping(0, 5):
        train_in_threads(plan)
    record, _, _ = train_in_threads(plan, resume=True)
    its = record.efficiency
    assert set(its.goodput_lost) == set(LOSSES)
    assert all(share >= 0 for share in its.goodput_lost.values())
    assert min(its.goodput_lost[cause] for cause in ("repair", "pauses", "fewer_ranks", "lost_work")) > 0
    assert its.goodput == pytest.approx(1 - sum(its.goodput_lost.values()))
    assert its.mean_recovery_s == record.losses[0].recovered_after_s
    assert words.goodput(its).startswith(f"goodput {its.goodput:.2%}: lost to ")
    plain, _, _ = train_in_threads(config(ranks=2), folder="plain")
    assert plain.efficiency.goodput == 1
    assert words.goodput(plain.efficiency) == ""
