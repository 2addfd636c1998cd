"""Notices when this rank did not run though it wanted to: stopped from outside, or without a core."""

from __future__ import annotations

import time

from rankwise.ledger.phases import Clock

STALL_NS = 5_000_000
"""A rank that polls and was not back after this time did not run."""

READ_NS = 1_000_000
"""How old a reading of the CPU clock may become: it is a system call, and takes longer than all else here."""


class StallDetector:
    """The longest stall of this rank in one exchange.

    Between two looks a rank either ran, which its CPU clock shows, or slept of its own will, which it
    reports; the rest is a stall. Looks must follow each other without a gap: a rank loses its core
    mostly on its way out of a system call, and the reading of the CPU clock in a look is one.

    It looks from `begin` on.
    """

    def __init__(self, clock: Clock, cpu_clock: Clock) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._stall_ns, self._stall_end_ns = STALL_NS, 0

    def begin(self, now_ns: int, cpu_ns: int) -> None:
        """Look for stalls from a moment on, at which the clocks showed this."""
        self._seen_ns = self._read_ns = now_ns
        self._cpu_ns = cpu_ns
        self._asleep_ns = 0

    def skip(self) -> None:
        """What went on since the last look is no stall: this rank was blocked where it cannot look."""
        self.begin(self._clock(), self._cpu_clock())

    def look(self, asleep_ns: int = 0) -> int:
        """Look at what went on since the last look, `asleep_ns` of which the rank chose to sleep. Returns the
        time in ns."""
        now_ns = self._clock()
        if now_ns - self._read_ns > READ_NS:
            self.judge(now_ns, self._cpu_clock(), asleep_ns)
        else:
            self._asleep_ns += asleep_ns
            self._seen_ns = now_ns
        return now_ns

    def judge(self, now_ns: int, cpu_ns: int, asleep_ns: int = 0) -> None:
        """The same, at a moment at which the clocks showed this."""
        asleep_ns += self._asleep_ns
        absent_ns = now_ns - self._read_ns - asleep_ns - (cpu_ns - self._cpu_ns)
        # What was absent before the last look was too short to be a stall.
        stall_ns = min(absent_ns, now_ns - self._seen_ns)
        if stall_ns > self._stall_ns:
            self._stall_ns, self._stall_end_ns = stall_ns, now_ns
        self.begin(now_ns, cpu_ns)

    @property
    def stall(self) -> tuple[int, int]:
        """Start and end of the longest stall, in ns on the clock; zeros if there was none."""
        return (self._stall_end_ns - self._stall_ns, self._stall_end_ns) if self._stall_end_ns else (0, 0)


class _NoStalls(StallDetector):
    def skip(self) -> None:
        pass

    def look(self, asleep_ns: int = 0) -> int:
        return self._clock()


NO_STALLS: StallDetector = _NoStalls(time.monotonic_ns, time.thread_time_ns)
"""Looks for none: for exchanges that no log holds."""
