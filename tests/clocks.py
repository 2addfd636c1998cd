"""A rank whose monotonic clock is OFFSET_S ahead of rank 0's: is that found, and who waits for whom as well?

clocks.py OFFSET_S
"""

from __future__ import annotations

import sys
import time

import numpy as np

from rankwise.comm import join

world = join()
ahead_ns = round(float(sys.argv[1]) * 1e9)
offsets = world.allgather_object(ahead_ns)
assert len(set(offsets)) == world.size, offsets
slept_s = 0.0
for _ in range(2):
    if world.rank == 1:
        began_s = time.monotonic()
        time.sleep(1)
        slept_s += time.monotonic() - began_s  # more than a second where cores are busy
    world.allreduce(np.zeros(1000))
world.reconcile()
now_ns = np.array([time.monotonic_ns()])
error_ns = abs(int((world.since_start(now_ns) + world.exchange_log.origin_ns - (now_ns - ahead_ns))[0]))
assert 0 < world.clock_error_ns < 0.1e9, world.clock_error_ns
assert error_ns <= world.clock_error_ns, (error_ns, world.clock_error_ns)
totals = world.ledger.close()
assert sum(totals.phases_ns.values()) == totals.wall_ns
assert sum(world.exchange_log.wait_on_ns.values()) == totals.phases_ns["wait"]
slept_ns = 1e9 * world.allgather_object(slept_s)[1]
if world.rank != 1:
    assert abs(world.exchange_log.wait_on_ns[1] - slept_ns) < 0.5e9, (slept_ns, world.exchange_log.wait_on_ns)
assert world.exchange_log.violations == 0
print(f"{world.rank} {error_ns} {world.clock_error_ns}")
