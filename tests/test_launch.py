"""The command that starts ranks, and what of mpiexec's words is shown."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rankwise.comm.mpi_environment import Mpiexec, find_mpiexec, segment_mark
from rankwise.errors import Interrupted, LaunchError, TrainingError
from rankwise.launch import supervision
from rankwise.launch.backoff import RestartBackoff
from rankwise.launch.command_line import SURVIVING_BETWEEN_HOSTS, command_line
from rankwise.launch.mpiexec import RestartableError, _judge
from rankwise.launch.supervision import Line, MpiexecResult, start, supervise
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Outcome
from rankwise.system import machine

from . import records

OPEN_MPI = Mpiexec(Path("mpiexec"), "mpiexec (Open MPI) 5.0.11")
MPICH = Mpiexec(Path("mpiexec"), "HYDRA build details: Version: 5.0.2")


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 4)
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    for name in os.environ:
        if name.startswith(("SLURM_", "PBS_", "LSB_", "PE_HOSTFILE")):
            monkeypatch.delenv(name)


def test_ranks_with_cores_of_their_own_stay_near_their_memory() -> None:
    """With a core for each rank, ranks are bound to NUMA domains."""
    words = " ".join(command_line(OPEN_MPI, 4, ["program"]))
    assert words.startswith("mpiexec -n 4 ")
    assert "--bind-to numa" in words
    assert words.endswith(" program")


def test_more_ranks_than_cores_yield() -> None:
    """With more ranks than cores nobody is bound, and waiting ranks yield."""
    words = " ".join(command_line(OPEN_MPI, 5, ["program"]))
    assert "--map-by :OVERSUBSCRIBE --bind-to none" in words
    assert "mpi_yield_when_idle 1" in words


def test_a_containers_share_binds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with a share of the CPUs ranks are not bound: others may hold the same cores."""
    monkeypatch.setattr(machine, "cpu_quota", lambda: 4.0)
    assert "--bind-to none" in " ".join(command_line(OPEN_MPI, 2, ["program"]))


def test_a_batch_job_of_several_hosts_is_left_to_mpiexec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a batch system gave several hosts, nothing confines ranks to this one's memory; a node may have
    more slots than cores, and a job of few tasks more ranks than slots."""
    monkeypatch.setattr(Mpiexec, "reads_hosts_of", lambda self, job: True)
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "2", "TASKS_PER_NODE": "4(x2)"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    start, bound = ["mpiexec", "-n", "8", "--output", "tag"], ["--bind-to", "numa:overload-allowed"]
    assert command_line(OPEN_MPI, 8, ["program"]) == [*start, *bound, "program"]
    tolerant = command_line(OPEN_MPI, 8, ["program"], survives=True)
    assert tolerant == [*start, "--with-ft", "ulfm", *SURVIVING_BETWEEN_HOSTS, *bound, "program"]
    assert "slot:OVERSUBSCRIBE" in command_line(OPEN_MPI, 9, ["program"])
    assert command_line(MPICH, 8, ["program"]) == ["mpiexec", "-n", "8", "-prepend-rank", "program"]


def test_other_mpis_get_no_options_of_open_mpi() -> None:
    """MPICH's mpiexec is given the number of ranks, and that it is to mark their lines."""
    assert command_line(MPICH, 3, ["program"]) == ["mpiexec", "-n", "3", "-prepend-rank", "program"]


def test_pauses_grow_only_while_nothing_comes_of_it() -> None:
    """A restart waits a second; twice as long each time that no epoch came to its end since the last one, up
    to a minute."""
    pauses = RestartBackoff()
    assert [pauses.after(epochs) for epochs in (0, 0, 0, 3, 4, 4, 3, 9)] == [1, 2, 4, 1, 1, 2, 4, 1]
    assert [pauses.after(9) for _ in range(8)][-1] == 60


def test_banners_are_held_back_and_the_ranks_words_shown() -> None:
    """What ranks print is passed on line by line; what mpiexec says between rulers is kept for a failure
    that nothing else explains."""
    ruler = "-" * 60
    script = f"print('one\\n{ruler}\\nMPI_ABORT was invoked\\n{ruler}\\ntwo'); raise SystemExit(3)"
    shown: list[Line] = []
    ending = supervise(start([sys.executable, "-c", script], shown.append))
    assert shown == [Line("one", None, False), Line("two", None, False)]
    assert (ending.code, ending.interrupted, ending.last_words) == (3, False, "MPI_ABORT was invoked")


