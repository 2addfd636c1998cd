"""Starting ranks with mpiexec, here or on hosts, and starting them again."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from typing import Literal

from rankwise.comm.mpi_environment import Mpiexec, allocated_hosts, find_mpiexec
from rankwise.errors import Interrupted, LaunchError, RankwiseError, TrainingError, UsageError
from rankwise.launch.hosts import answering, check, fit, passed_on
from rankwise.launch.order import Order
from rankwise.launch.plan_file import write_plan
from rankwise.launch.preflight import PreparedRun
from rankwise.launch.supervision import MpiexecResult, supervise
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.survival import causes
from rankwise.survival.fault_injection import OF_HOSTS, Mark
from rankwise.system import machine
from rankwise.system.hosts import Host

FIRST_PAUSE_S = 1.0
"""How long to wait before a restart."""

LONGEST_PAUSE_S = 60.0

_KEEPALIVE = {"time": 5, "intvl": 2, "probes": 3}
"""When Open MPI's daemons ask whether another host is there: after `time` silent seconds, then every `intvl`
seconds, and `probes` times until they believe that it is not."""

SURVIVING_BETWEEN_HOSTS = [
    *("--mca", "pml", "ob1", "--mca", "coll", "^han,cuda,hcoll,portals4"),
    *(word for name, s in _KEEPALIVE.items() for word in ("--prtemca", f"oob_tcp_keepalive_{name}", str(s))),
]
"""What survives failures of Open MPI's point-to-point and collective modules, of which others would be chosen
on several hosts (its issues 13915 and 11794); and its daemons find out about a link that was cut within some
ten seconds instead of never."""


class RestartBackoff:
    """Before each restart: twice as long as before the last one, up to a limit, unless an epoch came to its
    end since. What fails at once may need time; what trained on for a while does not."""

    def __init__(self) -> None:
        self._epochs = -1
        self._pause_s = 0.0

    def after(self, epochs: int) -> float:
        """Seconds to wait when this many epochs are over."""
        again = epochs <= self._epochs
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S) if again else FIRST_PAUSE_S
        self._epochs = epochs
        return self._pause_s


def train_by_mpiexec(order: Order, prepared: PreparedRun, folder: RunFolder) -> Record:
    """Start the ranks on this machine, show how they fare, and return the final record.

    If the run fails in a way that may not come again, it is started again from its newest checkpoint, as
    far as the options allow. Raises the error of the rank that failed first, or Interrupted.
    """
    plan = prepared.plan
    mpiexec = find_mpiexec()
    names = check(plan.host_list, folder.path)
    survives = plan.on_failure == "continue"
    live = order.console.is_terminal
    # -P keeps files of this folder from being taken for modules of Python's or of a library.
    program = [sys.executable, "-P", "-m", "rankwise.launch.rank", str(folder.path)]
    pauses = RestartBackoff()
    with order.display(folder, plan.epochs, prepared.samples_per_epoch, live=live) as display:
        for restarts in range(plan.max_restarts + 1):
            command = command_line(mpiexec, plan.processes, program, survives=survives, hosts=plan.host_list)
            ending = supervise(command, display.say, folder.failure.exists)
            try:
                return _judge(ending, folder)
            except RestartableError as error:
                over = plan.on_failure == "stop" or restarts == plan.max_restarts
                if over or not folder.record.exists():
                    raise
                left = answering(plan.host_list, folder.path, display.say)
                lost = [names[host.name] for host in plan.host_list if host not in left]
                _note_losses(folder, ending, lost)
                if lost:
                    plan = fit(plan, left)
                    write_plan(folder, order.config, plan.with_options(out=folder.path))
                pause_s = pauses.after(len(folder.read().epochs))
                display.say(
                    f"{error}; starting again in {pause_s:g} s ({restarts + 1} of {plan.max_restarts})"
                )
                time.sleep(pause_s)
                folder.forget_failures()
                folder.begin()
    raise AssertionError("the last restart returns or raises")


def _note_losses(folder: RunFolder, ending: MpiexecResult, lost_hosts: Sequence[str]) -> None:
    """Write down why the run is started again, by what was left in the folder, what mpiexec said, and which
    hosts do not answer: every rank of theirs was lost."""
    record = folder.read()
    epoch = len(record.epochs) + 1
    injected = causes.new_injected_faults(folder, record.faults)
    struck = {mark.rank for mark in injected if mark.kind in OF_HOSTS}
    hosts = {*lost_hosts, *(row.host for row in record.ranks if row.rank in struck)}
    ranks = [row.rank for row in record.ranks if row.host in hosts and row.died_at_s is None]
    # Others may have gone on for a moment; what came of that is gone.
    known = [
        fault.model_copy(update={"action": "restart"}) if fault.epoch >= epoch else fault
        for fault in record.faults
    ]
    if not ranks and known == record.faults:
        ranks = [_first_lost(folder, ending, injected)]
    new = [causes.explain(folder, rank, record.faults, epoch=epoch, action="restart") for rank in ranks]
    folder.write(record.model_copy(update={"faults": [*known, *new]}))


def _first_lost(folder: RunFolder, ending: MpiexecResult, injected: Sequence[Mark]) -> int:
    """The rank that ended a run, -1 if it is not known."""
    if injected:
        return injected[-1].rank
    if named := re.search(r"process rank (\d+)", ending.last_words):
        return int(named[1])
    return int(json.loads(folder.failure.read_bytes())["rank"]) if folder.failure.exists() else -1


def _judge(ending: MpiexecResult, folder: RunFolder) -> Record:
    """What came of the ranks, by what they left in the folder; mpiexec's own code says too little."""
    if folder.failure.exists():
        failure = json.loads(folder.failure.read_bytes())
        wrong_use = failure["exit_code"] == UsageError.exit_code
        kind = RestartableError if failure["may_restart"] else TrainingError
        error = (UsageError if wrong_use else kind)(failure["message"])
        error.add_note(f"On rank {failure['rank']}:\n{failure['traceback']}")  # which --debug shows
        if not wrong_use:
            _close(folder, "failed", failure["message"])
        raise error
    last_words = " ".join(ending.last_words.split())[:600] or "it left no word"
    if not folder.record.exists():
        if ending.interrupted:
            raise Interrupted("stopped before the ranks had begun")
        raise LaunchError(f"mpiexec ended with code {ending.code} before the ranks had begun: {last_words}")
    record = folder.read()
    if record.outcome == "interrupted" or (record.outcome == "running" and ending.interrupted):
        message = record.message or f"stopped; go on with: rankwise train --resume {folder.path}"
        _close(folder, "interrupted", message)
        raise Interrupted(message)
    if record.outcome == "running":
        words = {row.rank: folder.read_words(row.rank) for row in record.ranks}
        if all(its.get("kind") == "crash" for its in words.values()):  # a fault of the program's own
            message = f"all ranks failed: {words[0]['message']}"
            _close(folder, "failed", message)
            raise TrainingError(message)
        known = [f"rank {rank}: {its['message']}" for rank, its in words.items() if its]
        gone = re.search(r"lost communication.* Remote daemon: .*? on node (\S+)", last_words)
        if gone:
            known = [f"host {gone[1]} was lost"]
        last_words = "; ".join(known) or last_words
        message = f"the ranks ended in the middle of the run, mpiexec with code {ending.code}: {last_words}"
        _close(folder, "failed", message)
        raise RestartableError(message)
    return record


