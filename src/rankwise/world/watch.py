"""Notices when this rank did not run though it wanted to: stopped from outside, or without a core."""

from __future__ import annotations

import time

from rankwise.ledger import Clock

LAPSE_NS = 5_000_000
"""A rank that polls and was not back after so long did not run."""


class Watch:
    """The longest lapse of this rank since the watch was made.

    Between two looks a rank either ran, which its CPU clock shows, or slept of its own will, which it
    tells; the rest is a lapse. Looks must follow each other without a gap: a rank loses its core
    mostly on its way out of a system call, and the reading of the CPU clock in a look is one.
    """

    def __init__(self, clock: Clock = time.monotonic_ns, cpu_clock: Clock = time.thread_time_ns) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._lapse_ns, self._lapse_end_ns = LAPSE_NS, 0
        self.skip()

    def skip(self) -> None:
        """What went on since the last look was no exchange, or blocked this rank where it cannot look."""
        self._seen_ns, self._seen_cpu_ns = self._clock(), self._cpu_clock()

    def look(self, asleep_ns: int = 0) -> int:
        """Look at what went on since the last time; the rank chose to sleep for so long of it. Returns the
        time."""
        seen_ns, seen_cpu_ns = self._seen_ns, self._seen_cpu_ns
        self.skip()
        absent_ns = self._seen_ns - seen_ns - asleep_ns - (self._seen_cpu_ns - seen_cpu_ns)
        if absent_ns > self._lapse_ns:
            self._lapse_ns, self._lapse_end_ns = absent_ns, self._seen_ns
        return self._seen_ns

    @property
    def lapse(self) -> tuple[int, int]:
        """Start and end of the longest lapse, in ns on the clock; zeros if there was none."""
        return (self._lapse_end_ns - self._lapse_ns, self._lapse_end_ns) if self._lapse_end_ns else (0, 0)