def test_what_is_marked_as_a_ranks_is_no_banner() -> None:
    """A rank's own line of dashes is shown, and hides nothing, while a banner that MPI prints in a rank is
    held back; what two ranks left without an end is shown as two lines."""
    words = [
        f"[1,2]<stdout>: {'-' * 60}",
        "[1,2]<stdout>: d",
        "[1,0]<stdout>: a",
        "[1,1]<stdout>: b[1,0]<stdout>: c",
    ]
    words += [f"[1,0]<stderr>: {line}" for line in ("-" * 74, "MPI_ABORT was invoked on rank 0", "-" * 74)]
    shown: list[Line] = []
    supervise(start([sys.executable, "-c", f"print({chr(10).join(words)!r})"], shown.append))
    assert shown == [
        Line(text, rank, False) for text, rank in (("-" * 60, 2), ("d", 2), ("a", 0), ("b", 1), ("c", 0))
    ]


def test_lines_of_mpich_have_their_rank_and_its_own_words_are_held_back() -> None:
    """By the mark of -prepend-rank; what a rank prints between lines of dashes, or in brackets, stays."""
    ruler = "-" * 60
    words = [f"[1] {ruler}", "[1] d", f"[1] {ruler}", "[0] [3] a", "[0] ", "[1] Abort(5) on node 1", "[x] b"]
    shown: list[Line] = []
    code = f"print({chr(10).join(words)!r})"
    ending = supervise(start([sys.executable, "-c", code], shown.append, is_hydra=True))
    assert [(line.rank, line.text) for line in shown] == [
        *((1, ruler), (1, "d"), (0, "[3] a"), (0, ""), (None, "[x] b")),
        (1, ruler),  # behind which something might have come
    ]
    assert ending.last_words == "Abort(5) on node 1"


def test_an_mpiexec_that_does_not_end_its_ranks_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """When a rank has left word that the run fails, and mpiexec goes on all the same, it is ended."""
    monkeypatch.setattr(supervision, "ABORT_S", 0.1)
    ending = supervise(start([sys.executable, "-c", "import time; time.sleep(60)"], print), lambda: True)
    assert (ending.code, ending.interrupted) == (-signal.SIGTERM, False)


