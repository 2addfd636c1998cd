"""From options to running ranks: alone in this process, under a given MPI, or by our own mpiexec."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rankwise.comm.mpi_environment import find_mpiexec, started_as_rank
from rankwise.launch import preflight
from rankwise.launch.mpiexec import train_by_mpiexec
from rankwise.launch.order import Order, resumed, run_folder
from rankwise.launch.tuning import tuned
from rankwise.plan import make_plan
from rankwise.report.progress_bar import showing_progress
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record, Target


@dataclass(frozen=True)
class Result:
    """A finished run. `speaks` is whether this process is the one that tells the user about it."""

    record: Record
    folder: Path
    speaks: bool


def launch(order: Order) -> Result:
    """Run to the end, or go on with what an earlier run left.

    Under mpiexec or srun this process is one rank of the world it is given. Else one rank trains
    here, and several are started with mpiexec. Raises UsageError before training, Interrupted, or
    another RankwiseError.
    """
    if order.tune:
        order = tuned(order)
    if order.resume:
        stored_in = RunFolder(order.resume)
        stored = stored_in.read()
        order = resumed(order, stored_in, stored)
        target = Target.of(order.config.target_accuracy, stored.epochs, None)
        over = len(stored.epochs) >= order.config.epochs or (target is not None and target.reached)
        if stored.outcome == "completed" and over:
            order.say(f"{order.resume} is completed already: nothing to do")
            return Result(stored, stored_in.path, speaks=not started_as_rank())
    if started_as_rank():
        from rankwise.launch.rank import train_as_rank  # loads torch, which a launcher does not need

        record, folder, rank = train_as_rank(order)
        return Result(record, folder.path, speaks=rank == 0)
    for remark in order.remarks:
        order.say(remark)
    plan = make_plan(order.config, resumes=order.resume is not None)
    by_mpiexec = plan.ranks > 1 or plan.hosts is not None
    if by_mpiexec:
        find_mpiexec()  # before anything is decoded or written
    with showing_progress(order.console) as on_progress:
        prepared = preflight.prepare(plan, on_progress)
    with run_folder(order, plan) as folder:
        if by_mpiexec:
            record = train_by_mpiexec(order, prepared, folder)
        else:
            from rankwise.launch.rank import train_alone

            record = train_alone(order, prepared, folder)
        return Result(record, folder.path, speaks=True)


__all__ = ["Order", "Result", "launch"]
