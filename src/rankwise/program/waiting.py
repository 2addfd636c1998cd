"""What stands in the place of the methods that bring requests to their end, start them again, or look for a
message."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rankwise.ledger.call_log import Kind
from rankwise.program.calls import parameters
from rankwise.program.log import ENTERED_AT, PUT, PUT_ALL, PUT_MESSAGE, SITE_AT, SIZE, Polls, ThreadLog
from rankwise.program.places import OURS, Places
from rankwise.program.wrappers import Method, Seen, bytes_of, frame_of, named, now, thread, with_status

_NOT_OPEN = (-1, False)
_UNKNOWN = (Kind.PLAIN, -1, -1, -1, 0)


def waiting(seen: Seen, method: Method, name: str) -> Method:
    """A wait for one request or several, or a test; each request that it ends is a part of it."""
    how = name[4:]  # "", all, any or some
    tests = name[0] in "Tt"
    find, main, main_thread = Places(seen.log, seen.numbers, name).find, seen.log.main, seen.log.thread
    kind = int(Kind.WAIT)

    def call(*args: Any, **kwargs: Any) -> Any:
        log = main if thread() == main_thread else seen.log.of_thread()
        if log.busy or seen.off:
            return method(*args, **kwargs)
        site = find(frame_of(1))
        if site == OURS:
            return method(*args, **kwargs)
        log.busy = True
        given = (args[1] if len(args) > 1 else kwargs.get("requests")) if how else args[:1]
        requests = given if isinstance(given, list | tuple) else ()
        handles = [getattr(request, "handle", 0) for request in requests]
        open_requests = seen.requests.open
        statuses: Any = None
        if any(open_requests.get(handle, _NOT_OPEN)[1] for handle in handles):
            args, kwargs, statuses = _with_statuses(log, seen.mpi, args, kwargs, how)
        row = Row(log, kind, site, polls=tests)
        try:
            result = method(*args, **kwargs)
        except BaseException:
            row.fill()
            log.busy = False
            raise
        ended = _ended(result, how, tests=tests, count=len(requests))
        left = row.fill(found=bool(ended) or not tests)
        for place, index in enumerate(ended):
            begun, waits_for_any = open_requests.pop(handles[index], _NOT_OPEN)
            if begun >= 0:
                status = _status(statuses, how, index, place) if waits_for_any else None
                _part(log, begun, status, left)
        log.busy = False
        return result

    return named(call, method)


def waiting_for_one(seen: Seen, method: Method, name: str) -> Method:
    """A wait for one request: what `waiting` does, in less time."""
    find, main, main_thread = Places(seen.log, seen.numbers, name).find, seen.log.main, seen.log.thread
    kind, end_of, failed = int(Kind.WAIT), seen.open.pop, int(Kind.FAILED)

    def call(*args: Any, **kwargs: Any) -> Any:
        log = main if thread() == main_thread else seen.log.of_thread()
        if log.busy or seen.off or not args:
            return method(*args, **kwargs)
        site = find(frame_of(1))
        if site == OURS:
            return method(*args, **kwargs)
        begun, waits_for_any = end_of(args[0].handle, _NOT_OPEN)
        status: Any = None
        if waits_for_any:
            args, kwargs, status = with_status(log, seen.mpi, args, kwargs, 1)
        log.polled = None
        log.last[SITE_AT] = site
        log.busy = True
        log.last[ENTERED_AT] = entered = now()
        try:
            result = method(*args, **kwargs)
        except BaseException:
            log.note(failed, site, entered, now())
            log.busy = False
            raise
        left = now()
        at = log.at if log.at < log.end else log.grow()
        log.at = at + SIZE
        if log.bytes:
            message, pickling = (-1, -1, log.bytes, -1, -1), (log.dumps_ns, log.loads_ns)
            PUT_ALL(log.buffer, at, kind, site, -1, entered, left, *message, -1, *pickling, -1, 0)
            log.dumps_ns = log.loads_ns = log.bytes = log.loaded = 0
        else:
            PUT(log.buffer, at, kind, site, -1, entered, left)
        if begun >= 0:
            _part(log, begun, status, left)
        log.busy = False
        return result

    return named(call, method)


def polling(seen: Seen, method: Method, name: str, comm_at: int) -> Method:
    """A look whether a message has come."""
    names = parameters(method.__doc__)
    status_at = names.index("status") + 1
    find, main, main_thread = Places(seen.log, seen.numbers, name).find, seen.log.main, seen.log.thread
    kind = int(Kind.PROBE)

    def call(*args: Any, **kwargs: Any) -> Any:
        log = main if thread() == main_thread else seen.log.of_thread()
        if log.busy or seen.off:
            return method(*args, **kwargs)
        site = find(frame_of(1))
        if site == OURS:
            return method(*args, **kwargs)
        log.busy = True
        comm = seen.world.add(args[comm_at])
        args, kwargs, status = with_status(log, seen.mpi, args, kwargs, status_at)
        row = Row(log, kind, site, polls=True, comm=comm)
        try:
            result = method(*args, **kwargs)
        except BaseException:
            row.fill()
            log.busy = False
            raise
        source, tag = (status.Get_source(), status.Get_tag()) if result else (-1, -1)
        row.fill(found=bool(result), source=source)
        if result:
            seen.requests.probed(result, comm, source, tag)
        log.busy = False
        return result

    return named(call, method)


def beginning(seen: Seen, method: Method, name: str, kind: Kind) -> Method:
    """A call that makes a request which is started later."""
    names = parameters(method.__doc__)
    at = names.index("dest" if "dest" in names else "source") + 1 if kind is not Kind.POST_COLLECTIVE else -1
    buffer_name = next((name for name in names[:1] if name in ("buf", "sendbuf")), "")

    def call(*args: Any, **kwargs: Any) -> Any:
        result = method(*args, **kwargs)
        if not seen.off and seen.mpi is not None:
            peer = -1
            tag = -1 if kind is Kind.POST_RECEIVE else 0
            if at >= 0:
                peer = args[at] if len(args) > at else kwargs.get(names[at - 1], -1)
                tag = args[at + 1] if len(args) > at + 1 else kwargs.get("tag", tag)
            buffer = args[1] if buffer_name and len(args) > 1 else kwargs.get(buffer_name)
            its = kind, seen.world.add(args[0]), peer, tag, bytes_of(buffer)
            seen.requests.persistent[result.handle] = its
        return result

    return named(call, method)


def starting(seen: Seen, method: Method, name: str) -> Method:
    """A start of such requests."""
    find, main, main_thread = Places(seen.log, seen.numbers, name).find, seen.log.main, seen.log.thread

    def call(*args: Any, **kwargs: Any) -> Any:
        log = main if thread() == main_thread else seen.log.of_thread()
        if log.busy or seen.off:
            return method(*args, **kwargs)
        site = find(frame_of(1))
        log.busy = True
        given = (args[1] if len(args) > 1 else kwargs.get("requests")) if name == "Startall" else args[:1]
        entered = now()
        try:
            return method(*args, **kwargs)
        finally:
            left = now()
            for request in given if isinstance(given, list | tuple) else ():
                kind, comm, peer, tag, size = seen.requests.persistent.get(request.handle, _UNKNOWN)
                source = peer if kind is Kind.POST_RECEIVE else -1
                at = log.at if log.at < log.end else log.grow()
                seen.requests.open[request.handle] = (
                    log.count,
                    kind is Kind.POST_RECEIVE and (source < 0 or tag < 0),
                )
                log.at = at + SIZE
                PUT_MESSAGE(log.buffer, at, kind, site, comm, entered, left, peer, tag, size, source, tag)
                entered = left  # the first of several has it all
            log.polled = None
            log.busy = False

    return named(call, method)


class Row:
    """The row of a wait or of polls: polls of one site, one after the other, share one.

    A rank that sleeps between its polls waits there too: once something is found, the time in which it was on
    no CPU since the first poll counts as if inside.
    """

    __slots__ = ("_before", "_entered_ns", "_kind", "_log", "_named", "_polls", "_started_ns")

    def __init__(self, log: ThreadLog, kind: int, site: int, *, polls: bool, comm: int = -1) -> None:
        before = log.polled if polls else None
        self._log, self._kind, self._named, self._polls = log, kind, (site, comm), polls
        log.polled = None
        log.last[SITE_AT] = site
        self._started_ns = log.last[ENTERED_AT] = now()
        self._before = before if before is not None and before.site == site else None
        self._entered_ns = self._before.entered_ns if self._before else self._started_ns

    def fill(self, *, found: bool = True, source: int = -1) -> int:
        """The call is over; returns when."""
        left, log, before = now(), self._log, self._before
        inside_ns, count = left - self._started_ns, 1
        if before is not None:
            inside_ns, count, at, buffer = (
                inside_ns + before.inside_ns,
                before.polls + 1,
                before.at,
                before.buffer,
            )
        else:
            at = log.at if log.at < log.end else log.grow()
            log.at, buffer = at + SIZE, log.buffer
        if not found:
            cpu_ns = before.cpu_ns if before else time.thread_time_ns()
            log.polled = Polls(self._named[0], at, buffer, self._entered_ns, inside_ns, cpu_ns, count)
        elif before is not None:
            whole_ns = left - self._entered_ns
            slept_ns = whole_ns - (time.thread_time_ns() - before.cpu_ns)
            inside_ns += max(0, min(whole_ns - inside_ns, slept_ns))
        PUT_ALL(
            *(buffer, at, self._kind, *self._named, self._entered_ns, left, -1, -1, log.bytes, source, -1),
            *(inside_ns, log.dumps_ns, log.loads_ns, -1, count if self._polls else 0),
        )
        log.dumps_ns = log.loads_ns = log.bytes = log.loaded = 0
        return left


def _part(log: ThreadLog, begun: int, status: Any, left: int) -> None:
    if status is None:
        log.part(begun, left)
    else:
        log.part(begun, left, status.Get_source(), status.Get_tag())


def _with_statuses(
    log: ThreadLog, mpi: Any, args: tuple[Any, ...], kwargs: dict[str, Any], how: str
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments with what tells who sent."""
    at = 2 if how else 1
    if how in ("", "any"):
        return with_status(log, mpi, args, kwargs, at)
    given = args[at] if len(args) > at else kwargs.get("statuses")
    if given is not None:
        return args, kwargs, given
    statuses: list[Any] = []
    return args[:at], {**kwargs, "statuses": statuses}, statuses


def _ended(result: Any, how: str, *, tests: bool, count: int) -> Sequence[int]:
    """Which of the requests a call has brought to their end, by what it returned."""
    first = result[0] if isinstance(result, tuple) else result
    if how == "some":
        return first or ()
    if how == "any":
        done = result[1] if tests else True
        return [first] if done and first >= 0 else ()
    if tests and not first:
        return ()
    return range(count)


def _status(statuses: Any, how: str, index: int, place: int) -> Any:
    """The status of the request at an index, the how-manieth that ended; None if the caller's list has
    none."""
    if not isinstance(statuses, list):
        return statuses
    at = place if how == "some" else index
    return statuses[at] if at < len(statuses) else None
