"""``--elastic``: as many ranks as a hostfile has room for, or as were asked for where some were lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rankwise.errors import UsageError
from rankwise.launch.order import Order
from rankwise.plan import RunPlan
from rankwise.runs.folder import RunFolder
from rankwise.system.hosts import read_hostfile

LOOK_S = 5.0
"""How often to look whether there are to be other ranks; after what came to nothing twice as long, up to ten
times."""


class Elastic:
    """What ranks a run is to have by its ``--elastic``, which its launcher asks now and then."""

    def __init__(
        self, order: Order, plan: RunPlan, folder: RunFolder, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._range = plan.elastic_range
        self._hostfile = order.config.hostfile
        self._folder = folder
        self._clock = clock
        self._pause_s = LOOK_S
        self._next_s = clock() + LOOK_S

    def change(self, plan: RunPlan, *, failed: bool) -> dict[str, Any] | None:
        """The options to change in the present `plan`, None if it is not time or all is as it should be;
        `failed` says whether nothing came of the last change."""
        if self._range is None or self._clock() < self._next_s:
            return None
        self._pause_s = min(2 * self._pause_s, 10 * LOOK_S) if failed else LOOK_S
        self._next_s = self._clock() + self._pause_s
        try:
            record = self._folder.read()
            hosts = read_hostfile(self._hostfile) if self._hostfile else plan.host_list
        except UsageError:  # being written just now
            return None
        least, most = self._range
        room = sum(host.slots for host in hosts) - plan.spares if self._hostfile else plan.ranks
        wanted = min(max(room, least), most)
        there = self._folder.read_ranks()
        if record.outcome != "running" or there is None or room < least:
            return None
        if wanted == there and hosts == plan.host_list:
            return None
        change: dict[str, Any] = {"ranks": wanted}
        return change | {"hosts": ",".join(map(str, hosts))} if hosts else change
