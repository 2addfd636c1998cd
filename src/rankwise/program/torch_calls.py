"""What a PyTorch program does in `torch.distributed`, in the log of its calls: functions of its module are
replaced when the program itself imports it, and act once a process group is there."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from rankwise.ledger.call_log import Kind
from rankwise.program.log import ENTERED_AT, PUT_MESSAGE, SITE_AT, SIZE, ThreadLog
from rankwise.program.places import OURS, Places
from rankwise.program.wrappers import Method, Seen, frame_of, named, now, thread

NAME = "torch.distributed.distributed_c10d"

BY_KIND = {
    Kind.COLLECTIVE: """
        all_reduce broadcast reduce all_gather all_gather_into_tensor gather scatter reduce_scatter
        reduce_scatter_tensor all_to_all all_to_all_single barrier monitored_barrier all_gather_object
        broadcast_object_list gather_object scatter_object_list new_group""",
    Kind.SEND: "send send_object_list",
    Kind.RECEIVE: "recv recv_object_list",
    Kind.POST_SEND: "isend",
    Kind.POST_RECEIVE: "irecv",
}

FIRST_NUMBER = 1_000_000
"""Of the groups with the same members: apart from those of mpi4py's communicators."""

MOST_OPEN = 10_000
"""Exchanges in the background that may be waited for; older ones are forgotten."""

_WAIT, _FAILED = int(Kind.WAIT), int(Kind.FAILED)


class TorchCalls:
    """The calls of this process; `has_begun` is told when a process group is there, `ends` before it goes."""

    def __init__(
        self, seen: Seen, rank: int, has_begun: Callable[[Any], None], ends: Callable[[], None]
    ) -> None:
        self.seen = seen
        self._rank = rank
        self._has_begun, self._ends = has_begun, ends
        self._replaced: list[tuple[Any, str, Any]] = []
        self._comms: dict[Any, tuple[int, list[int]]] = {}
        self._made: Counter[tuple[int, ...]] = Counter()
        self._open: dict[int, tuple[Any, int, bool]] = {}
        self._module: Any = None

    def patch(self, module: ModuleType) -> None:
        """Replace the functions of `torch.distributed`, which is loaded or about to be."""
        if not hasattr(module, "all_reduce"):
            return  # a torch that was built without it
        self._module = module
        for kind, names in BY_KIND.items():
            for name in names.split():
                self._replace(name, partial(self._logged, name=name, kind=kind))
        self._replace("init_process_group", self._beginning)
        self._replace("destroy_process_group", self._ending)
        self._set(module.Work, "wait", self._waiting(module.Work.wait))

    def undo(self) -> None:
        """Everything as it was."""
        while self._replaced:
            owner, name, before = self._replaced.pop()
            setattr(owner, name, before)

    def _replace(self, name: str, make: Callable[[Method], Method]) -> None:
        before = getattr(self._module, name, None)
        if before is None:
            return  # of another torch
        new = make(before)
        for owner in (self._module, sys.modules.get("torch.distributed")):
            if owner is not None and getattr(owner, name, None) is before:
                self._set(owner, name, new)
        outer = sys.modules.get("torch.distributed")
        if outer is not None and (outer, name, before) not in self._replaced:
            self._replaced.append((outer, name, before))  # which is about to take it from the module

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self._replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def of_thread(self) -> ThreadLog:
        """The log of the running thread."""
        log = self.seen.log
        return log.main if thread() == log.thread else log.of_thread()

    def comm_of(self, group: Any) -> tuple[int, list[int]]:
        """The number of a group among this rank's communicators, and its members; -1 if this rank is none."""
        module = self._module
        group = module._get_default_group() if group is None else group
        known = self._comms.get(group)
        if known is None:
            try:
                members = list(module.get_process_group_ranks(group))
            except (KeyError, TypeError, RuntimeError):
                return -1, []
            name = tuple(sorted(members))
            number = FIRST_NUMBER + self._made[name]
            self._made[name] += 1
            known = self._comms[group] = self.seen.log.add_comm(members, members, number), members
        return known

    def _is_off(self, log: ThreadLog) -> bool:
        return log.busy or self.seen.off or not self._module.is_initialized()

    def _logged(self, method: Method, name: str, kind: Kind) -> Method:
        names = list(inspect.signature(method).parameters)
        find = Places(self.seen.log, self.seen.numbers, name).find
        posts = {Kind.COLLECTIVE: Kind.POST_COLLECTIVE}.get(kind, kind)
        to = "dst" if "dst" in names else "src"
        of, is_message = f"group_{to}", kind is not Kind.COLLECTIVE
        has_root = not is_message and to in names
        receives = kind in (Kind.RECEIVE, Kind.POST_RECEIVE)

        def call(*args: Any, **kwargs: Any) -> Any:
            log = self.of_thread()
            if self._is_off(log):
                return method(*args, **kwargs)
            site = find(frame_of(1))
            if site == OURS:
                return method(*args, **kwargs)
            given = dict(zip(names, args, strict=False)) | kwargs
            comm, members = self.comm_of(None if name == "new_group" else given.get("group"))
            if comm < 0:
                return method(*args, **kwargs)
            peer = given.get(of) if is_message or has_root else -1
            if peer is None:
                other = given.get(to)
                peer = _place(members, 0 if has_root and other is None else other)
            tag = int(given.get("tag", 0)) if is_message else -1
            row = Row(log, site)
            try:
                result = method(*args, **kwargs)
            except BaseException:
                row.put(_FAILED)
                raise
            source = peer if receives else -1
            if kind is Kind.RECEIVE and isinstance(result, int):
                source = _place(members, result)
            in_background = isinstance(result, self._module.Work)
            its = posts if in_background else kind
            size = _bytes(args[0] if args else next(iter(kwargs.values()), None))
            number = row.put(int(its), comm=comm, peer=int(peer), tag=tag, bytes=size, source=source)
            if in_background:
                self.keep_open(result, number, any_source=receives and source < 0)
            return result

        return named(call, method)

    def keep_open(self, work: Any, row: int, *, any_source: bool = False) -> None:
        """An exchange goes on in the background, which `row` began."""
        if len(self._open) >= MOST_OPEN:
            self._open.pop(next(iter(self._open)))
        self._open[id(work)] = work, row, any_source  # which keeps its id

    def _waiting(self, method: Method) -> Method:
        find = Places(self.seen.log, self.seen.numbers, "wait").find

        def call(work: Any, *args: Any, **kwargs: Any) -> Any:
            log = self.of_thread()
            _, begun, any_source = self._open.pop(id(work), (None, -1, False))
            if begun < 0 or self._is_off(log):
                return method(work, *args, **kwargs)
            row = Row(log, find(frame_of(1)))
            try:
                result = method(work, *args, **kwargs)
            except BaseException:
                row.put(_FAILED)
                raise
            row.put(_WAIT)
            row.part(begun, source=work._source_rank() if any_source else -1)
            return result

        return named(call, method)

    def wait_for(self, works: list[tuple[Any, int]], site: int) -> None:
        """Wait for exchanges that were begun in these rows, as one call."""
        row = Row(self.of_thread(), site)
        for work, _ in works:
            work.wait()
        row.put(_WAIT)
        for _, begun in works:
            row.part(begun)

    def _beginning(self, method: Method) -> Method:
        def call(*args: Any, **kwargs: Any) -> Any:
            log = self.of_thread()
            if self.seen.off or log.busy:
                return method(*args, **kwargs)
            began_ns = now()
            result = method(*args, **kwargs)
            log.note(int(Kind.STARTUP), -1, began_ns, now())
            began_ns = now()
            log.busy = True
            try:
                if self._module.get_rank() == self._rank:
                    self._has_begun(self._module)
                else:
                    self.seen.off = True  # who is who is not known: nothing can be told
            finally:
                log.busy = False
            log.note(int(Kind.INSTRUMENT), -1, began_ns, now())
            return result

        return named(call, method)

    def _ending(self, method: Method) -> Method:
        def call(group: Any = None) -> Any:
            log = self.of_thread()
            if group is None and not self._is_off(log):
                began_ns = now()
                log.busy = True
                self._ends()
                log.busy = False
                log.note(int(Kind.INSTRUMENT), -1, began_ns, now())
                self._comms.clear()
            return method(group)

        return named(call, method)