def test_a_rank_without_a_plan_says_so_in_its_folder(tmp_path: Path) -> None:
    """A rank without a plan ends with code 2, prints nothing, and leaves word in its folder."""
    words = [sys.executable, "-P", "-m", "rankwise.launch.rank", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
    failure = json.loads((tmp_path / "failure.json").read_bytes())
    assert "plan.json" in failure["message"]
    assert failure["exit_code"] == 2


def test_what_ranks_ended_by_before_they_began(tmp_path: Path) -> None:
    """Ranks that end before there is a record are a launch that failed, with mpiexec's words; where one is
    known to have hung, a failure of its own."""
    (tmp_path / "run").mkdir()
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(LaunchError, match=r"with code 5 before the ranks had begun: no such host$"):
        _judge(MpiexecResult(5, False, "no such\nhost"), folder, 2, None)
    folder.leave_words(1, "hang", "stopped in data")
    with pytest.raises(RestartableError, match=r"with code 137 before .* begun: rank 1: stopped in data$"):
        _judge(MpiexecResult(137, False, "no such\nhost"), folder, 2, None)


@pytest.mark.parametrize("outcome", ["completed", "interrupted", "failed", "running"])
def test_the_record_of_an_earlier_start_is_no_result(tmp_path: Path, outcome: Outcome) -> None:
    """Ranks that end before they have written anything have done nothing, whatever an earlier start of the
    run has come to: it is not shown as what this one came to."""
    folder = records.run_folder(tmp_path / "run", records.record(outcome=outcome))
    before = folder.record.read_bytes()
    with pytest.raises(RestartableError, match=r"mpiexec ended with code 137 before the ranks had begun: "):
        _judge(MpiexecResult(137, False, ""), folder, 3, before)
    with pytest.raises(Interrupted, match="stopped before the ranks had begun"):
        _judge(MpiexecResult(0, True, ""), folder, 3, before)
    assert folder.record.read_bytes() == before


@pytest.mark.parametrize("content", ["", '{"rank": 1, "mess', "[1]"], ids=["empty", "cut off", "no object"])
def test_a_failure_that_could_not_be_written_is_one(tmp_path: Path, content: str) -> None:
    """A rank that fails on a full disk leaves a file that says nothing: the run has failed, in one line, and
    is not started again, which would need room too."""
    folder = records.run_folder(tmp_path / "run", records.record(outcome="running"))
    folder.failure.write_text(content)
    with pytest.raises(
        TrainingError, match=r"^a rank failed, and could not write down why .* disk full\?$"
    ) as told:
        _judge(MpiexecResult(1, False, ""), folder, 3, b"")
    assert not isinstance(told.value, RestartableError)
    assert folder.read().outcome == "failed"


@pytest.mark.parametrize("stopped_by_user", [False, True])
def test_ranks_that_are_ended_with_a_failure_were_not_stopped(tmp_path: Path, stopped_by_user: bool) -> None:
    """Ranks that the launcher ends since one has failed take its signal for a stop, and may write so: the run
    has failed all the same. One that was stopped, of which a rank failed as it left, was interrupted; and
    what an earlier start has come to stays."""
    folder = records.run_folder(tmp_path / "run", records.record(outcome="interrupted"))
    folder.failure.write_text(
        '{"rank": 1, "message": "a fault", "exit_code": 1, "may_restart": false, "traceback": ""}'
    )
    content = folder.record.read_bytes()
    for before, outcome in ((content, "interrupted"), (b"", "interrupted" if stopped_by_user else "failed")):
        with pytest.raises(TrainingError, match="a fault"):
            _judge(MpiexecResult(143, stopped_by_user, ""), folder, 3, before)
        assert folder.read().outcome == outcome


@pytest.mark.parametrize("command", ["train", "run"])
def test_a_stopped_run_says_by_which_command_it_goes_on(tmp_path: Path, command: str) -> None:
    """A run whose ranks could not say how it goes on names the command that started it."""
    stopped = records.record(outcome="running")
    if command == "run":
        stopped = stopped.model_copy(update={"config": {**stopped.config, "program": ["loop.py"]}})
    folder = records.run_folder(tmp_path / "run", stopped)
    with pytest.raises(Interrupted, match=f"go on with: rankwise {command} --resume"):
        _judge(MpiexecResult(1, True, ""), folder, 3, b"")


HYDRA = """
===================================================================================
=   BAD TERMINATION OF ONE OF YOUR APPLICATION PROCESSES
=   PID 28993 RUNNING AT vm
=   EXIT CODE: 9
=   CLEANING UP REMAINING PROCESSES
=   YOU CAN IGNORE THE BELOW CLEANUP MESSAGES
===================================================================================
YOUR APPLICATION TERMINATED WITH THE EXIT STRING: Killed (signal 9)
This typically refers to a problem with your application.
Please see the FAQ page for debugging suggestions
"""


def test_a_signal_is_one_on_mpich_too() -> None:
    """Of a rank that was killed MPICH's mpiexec gives the signal's number as code: it becomes what Open MPI's
    and shells say, and eleven lines become one."""
    shown: list[Line] = []
    code = f"import sys; print('mine'); print({HYDRA.strip()!r}); print('===='); sys.exit(9)"
    result = supervise(start([sys.executable, "-c", code], shown.append))
    assert [line.text for line in shown] == ["mine", "===="]
    assert (result.code, result.last_words) == (137, "a rank was ended by signal 9 (Killed)")


def test_what_killed_ranks_leave_in_shared_memory_is_removed(tmp_path: Path) -> None:
    """When an mpiexec is over, files of its job in shared memory go, and those of another one stay."""
    theirs = f"prterun-{socket.gethostname()}-{{}}@1"
    process = start([sys.executable, "-c", ""], print)
    kept, removed = (
        Path(f"/dev/shm/sm_segment.{tmp_path.name}.0.{segment_mark(theirs.format(pid))}.0")
        for pid in (process.process.pid + 1, process.process.pid)
    )
    for path in (kept, removed):
        path.touch()
    try:
        supervise(process)
        assert not removed.exists()
        assert kept.exists()
    finally:
        kept.unlink(missing_ok=True)
        removed.unlink(missing_ok=True)


def test_a_killed_mpiexec_of_the_same_number_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks start where an mpiexec of the same process number was killed and has left its session's folder,
    without which Open MPI begins: each start has a place of its own, of which nothing is left."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("local", "remote"):
        monkeypatch.delenv(f"PRTE_MCA_prte_{name}_tmpdir_base", raising=False)
    left = f"{tmp_path}/ompi.$$"
    stale = f"export TMPDIR={tmp_path}; mkdir {left}; touch {left}/pmix.$(hostname | cut -d. -f1).tool.$$"
    printed: list[str] = []
    # What a shell executes has its number.
    started = start(
        ["sh", "-c", f"{stale}; exec {find_mpiexec().path} -n 1 echo begun"],
        lambda line: printed.append(line.text),
    )
    assert (supervise(started).code, printed) == (0, ["begun"])
    assert not list((tmp_path / f"rankwise-{os.getuid()}").iterdir())
