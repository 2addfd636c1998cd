"""Finds ranks that hang, and ends them, so that the others need not wait for ever.

In every rank a thread writes twice per second into a small shared file what its main thread is doing and
since when, and reads what the other ranks of its host have written. A process that is stopped writes nothing;
one whose main thread computes without an end writes the same again. Neither can be reasoned with: it gets a
SIGKILL, and is then a lost rank like any other. A process is watched by all other ranks of its host, and by
no others.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import StorageError
from rankwise.ledger.phases import PHASES, Ledger
from rankwise.runs.folder import RunFolder
from rankwise.system import machine

LOOK_S = 0.5

PATIENT = ("startup", "data", "transfer", "wait", "checkpoint", "recovery")
"""Phases that may take long through no fault of the rank: it waits for a slow disk, or for another rank."""

_ROW = np.dtype([(name, "i8") for name in ("pid", "started", "clock", "told_ns", "since_ns", "phase")])


class Watchdog:
    """Watches the other ranks of this host while it is entered, through a file in the run folder.

    A rank may give no sign of life for `timeout_s` seconds; then it is ended, and last words in the folder
    say why. Raises StorageError if the file cannot be written.
    """

    def __init__(self, folder: RunFolder, *, rank: int, ranks: int, ledger: Ledger, timeout_s: float) -> None:
        path = folder.beats
        try:
            with path.open("ab") as file:
                file.truncate(ranks * _ROW.itemsize)
            self._rows: NDArray[np.void] = np.memmap(path, _ROW, "r+", shape=(ranks,)).view(np.ndarray)
        except (OSError, ValueError) as error:
            raise StorageError(f"cannot write {path}: {error}") from error
        self._folder = folder
        self._rank = rank
        self._ledger = ledger
        self._timeout_ns = timeout_s * 1e9
        self._clock = zlib.crc32(machine.clock_name().encode())
        self._started = machine.start_ticks(os.getpid()) or 0
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
        self._rows[self._rank]["pid"] = 0

    def forget(self, ranks: Sequence[int]) -> None:
        """These ranks are gone: stop watching them."""
        for rank in ranks:
            self._rows[rank]["pid"] = 0

    def _watch(self) -> None:
        looked_ns = awake_ns = time.monotonic_ns()
        while not self._over.wait(LOOK_S):
            self._tell()
            now_ns = time.monotonic_ns()
            if now_ns - looked_ns > 4 * LOOK_S * 1e9:
                # After a pause of this process, or of the whole machine, all ranks have all their time again.
                awake_ns = now_ns
            self._look(now_ns, awake_ns)
            looked_ns = now_ns

    def _tell(self) -> None:
        ledger = self._ledger
        self._rows[self._rank] = (
            os.getpid(),
            self._started,
            self._clock,
            time.monotonic_ns(),
            ledger.mark_ns,
            PHASES.index(ledger.running),
        )

    def _look(self, now_ns: int, awake_ns: int) -> None:
        rows = self._rows.copy()
        for rank, row in enumerate(rows):
            if rank == self._rank or not row["pid"] or row["clock"] != self._clock:
                continue
            phase = PHASES[row["phase"]]
            silent_ns = now_ns - max(row["told_ns"], awake_ns)
            if silent_ns <= self._timeout_ns:
                silent_ns = 0 if phase in PATIENT else now_ns - max(row["since_ns"], awake_ns)
            if silent_ns > self._timeout_ns:
                self._end(rank, row, phase, silent_ns / 1e9, rows)

    def _end(self, rank: int, row: np.void, phase: str, silent_s: float, rows: NDArray[np.void]) -> None:
        pid = int(row["pid"])
        self._rows[rank]["pid"] = 0
        if machine.start_ticks(pid) != row["started"]:
            return  # it has ended by itself, and the number may be another's by now
        waiting = [
            str(other)
            for other, its in enumerate(rows)
            if other != rank and its["pid"] and PHASES[its["phase"]] in ("transfer", "wait")
        ]
        who = f"; waiting for it: rank {', '.join(waiting)}" if waiting else ""
        message = f"no sign of life for {silent_s:.0f} s, in {phase}{who}"
        self._folder.leave_words(rank, "hang", message, silent_s=silent_s)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