def _close(folder: RunFolder, outcome: Literal["interrupted", "failed"], message: str) -> None:
    """Finish the record of ranks that are gone; if even that fails, the first error is what counts."""
    with contextlib.suppress(RankwiseError):
        folder.close(outcome, message)


def command_line(
    mpiexec: Mpiexec,
    ranks: int,
    program: list[str],
    *,
    survives: bool = False,
    hosts: Sequence[Host] = (),
) -> list[str]:
    """The command that starts `program` on `ranks` ranks, which with `survives` go on if one dies.

    Ranks of this machine are bound to a NUMA domain, where their memory is near, but not to a core:
    bound to cores, two ranks on two cores lost 7% to whatever else ran there. With more ranks than
    cores the scheduler decides, and ranks yield while they wait. A container's share of the CPUs does
    not say which ones they are, so there no rank is bound. In a batch job of several hosts mpiexec
    knows best.

    On `hosts` ranks fill one after the other.
    """
    command = [str(mpiexec.path), "-n", str(ranks)]
    if survives:
        command += ["--with-ft", "ulfm"]
    if hosts:
        crowded = ranks > sum(host.slots for host in hosts)
        command += ["--host", ",".join(map(str, hosts))]
        command += ["--map-by", "slot:OVERSUBSCRIBE" if crowded else "slot", "--bind-to", "none"]
        command += ["--mca", "mpi_yield_when_idle", "1"] if crowded else []
        command += ["--mca", "btl", "self,sm,tcp", *SURVIVING_BETWEEN_HOSTS]
        for variable in passed_on():
            command += ["-x", variable]
    elif mpiexec.is_open_mpi and allocated_hosts() > 1:
        command += SURVIVING_BETWEEN_HOSTS if survives else []
    elif mpiexec.is_open_mpi:
        # Shared memory alone spares a second of looking at networks.
        command += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm"]
        if ranks > machine.usable_cores():
            command += ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"]
            command += ["--mca", "mpi_yield_when_idle", "1"]
        elif machine.cpu_quota() is not None:
            command += ["--bind-to", "none"]
        else:
            command += ["--map-by", "numa", "--bind-to", "numa"]
    return [*command, *program]


class RestartableError(TrainingError):
    """A failure that may not come again when the run goes on from its newest checkpoint."""
