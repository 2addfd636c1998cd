"""Generations of ranks: the next one gets ready beside the present one, and takes over where that one stops.

It is started as the present one was, joins a world of its own, has its data and its network in memory, and
waits for its start to be the run's. The present one is asked to stop as by Ctrl-C, saves at its next
synchronisation, and leaves; what is left of the epoch is dealt to those that take over.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, RankLost, RankwiseError, UsageError, one_line
from rankwise.launch import preflight
from rankwise.launch.backoff import RestartBackoff
from rankwise.launch.elastic import Elastic
from rankwise.launch.failures import write_failure
from rankwise.launch.hosts import check
from rankwise.launch.order import Order, resumed
from rankwise.launch.plan_file import write_plan
from rankwise.launch.supervision import MpiexecResult, Started
from rankwise.plan import RunPlan, make_plan
from rankwise.program_plan import program_plan
from rankwise.runs.folder import RunFolder
from rankwise.runs.resize import ask, read_resize, tell

StartRanks = Callable[[RunPlan, str], Started]
"""Starts the ranks of a plan, which wait until the start of this name is the run's."""

Say = Callable[[str], None]

NO_ROOM_TO_TELL = "how far that is cannot be written into the run folder: is the disk full?"


@dataclass(frozen=True)
class Generation:
    """Ranks that were started to take over, the plan they have, what that was made of, and what each of its
    hosts calls itself."""

    order: Order
    plan: RunPlan
    names: dict[str, str]
    started: Started
    mark: str


