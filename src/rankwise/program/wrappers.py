"""What stands in the place of mpi4py's methods: the same call, with its row in the log."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from rankwise.ledger.call_log import Kind
from rankwise.program.calls import MAKERS, parameters
from rankwise.program.communicators import Communicators
from rankwise.program.log import (
    BEFORE,
    ENTERED_AT,
    PUT,
    PUT_ALL,
    PUT_MESSAGE,
    SITE_AT,
    SIZE,
    CallLog,
    ThreadLog,
)
from rankwise.program.places import OURS, Places
from rankwise.program.requests import Requests

Method = Callable[..., Any]

_RECEIVING = (Kind.RECEIVE, Kind.EXCHANGE, Kind.PROBE)

now = time.monotonic_ns
frame_of = sys._getframe
thread = threading.get_ident


class Seen:
    """What the wrappers share. `world` is known once MPI has begun; `off` ends the logging of this
    process."""

    def __init__(self, log: CallLog) -> None:
        self.log = log
        self.numbers: list[int] = []
        self.off = False
        self.mpi: Any = None
        self.comms: dict[int, int] = {}
        self.open: dict[int, tuple[int, bool]] = {}
        self.world: Communicators
        self.requests: Requests


def logged(seen: Seen, method: Method, name: str, kind: Kind) -> Method:
    """A call that is one row from entry to exit; `kind` says what it waits for."""
    names = parameters(method.__doc__)
    peer_at = _first(names, "dest", "root", "source")
    also_sends = name.startswith("Isendrecv")  # whose row is that of the receive
    tag_at = _first(names, "tag", "recvtag" if also_sends else "sendtag")
    sent_tag_at = _first(names, "sendtag") + 1
    source_at = _first(names, "source") if kind in (*_RECEIVING, Kind.POST_RECEIVE) else -1
    status_at = _first(names, "status") if kind in _RECEIVING else -1
    peer_name, tag_name = _name(names, peer_at), _name(names, tag_at)
    buffer_at = 0 if name[0].isupper() and names and names[0] in ("buf", "sendbuf") else -1
    buffer_name = _name(names, buffer_at)
    of_message = names[:1] != ["comm"] and method.__qualname__.startswith("Message.")
    posts = Kind.POST_COLLECTIVE <= kind <= Kind.POST_RECEIVE
    is_message = kind in (*_RECEIVING, Kind.SEND, Kind.POST_SEND, Kind.POST_RECEIVE)
    peer_default = 0 if peer_name == "root" else -1
    tag_default = -1 if kind in (Kind.RECEIVE, Kind.PROBE, Kind.POST_RECEIVE) else 0
    is_free = name in ("Free", "Disconnect")
    makes = name in MAKERS
    # What hangs on the name alone is found out now: an enumeration's names take time in each call.
    known, number, failed, finds = seen.comms.get, int(kind), int(Kind.FAILED), kind is Kind.PROBE
    exchanges = kind is Kind.EXCHANGE  # whose row is that of what is sent
    names_comm, receives_later = not of_message and kind is not Kind.PLAIN, kind is Kind.POST_RECEIVE
    has_peer, has_tag, has_source = peer_at >= 0, is_message and tag_at >= 0, is_message and source_at >= 0
    has_status, has_buffer, peer_at, tag_at = status_at >= 0, buffer_at >= 0, peer_at + 1, tag_at + 1
    source_at, status_at = source_at + 1, status_at + 1
    begun, comm_at = seen.open, int(names[:1] == ["comm"] and names_comm)  # of a class method of messages
    pickles = name[0].islower() or of_message
    is_short = not (has_peer or has_tag or has_source or has_status or has_buffer or pickles or of_message)
    find, main, main_thread = Places(seen.log, seen.numbers, name).find, seen.log.main, seen.log.thread
    last: tuple[Any, int, int] = (None, 0, 0)  # where the call before came from

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal last
        log = main if thread() == main_thread else seen.log.of_thread()
        if log.busy or seen.off or len(args) <= comm_at:
            return method(*args, **kwargs)
        frame = frame_of(1)
        code, place, site = last
        if frame.f_code is not code or frame.f_lasti != place:
            site = find(frame)
            if site == OURS:
                return method(*args, **kwargs)
            last = frame.f_code, frame.f_lasti, site
        comm = peer = tag = source = got = -1
        status: Any = None
        if names_comm:
            comm = known(args[comm_at].handle, -1)
            if comm < 0:
                comm = seen.world.add(args[comm_at])
        if has_peer:
            peer = args[peer_at] if len(args) > peer_at else kwargs.get(peer_name, peer_default)
        if has_tag:
            tag = args[tag_at] if len(args) > tag_at else kwargs.get(tag_name, tag_default)
        if has_source:
            source = args[source_at] if len(args) > source_at else kwargs.get("source", -1)
        if has_status:
            args, kwargs, status = with_status(log, seen.mpi, args, kwargs, status_at)
        if of_message:
            comm, source, tag = seen.requests.message(args[0])
        elif is_free:
            seen.world.forget(args[0])
        log.polled = None
        now_at = log.last
        now_at[SITE_AT] = site
        log.busy = True
        now_at[ENTERED_AT] = entered = now()
        try:
            result = method(*args, **kwargs)
        except BaseException:
            log.note(failed, site, entered, now())
            log.dumps_ns = log.loads_ns = log.bytes = log.loaded = 0
            log.busy = False
            raise
        left = now()
        if has_status:
            source, got = status.Get_source(), status.Get_tag()
        dumps_ns = loads_ns = size = 0
        if has_buffer:
            try:
                size = args[1].nbytes
            except (IndexError, AttributeError):
                given = args[1] if len(args) > 1 else kwargs.get(buffer_name)
                if given is getattr(seen.mpi, "IN_PLACE", seen):
                    given = args[2] if len(args) > 2 else kwargs.get("recvbuf")
                size = bytes_of(given)
        elif pickles and log.bytes:
            dumps_ns, loads_ns, size = log.dumps_ns, log.loads_ns, log.bytes
            if exchanges:
                size -= log.loaded
            log.dumps_ns = log.loads_ns = log.bytes = log.loaded = 0
        at = log.at
        if at >= log.end:
            at = log.grow()
        log.at = at + SIZE
        if is_short:
            PUT(log.buffer, at, number, site, comm, entered, left)
        elif dumps_ns or loads_ns:
            message = peer, tag, size, source, got
            PUT_ALL(
                *(log.buffer, at, number, site, comm, entered, left, *message, -1, dumps_ns, loads_ns, -1, 0)
            )
        else:
            PUT_MESSAGE(log.buffer, at, number, site, comm, entered, left, peer, tag, size, source, got)
        if posts:
            begun[result.handle] = at // SIZE + log.taken - BEFORE, receives_later and (source < 0 or tag < 0)
            if also_sends:
                tag = args[sent_tag_at] if len(args) > sent_tag_at else kwargs.get("sendtag", 0)
                at = log.at if log.at < log.end else log.grow()
                log.at = at + SIZE
                PUT_MESSAGE(
                    log.buffer, at, int(Kind.POST_SEND), site, comm, left, left, peer, tag, size, -1, -1
                )
        elif makes:
            seen.requests.made(result)
        elif finds and source >= 0:
            seen.requests.probed(result, comm, source, got)
        log.busy = False
        return result

    return named(call, method)


def with_status(
    log: ThreadLog, mpi: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: int
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The arguments with a status, which tells who sent; the caller's own if it gave one."""
    given = args[at] if len(args) > at else kwargs.get("status")
    if given is not None:
        return args, kwargs, given
    status = log.status = log.status or mpi.Status()
    if len(args) > at:
        return (*args[:at], status, *args[at + 1 :]), kwargs, status
    return args, {**kwargs, "status": status}, status


def bytes_of(buffer: Any) -> int:
    """The size of what is sent, as far as it can be told at once: of a list, its first part's."""
    while buffer.__class__ in (list, tuple) and buffer:
        buffer = buffer[0]
    try:
        return int(buffer.nbytes)
    except (AttributeError, TypeError, ValueError):
        pass
    try:
        return memoryview(buffer).nbytes
    except (TypeError, ValueError, BufferError):
        return 0


def named(call: Method, method: Method) -> Method:
    """`call` under the name, and with the docstring, of the method whose place it takes."""
    functools.update_wrapper(call, method, updated=())
    return call


def _first(names: list[str], *wanted: str) -> int:
    return next((names.index(name) for name in wanted if name in names), -1)


def _name(names: list[str], at: int) -> str:
    return names[at] if at >= 0 else ""