class Row:
    """A call of one thread, from now until `put`; what it calls in turn is not logged."""

    def __init__(self, log: ThreadLog, site: int) -> None:
        self._log, self._site = log, site
        log.polled = None
        log.busy = True
        log.last[SITE_AT] = site
        log.last[ENTERED_AT] = self._entered_ns = now()
        self._left_ns = 0

    def put(self, kind: int, *, comm: int = -1, peer: int = -1, tag: int = -1, **more: int) -> int:
        """It is over; returns the number of its row."""
        log, self._left_ns = self._log, now()
        number, at = log.count, log.at
        if at >= log.end:
            at = log.grow()
            number = log.count
        log.at = at + SIZE
        source = more.get("source", -1)
        message = peer, tag, more.get("bytes", 0), source, tag if source >= 0 else -1
        PUT_MESSAGE(log.buffer, at, kind, self._site, comm, self._entered_ns, self._left_ns, *message)
        log.busy = False
        return number

    def part(self, begun: int, source: int = -1) -> None:
        """It has brought what row `begun` began to its end."""
        self._log.part(begun, self._left_ns, source)


def _place(members: list[int], rank: int | None) -> int:
    return members.index(rank) if rank in members else -1


def _bytes(tensor: Any) -> int:
    while isinstance(tensor, list | tuple) and tensor:
        tensor = tensor[0]
    size = getattr(tensor, "nbytes", 0)
    return size if isinstance(size, int) else 0
