"""Starting ranks with mpiexec, here or on hosts, and starting them again."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Literal

from rankwise.comm.mpi_environment import find_mpiexec
from rankwise.errors import Interrupted, LaunchError, RankwiseError, TrainingError, UsageError
from rankwise.launch import stand_in
from rankwise.launch.backoff import RestartBackoff
from rankwise.launch.command_line import command_line
from rankwise.launch.forking import Forking, rank_command
from rankwise.launch.generations import Generations
from rankwise.launch.hosts import answering, check, fit
from rankwise.launch.order import Order
from rankwise.launch.output import Output, plain
from rankwise.launch.plan_file import write_plan
from rankwise.launch.preflight import PreparedRun
from rankwise.launch.program_end import close_calls
from rankwise.launch.supervision import Line, MpiexecResult, Started, start, supervise
from rankwise.plan import RunPlan
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import begin_calls
from rankwise.runs.record import Outcome, Record
from rankwise.survival import causes
from rankwise.survival.fault_injection import OF_HOSTS, Mark


def run_by_mpiexec(
    order: Order, prepared: PreparedRun, folder: RunFolder, forks: Forking | None = None
) -> Record | None:
    """Start the ranks on this machine, show how they fare, and return the final record, None of a program
    that has come to its end and left nothing. A program's only rank needs no mpiexec. With `forks` ranks are
    forks of what that makes.

    If the run fails in a way that may not come again, it is started again from its newest checkpoint, as
    far as the options allow. Raises the error of the rank that failed first, or Interrupted.
    """
    plan = prepared.plan
    names = check(plan.host_list, folder.path)
    live = order.console.is_terminal
    pauses = RestartBackoff()
    if plan.program and not folder.record.exists():
        begin_calls(folder, plan.recorded())
    with order.display(folder, prepared.epochs, prepared.samples_per_epoch, live=live) as display:

        def start_ranks(plan: RunPlan, *mark: str) -> Started:
            show = (
                Output(folder, display.say, plan.processes, keeps_stdout=order.keeps_stdout)
                if plan.program
                else plain(display.say)
            )
            return _start(plan, folder, show, mark, forks)

        with Generations(order, plan, folder, start_ranks, display.say, pauses) as generations:
            ranks = start_ranks(plan)
            while True:
                before = _content(folder)
                ending = supervise(ranks, folder.failure.exists, partial(generations.look, ranks))
                if plan.program and not folder.record.exists():
                    return close_calls(ending, folder, plan)
                if coming := generations.take_over(ending):
                    order, plan, names, ranks = coming.order, coming.plan, coming.names, coming.started
                    continue
                try:
                    return _judge(ending, folder, plan.processes, before)
                except RestartableError as error:
                    over = plan.on_failure == "stop" or pauses.count == plan.max_restarts
                    if over or not folder.record.exists():
                        raise
                    generations.abandon("ranks were lost meanwhile, and the run was started again")
                    plan = _without_lost_hosts(plan, order, folder, ending, names, display.say)
                    generations.restarted(plan)
                    pause_s = pauses.after(len(folder.read().epochs))
                    display.say(
                        f"{error}; starting again in {pause_s:g} s ({pauses.count} of {plan.max_restarts})"
                    )
                    time.sleep(pause_s)
                    folder.forget_failures()
                    folder.begin()
                    ranks = start_ranks(plan)


def _start(
    plan: RunPlan, folder: RunFolder, show: Callable[[Line], None], mark: Sequence[str], forks: Forking | None
) -> Started:
    """Start the ranks of a run, or those of the start `mark` that are to take over."""
    server = forks.serve() if forks else None
    module = "rankwise.launch.program_rank" if plan.program else stand_in.RANK
    words = rank_command(module, folder.path, *mark, server=server)
    if plan.program and plan.processes == 1 and not plan.hosts:
        return start(words, show, is_rank=True)
    survives = plan.on_failure == "continue"
    mpiexec = find_mpiexec()
    command = command_line(mpiexec, plan.processes, words, survives=survives, hosts=plan.host_list)
    return start(command, show, is_hydra=mpiexec.is_hydra, server=server)


def _without_lost_hosts(
    plan: RunPlan,
    order: Order,
    folder: RunFolder,
    ending: MpiexecResult,
    names: dict[str, str],
    say: Callable[[str], None],
) -> RunPlan:
    """The plan to start again with, on the hosts that answer, once it is written down who was lost."""
    left = answering(plan.host_list, folder.path, say)
    lost = [names[host.name] for host in plan.host_list if host not in left]
    _note_losses(folder, ending, lost)
    if lost:
        plan = fit(plan, left)
        write_plan(folder, order.config, plan.with_options(out=folder.path))
    return plan


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
    failure = folder.read_failure()
    return int(failure["rank"]) if failure else -1


def _content(folder: RunFolder) -> bytes | None:
    """Of record.json, None if there is none."""
    return folder.record.read_bytes() if folder.record.exists() else None


def _judge(ending: MpiexecResult, folder: RunFolder, ranks: int, before: bytes | None) -> Record:
    """What came of so many ranks, by what they left in the folder, where the record was as `before`;
    mpiexec's own code says too little."""
    of_all = causes.find_crashes(folder, range(ranks))
    failure = folder.read_failure()
    if failure is not None:
        # Ranks that are ended with it take that for a stop, and may have time to write so.
        taken: list[Outcome] = (
            ["interrupted"] if not ending.interrupted and _content(folder) != before else []
        )
        if failure["may_restart"] and of_all is not None:  # others gave up as too few were left
            _close(folder, "failed", str(of_all), but_for=taken)
            raise of_all
        wrong_use = failure["exit_code"] == UsageError.exit_code
        kind = RestartableError if failure["may_restart"] else TrainingError
        error = (UsageError if wrong_use else kind)(failure["message"])
        error.exit_code = failure["exit_code"]
        if failure["traceback"]:
            error.add_note(f"On rank {failure['rank']}:\n{failure['traceback']}")  # which --debug shows
        if not wrong_use:
            _close(folder, "failed", failure["message"], but_for=taken)
        raise error
    last_words = " ".join(ending.last_words.split())[:600] or "it left no word"
    content = _content(folder)
    if content is None or content == before:
        if ending.interrupted:
            raise Interrupted("stopped before the ranks had begun")
        known = causes.last_words(folder)
        message = f"mpiexec ended with code {ending.code} before the ranks had begun: {known or last_words}"
        raise RestartableError(message) if known or before else LaunchError(message)
    record = folder.read()
    if record.outcome == "interrupted" or (record.outcome == "running" and ending.interrupted):
        command = "run" if record.config.get("program") else "train"
        message = record.message or f"stopped; go on with: rankwise {command} --resume {folder.path}"
        _close(folder, "interrupted", message)
        raise Interrupted(message)
    if record.outcome == "running":
        words = {row.rank: folder.read_words(row.rank) for row in record.ranks}
        if all(its.get("kind") == "crash" for its in words.values()):  # a fault of the program's own
            message = f"all ranks failed: {words[0]['message']}"
            _close(folder, "failed", message)
            raise TrainingError(message)
        if of_all is not None:
            _close(folder, "failed", str(of_all))
            raise of_all
        gone = re.search(r"lost communication.* Remote daemon: .*? on node (\S+)", last_words)
        last_words = f"host {gone[1]} was lost" if gone else causes.last_words(folder) or last_words
        message = f"the ranks ended in the middle of the run, mpiexec with code {ending.code}: {last_words}"
        _close(folder, "failed", message)
        raise RestartableError(message)
    return record


def _close(
    folder: RunFolder,
    outcome: Literal["interrupted", "failed"],
    message: str,
    but_for: Collection[Outcome] = (),
) -> None:
    """Finish the record of ranks that are gone; if even that fails, the first error is what counts."""
    with contextlib.suppress(RankwiseError):
        folder.close(outcome, message, but_for=but_for)


class RestartableError(TrainingError):
    """A failure that may not come again when the run goes on from its newest checkpoint."""
