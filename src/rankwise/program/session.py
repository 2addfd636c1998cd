"""One rank of a program, from before its first line to its end: what it does in MPI is logged."""

from __future__ import annotations

import os
import pickle
import platform
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from rankwise.ledger.call_log import Kind
from rankwise.ledger.regions import collect_in
from rankwise.program import torch_calls
from rankwise.program.calls import BY_KIND, PERSISTENT, POLLS, STARTS, WAITS, methods
from rankwise.program.communicators import Communicators
from rankwise.program.cost import measure_cost
from rankwise.program.hook import ImportHook, Replaced
from rankwise.program.host_clocks import HostClocks, as_mpi
from rankwise.program.log import CallLog
from rankwise.program.requests import Requests
from rankwise.program.torch_calls import TorchCalls
from rankwise.program.torch_ddp import DdpCalls
from rankwise.program.waiting import beginning, polling, starting, waiting, waiting_for_one
from rankwise.program.wrappers import Seen, logged, now
from rankwise.system import limits, machine, shared_libraries
from rankwise.system.call_sites import place_of


class Session:
    """Logs the calls of this process into a folder, as the rank of this number.

    `begin` just before the program's first line, `end` when it is over. After `leave` nothing is logged any
    more, and mpi4py's methods are what they were.
    """

    def __init__(self, folder: Path, rank: int, size: int, *, several_hosts: bool = False) -> None:
        folder.mkdir(exist_ok=True)
        self._log = CallLog(folder, rank)
        self._seen = Seen(self._log)
        self._replaced = Replaced()
        self._hook = ImportHook(self._import_begins, self._import_ends)
        self._torch = TorchCalls(self._seen, rank, self._group_has_begun, self._group_ends)
        self._torch_hook = ImportHook(lambda: None, self._torch.patch, torch_calls.NAME)
        self._import_began_ns = 0
        self._is_over = self._has_group = False
        self._several_hosts = several_hosts
        self._clocks: HostClocks | None = None
        self._process = os.getpid()
        self._log.say(
            "rank",
            rank=rank,
            size=size,
            host=machine.host_name(),
            cores=machine.usable_cores(),
            cpu_model=machine.cpu_model(),
            clock=machine.clock_name(),
            python=platform.python_version(),
            pid=self._process,
            start_ns=machine.process_start_ns(),
        )
        os.register_at_fork(after_in_child=self._in_child)

    def begin(self) -> None:
        """The program's first line comes next."""
        self._hook.install()
        self._torch_hook.install()
        collect_in(self._log)
        self._log.say("begun", begun_ns=now())

    def end(self, code: int, words: str = "") -> None:
        """The program is over, with this exit code."""
        if self._seen.off or self._is_over:
            return
        self._is_over = True
        mpi, ended_ns = self._seen.mpi, now()
        if self._clocks is not None and mpi is not None and not (code or mpi.Is_finalized()):
            self._seen.off = True
            self._log.say("clock", **self._clocks.measure())
        self._log.say(
            "end",
            ended_ns=ended_ns,
            exit_code=code,
            words=words,
            cpu_s=machine.cpu_seconds(),
            max_rss_bytes=machine.max_rss_bytes(),
            pss_bytes=limits.pss_bytes(),
            threads=threading.active_count(),
            has_mpi=mpi is not None or self._has_group,
            calls_from_c=_calling_from_c() if mpi is not None else [],
        )

    def leave(self) -> None:
        """Nothing is logged from here on, as after a fork, or where rankwise's own exchanges begin."""
        self._seen.off = True
        self._hook.remove()
        self._torch_hook.remove()
        self._torch.undo()
        self._replaced.undo()

    def discard(self) -> None:
        """What was logged counts for nothing."""
        self.leave()
        self._log.discard()

    def close(self) -> None:
        """Let go of the files."""
        self.leave()
        self._log.close()

    def _in_child(self) -> None:
        if os.getpid() != self._process:
            self._seen.off = True  # its rows would go into its parent's file

    def _import_begins(self) -> None:
        self._import_began_ns = now()

    def _import_ends(self, mpi: ModuleType) -> None:
        """mpi4py.MPI is there, and has begun MPI unless `mpi4py.rc` says otherwise."""
        main = self._log.of_thread()
        if self._import_began_ns:
            main.note(Kind.STARTUP, -1, self._import_began_ns, now())
        began_ns = now()
        self._seen.mpi = mpi
        if mpi.Is_initialized():
            self._mpi_has_begun()
        for name in ("Init", "Init_thread"):
            setattr(mpi, name, self._beginning_mpi(getattr(mpi, name)))
        main.note(Kind.INSTRUMENT, -1, began_ns, now())

    def _beginning_mpi(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            began_ns = now()
            result = method(*args)
            self._log.of_thread().note(Kind.STARTUP, -1, began_ns, now())
            self._mpi_has_begun()
            return result

        call.__name__, call.__doc__ = method.__name__, method.__doc__
        return call

    def _mpi_has_begun(self) -> None:
        seen, mpi = self._seen, self._seen.mpi
        if seen.off:
            return
        seen.world = Communicators(mpi, self._log, seen.comms)
        seen.requests = Requests(mpi, seen.world, seen.open)
        if self._several_hosts:
            self._clocks = HostClocks(mpi)
            self._log.say("clock", **self._clocks.measure())
        self._log.say(
            "mpi",
            mpi=" ".join(str(mpi.Get_library_version()).strip("\0").splitlines()[0].split(",")[0].split()),
            mpi4py=sys.modules["mpi4py"].__version__,
            cost_ns=measure_cost(),
            world_rank=mpi.COMM_WORLD.Get_rank(),
            world_size=mpi.COMM_WORLD.Get_size(),
        )
        self._replace_methods(mpi)
        self._time_pickling(mpi)

    def _group_has_begun(self, distributed: Any) -> None:
        """There is a process group of torch.distributed, of which `distributed` is the module."""
        if not self._has_group:
            DdpCalls(self._torch).patch()
        self._has_group = True
        if self._seen.mpi is not None:
            return  # MPI's words, and clocks, serve both
        if self._several_hosts:
            self._clocks = HostClocks(as_mpi(distributed))
            self._log.say("clock", **self._clocks.measure())
        self._log.say(
            "mpi",
            mpi=f"{distributed.get_backend()} of torch {sys.modules['torch'].__version__}",
            cost_ns=measure_cost(),
            world_rank=distributed.get_rank(),
            world_size=distributed.get_world_size(),
        )

    def _group_ends(self) -> None:
        if self._clocks is not None and self._seen.mpi is None:
            self._log.say("clock", **self._clocks.measure())
            self._clocks = None

    def _replace_methods(self, mpi: ModuleType) -> None:
        seen, replace = self._seen, self._replaced.replace
        for owner, table in BY_KIND.items():
            for name, kind in methods(table):
                replace(getattr(mpi, owner), name, partial(logged, seen, name=name, kind=kind))
        for owner, names in POLLS.items():
            comm_at = 1 if owner == "Message" else 0
            for name in names.split():
                replace(getattr(mpi, owner), name, partial(polling, seen, name=name, comm_at=comm_at))
        for name in WAITS:
            make = waiting_for_one if name in ("Wait", "wait") else waiting
            replace(mpi.Request, name, partial(make, seen, name=name))
        for name, kind in methods(PERSISTENT):
            replace(mpi.Comm, name, partial(beginning, seen, name=name, kind=kind))
        for name in STARTS:
            replace(mpi.Prequest, name, partial(starting, seen, name=name))
        replace(mpi.Comm, "Abort", self._aborting)

    def _aborting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def Abort(comm: Any, errorcode: int = 0) -> Any:
            """Abort(self, errorcode: int = 0) -> NoReturn"""
            where = place_of(sys._getframe(1))
            self.end(errorcode, f"it called Abort at {where}")  # which does not come back
            return method(comm, errorcode)

        Abort.__doc__ = method.__doc__
        return Abort

    def _time_pickling(self, mpi: ModuleType) -> None:
        """Pickles of the lower-case calls are made and read as before, and timed."""
        threads, mine = self._log.threads, threading.get_ident

        def dumps(value: Any, *protocol: Any) -> Any:
            began_ns = now()
            result = pickle.dumps(value, *protocol)
            log = threads.get(mine())
            if log is not None and log.busy:
                log.dumps_ns += now() - began_ns
                log.bytes += len(result)
            return result

        def loads(content: Any, *more: Any) -> Any:
            began_ns = now()
            result = pickle.loads(content, *more)
            log = threads.get(mine())
            if log is not None and log.busy:
                log.loads_ns += now() - began_ns
                log.bytes += len(content)
                log.loaded += len(content)
            return result

        if not self._seen.off:
            mpi.pickle.__init__(dumps, loads, mpi.pickle.PROTOCOL)


def _calling_from_c() -> list[str]:
    """Libraries of the program that are linked with MPI, beside MPI's own and mpi4py: what they call is not
    seen."""
    return [
        path.name
        for path in shared_libraries.linked_with("libmpi")
        if not path.name.startswith(("libmpi", "mca_")) and "mpi4py" not in path.parts
    ]


def end_all_ranks(code: int) -> None:
    """End the whole job as MPI does, if the program has begun MPI; else this process alone is to end."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(code)
        os._exit(code)  # MPICH's returns, and its mpiexec ends the others a moment later
