"""Finds ranks that hang, and ends them, so that the others need not wait for ever.

In every rank a thread writes twice per second into a small shared file what its main thread is at and since
when, and reads what the other ranks of its host have written. A rank that tells nothing is looked at from
outside. Which of them hang and which are slow is for `hangs` to say. One that hangs cannot be reasoned with:
it gets a SIGKILL, and is then a lost rank like any other. A process is watched by all other ranks of its
host, and by no others.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from rankwise.ledger.phases import Ledger
from rankwise.runs.folder import RunFolder
from rankwise.survival.beats import Beat, Beats, clock_number
from rankwise.survival.hangs import WAITING, Hang, Limits, Rest, hang, rest
from rankwise.system import machine
from rankwise.system.activity import RUNNING, Activity, look, threads_of

LOOK_S = 0.5

QUIET_LOOKS = 2
"""After so many looks in the same phase, or without having told anything, a rank is looked at closely."""


class Watchdog:
    """Watches the other ranks of this host while it is entered, through a file in the run folder.

    A rank that hangs for longer than the `limits` allow is ended, and last words in the folder say why; that
    of a step counts once `steps_begin`. Raises StorageError if the file cannot be written.
    """

    def __init__(self, folder: RunFolder, *, rank: int, ranks: int, ledger: Ledger, limits: Limits) -> None:
        self._beats = Beats(folder.beats, ranks)
        self._folder = folder
        self._rank = rank
        self._ledger = ledger
        self._limits = replace(limits, step_s=math.inf)
        self._step_s = limits.step_s
        self._clock = clock_number()
        self._started = machine.start_ticks(os.getpid()) or 0
        self._at_home = threads_of(os.getpid())  # MPI's, which wait for events all the time
        self._rests: dict[int, Rest | None] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._tell()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._beats.forget(self._rank)

    def steps_begin(self) -> None:
        """This rank is built. What it reads and builds before, as a step's phases are named, is no step; and
        threads that libraries have begun by now serve them."""
        self._at_home = threads_of(os.getpid())
        self._limits = replace(self._limits, step_s=self._step_s)

    def forget(self, ranks: Sequence[int]) -> None:
        """These ranks are gone: stop watching them."""
        for rank in ranks:
            self._beats.forget(rank)

    def _watch(self) -> None:
        looked_ns = awake_ns = time.monotonic_ns()
        while not self._over.wait(LOOK_S):
            self._tell()
            now_ns = time.monotonic_ns()
            if now_ns - looked_ns > 4 * LOOK_S * 1e9:
                # After a pause of this process, or of the whole machine, all ranks have all their time again.
                awake_ns = now_ns
                self._rests.clear()
            self._look(now_ns, awake_ns)
            looked_ns = now_ns

    def _tell(self) -> None:
        now_ns, since_ns, phase = time.monotonic_ns(), self._ledger.mark_ns, self._ledger.running
        me, watcher = os.getpid(), self._thread.native_id or 0
        activity = None
        if math.isfinite(self._limits.hang_s) and _is_quiet(since_ns, now_ns):
            activity = look(me, apart_from=watcher, at_home=self._at_home)
        beat = Beat(me, self._started, self._clock, watcher, now_ns, since_ns, phase, activity or RUNNING)
        self._beats.tell(self._rank, beat)

    def _look(self, now_ns: int, awake_ns: int) -> None:
        beats = self._beats.of_clock(self._clock)
        for rank, beat in beats.items():
            if rank == self._rank:
                continue
            activity = self._activity(beat, now_ns)
            if activity is None:
                self._beats.forget(rank)  # it has ended by itself, and its number may be another's by now
                continue
            before = self._rests.get(rank)
            self._rests[rank] = at_rest = rest(before, activity, phase_ns=beat.since_ns, now_ns=now_ns)
            found = hang(
                beat.phase,
                (now_ns - max(beat.since_ns, awake_ns)) / 1e9,
                activity.doing,
                (now_ns - at_rest.since_ns) / 1e9 if at_rest else 0.0,
                waiting=[other for other, its in beats.items() if other != rank and its.phase in WAITING],
                limits=self._limits,
            )
            if found:
                self._end(rank, beat, found)

    def _activity(self, beat: Beat, now_ns: int) -> Activity | None:
        """What a rank's process is doing, by what it has told, or if that is long ago by what others can see;
        None if it has ended."""
        if not _is_quiet(beat.told_ns, now_ns):
            return beat.activity
        return look(beat.pid, apart_from=beat.watcher) if beat.is_live else None

    def _end(self, rank: int, beat: Beat, found: Hang) -> None:
        self._beats.forget(rank)
        if beat.is_live:
            self._folder.leave_words(rank, "hang", found.why, silent_s=found.seconds)
            with suppress(ProcessLookupError):
                os.kill(beat.pid, signal.SIGKILL)


def _is_quiet(since_ns: int, now_ns: int) -> bool:
    return now_ns - since_ns > QUIET_LOOKS * LOOK_S * 1e9
