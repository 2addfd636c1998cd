"""One folder for the ranks of a program that a user's mpiexec or srun started, without a message between
them."""

from __future__ import annotations

import atexit
import contextlib
import time
from pathlib import Path

import psutil

from rankwise.comm.mpi_environment import Placement, job_name
from rankwise.errors import LaunchError, UsageError
from rankwise.launch.order import Order, open_folder
from rankwise.launch.plan_file import read_plan
from rankwise.plan import RunPlan
from rankwise.runs.folder import RunFolder
from rankwise.runs.program_record import begin_calls
from rankwise.system.files import write_atomically

PLACE_S = 60.0
"""How long ranks wait for rank 0 to say where the folder is."""

SLACK_S = 5.0
"""How far the clock of a file system may be behind this host's."""


def given_folder(order: Order, plan: RunPlan, me: Placement) -> RunFolder:
    """The folder of this job's run. Rank 0 makes it, and writes into a file of the job where it is, or why
    there is none; the others look for that. Raises UsageError on all of them."""
    note = (plan.out.parent if plan.out else Path("runs")) / f".job-{job_name()}"
    began_s = psutil.Process().parent()
    since_s = (began_s.create_time() if began_s else time.time()) - SLACK_S
    if me.rank == 0:
        try:
            opened = open_folder(order, plan)  # whose claim ends with this process
        except UsageError as error:
            with contextlib.suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(note, f"!{error}".encode())
            raise
        begin_calls(opened.folder, plan.recorded())
        write_atomically(note, str(opened.folder.path).encode())
        atexit.register(_done_with, note, opened.folder, me)
        return opened.folder
    give_up = time.monotonic() + PLACE_S
    while time.monotonic() < give_up:
        with contextlib.suppress(OSError):
            if note.stat().st_mtime >= since_s:
                told = note.read_text()
                if told.startswith("!"):
                    raise UsageError(told[1:])
                folder = RunFolder(Path(told))
                _done_with(note, folder, me)
                _require_same_script(read_plan(folder), plan, me.rank)
                return folder
        time.sleep(0.01)
    raise LaunchError(
        f"rank 0 did not say within {PLACE_S:.0f} s where the run folder is: ranks must share the folder "
        f"{note.parent.absolute()}"
    )


def _require_same_script(first: RunPlan, mine: RunPlan, rank: int) -> None:
    theirs, ours = first.program[0], mine.program[0]
    if Path(theirs).name != Path(ours).name:
        raise UsageError(
            f"rank {rank} was given {ours}, and rank 0 {theirs}: expected one script on all ranks, which may "
            "do something else on each"
        )


def _done_with(note: Path, folder: RunFolder, me: Placement) -> None:
    """Say that this rank needs the note no more, rank 0 at its end and the others once they have read it: the
    last one removes it, as rank 0 may be through before another one has begun."""
    said = folder.path / ".noted"
    with contextlib.suppress(OSError), said.open("ab") as file:
        file.write(b".")
        file.flush()
        if file.tell() >= me.size:
            note.unlink(missing_ok=True)
            said.unlink(missing_ok=True)