class Generations:
    """The launcher's part in changes of a run's ranks. Entered as long as the run goes on: what waits when it
    ends is ended too. `restarts` are the run's, one of which is saved by ranks that take over."""

    def __init__(
        self,
        order: Order,
        plan: RunPlan,
        folder: RunFolder,
        start_ranks: StartRanks,
        say: Say,
        restarts: RestartBackoff,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._order = order
        self._plan = self._present = plan
        self._restarts = restarts
        self._clock = clock
        self._refill_at_s: float | None = None
        self._elastic = Elastic(order, plan, folder)
        self._folder = folder
        self._start_ranks = start_ranks
        self._say = say
        self._next: Generation | None = None
        self._hands_over = False

    def __enter__(self) -> Generations:
        return self

    def __exit__(self, *_: object) -> None:
        self.abandon("the run ended before")

    def look(self, present: Started) -> None:
        """See to a change that was asked for: start the next generation, or let the present one hand over to
        it once it is ready."""
        asked = read_resize(self._folder.resize)
        if self._hands_over:
            return
        if asked is None or asked.is_over:
            failed = asked is not None and asked.state != "done"
            if change := self._refill(present) or self._elastic.change(self._plan, failed=failed):
                with contextlib.suppress(UsageError):  # somebody else has just asked, or the disk is full
                    ask(self._folder.resize, change)
            return
        if self._next is None:
            if asked.state == "asked":
                self._begin(asked.given)
        elif self._next.started.is_over:
            self._give_up("the new ranks ended before they were ready")
        elif asked.state == "ready" and asked.mark == self._next.mark:
            if trouble := no_room_for_a_checkpoint(self._folder):
                self._give_up(trouble)
                return
            if not tell(self._folder.resize, "handing over"):
                self._give_up(NO_ROOM_TO_TELL)
                return
            self._hands_over = True
            present.ask_to_stop()

    def take_over(self, ending: MpiexecResult) -> Generation | None:
        """The generation that goes on now that the present one has ended, None if none is to."""
        coming = self._next
        if coming is None or not self._hands_over or ending.interrupted or self._folder.failure.exists():
            return None
        if self._folder.read().outcome not in ("interrupted", "running") or coming.started.is_over:
            return None
        self._next, self._hands_over = None, False
        self._order, self._plan = coming.order, coming.plan
        self._present, self._refill_at_s = coming.plan, None
        os.replace(self._folder.next_plan, self._folder.plan)
        self._folder.forget_failures()
        self._folder.begin(mark=coming.mark)
        return coming

    def restarted(self, plan: RunPlan) -> None:
        """All ranks are started again, as this plan says."""
        self._present, self._refill_at_s = plan, None

    def _refill(self, present: Started) -> dict[str, Any] | None:
        """The change that brings back the ranks of a run of which fewer are left than ``--min-ranks``; None
        if enough are there, or it is not time yet. Ends the present ranks if the run may not be started
        again."""
        plan, there = self._present, self._folder.read_ranks()
        if there is None or there >= plan.min_ranks or present.asked_at:
            return None
        if self._refill_at_s is None:
            left = "1 rank is" if there == 1 else f"{there} ranks are"
            few = f"{left} left, fewer than the {plan.min_ranks} of --min-ranks"
            if self._restarts.count == plan.max_restarts:
                error = RankLost(few)
                write_failure(self._folder, -1, error, error)
                present.kill()
                return None
            self._refill_at_s = self._clock() + self._restarts.after(len(self._folder.read_metrics()))
            self._say(
                f"{few}: {plan.ranks} get ready while they train "
                f"({self._restarts.count} of {plan.max_restarts} restarts)"
            )
        if self._clock() < self._refill_at_s:
            return None
        self._refill_at_s = None
        change: dict[str, Any] = {"ranks": plan.ranks, "spares": plan.spares}
        return change | {"hosts": plan.hosts} if plan.hosts else change

    def abandon(self, why: str) -> None:
        """Nothing comes of a change that is under way."""
        if self._next is not None:
            self._give_up(why)
        else:
            asked = read_resize(self._folder.resize)
            if asked is not None and asked.state == "asked":
                tell(self._folder.resize, "failed", message=why)

    def _begin(self, given: dict[str, object]) -> None:
        try:
            order, plan = resized(self._order, self._folder, given, self._plan.program)
            names = check(plan.host_list, self._folder.path)
            mark = os.urandom(8).hex()
            write_plan(self._folder, order.config, plan.with_options(out=self._folder.path), is_next=True)
            if not tell(self._folder.resize, "starting", mark=mark):
                raise UsageError(NO_ROOM_TO_TELL)
            started = self._start_ranks(plan, mark)
        except RankwiseError as error:
            self._forget_next_plan()
            tell(self._folder.resize, "refused", message=one_line(error))
            self._say(f"the run was not resized: {one_line(error)}")
            return
        self._next = Generation(order, plan, names, started, mark)
        for remark in order.remarks:
            self._say(remark)
        self._say(f"{plan.processes} ranks get ready to take over")

    def _give_up(self, why: str) -> None:
        assert self._next is not None
        self._next.started.end()
        self._next, self._hands_over = None, False
        self._forget_next_plan()
        tell(self._folder.resize, "failed", message=why)
        self._say(f"the run was not resized: {why}")

    def _forget_next_plan(self) -> None:
        with contextlib.suppress(OSError):
            self._folder.next_plan.unlink(missing_ok=True)


def no_room_for_a_checkpoint(folder: RunFolder) -> str:
    """Why the present ranks could not save what they are to hand over; empty if they can."""
    size, probe = 1, folder.checkpoints / ".room"
    for checkpoint in folder.checkpoints.glob("epoch-*"):
        with contextlib.suppress(OSError):  # it is removed just now, as a newer one is there
            size = max(size, sum(path.stat().st_size for path in checkpoint.iterdir()))
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return f"there is no room for the checkpoint that hands the run over: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)
    return ""


def resized(
    order: Order, folder: RunFolder, given: dict[str, object], program: tuple[str, ...] = ()
) -> tuple[Order, RunPlan]:
    """What a run, of a `program` if there is one, is asked for with other ranks or hosts, and its plan.
    Raises UsageError, one line, for what it cannot go on with."""
    new = resumed(replace(order, config=TrainConfig(**given), resume=folder.path), folder, folder.read())
    plan = program_plan(new.config, program) if program else make_plan(new.config, resumes=True)
    room = sum(host.slots for host in plan.host_list)
    if plan.hosts and plan.processes > room:
        raise ConfigError(
            f"--hosts {plan.hosts} have room for {room} ranks, but {plan.processes} were asked for: give "
            "them more slots, or ask for fewer ranks"
        )
    if not program:
        preflight.prepare(plan)
    return new, plan
