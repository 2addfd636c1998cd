"""Ranks under a real mpiexec: the world, whole runs, failures and signals."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import effort, tiny
from .conftest import MPI_SIZES, SURROUNDINGS, Command, mpiexec_words, read_weights
from .processes import wait_for
from .test_cli import count_epochs

pytestmark = [pytest.mark.mpi, pytest.mark.timeout(240)]

SMALL = [*tiny.WORDS, "--epochs", "2"]


def train(*words: str) -> list[str]:
    return ["-m", "rankwise", "train", *words]


def record(folder: Path) -> Record:
    return RunFolder(folder).read()


def closes(run: Record) -> bool:
    """Whether every rank's phases add up to its wall time, and its waits for others to its waiting."""
    return all(
        sum(row.phases_ns.values()) == row.wall_ns and sum(row.wait_on_ns.values()) == row.phases_ns["wait"]
        for row in run.ranks
    )


@pytest.mark.parametrize("ranks", MPI_SIZES)
def test_the_world_keeps_its_contract(command: Command, ranks: int) -> None:
    """MPI's world does what the world of threads does, for any number of ranks."""
    program = Path(__file__).parent / "world_contract.py"
    done = command.mpiexec(ranks, str(program))
    assert done.code == 0, done
    # MPICH's mpiexec may write one rank's line into another's.
    assert sorted(re.findall(rf"\d/{ranks}", done.out)) == [f"{rank}/{ranks}" for rank in range(ranks)]


@pytest.mark.parametrize("ranks", MPI_SIZES)
def test_our_own_launcher(command: Command, tmp_path: Path, ranks: int) -> None:
    """`train --ranks N` starts the ranks itself; the record shows them; stdout holds only JSON if asked."""
    done = command.rankwise("train", *SMALL, "--ranks", str(ranks), "--out", "run", "--format", "json")
    assert done.code == 0, done
    run = record(tmp_path / "run")
    assert Record.model_validate(done.json) == run
    assert run.outcome == "completed"
    assert [row.rank for row in run.ranks] == list(range(ranks))
    assert run.samples.trained == run.samples.expected == 2 * tiny.TRAIN
    assert closes(run)
    assert run.environment.hosts[0].ranks == ranks
    assert len([line for line in done.err.splitlines() if line.startswith("epoch")]) == 2


@pytest.mark.parametrize("ranks", effort.daily(MPI_SIZES, [1, 5]))
def test_a_given_mpiexec(command: Command, tmp_path: Path, ranks: int) -> None:
    """Under the user's own mpiexec the ranks that are given are used, and rank 0 alone speaks."""
    topology = "allreduce" if ranks == 1 else "master"
    words = [*SMALL, "--strategy", "parameter-averaging", "--topology", topology, "--out", "run"]
    done = command.mpiexec(ranks, *train(*words))
    assert done.code == 0, done
    run = record(tmp_path / "run")
    assert (len(run.ranks), run.config["ranks"], run.outcome) == (ranks, ranks, "completed")
    assert done.out.count("run folder: run") == 1
    assert done.err.count("epoch 2/2") == 1


@pytest.mark.parametrize("topology", effort.daily(["master", "allreduce"], ["master"]))
def test_mpi_and_threads_give_the_same(command: Command, tmp_path: Path, topology: str) -> None:
    """Twice the same run gives the same bits under MPI too; a master's sums are those of threads."""
    words = [*SMALL, "--ranks", "3", "--topology", topology, "--threads", "1"]
    for name in ("one", "two"):
        done = command.rankwise("train", *words, "--out", name)
        assert done.code == 0, done
    one, two = (read_weights(RunFolder(tmp_path / name)) for name in ("one", "two"))
    assert all((one[name] == two[name]).all() for name in one)
    if topology == "master":
        from rankwise.comm import run_in_threads
        from rankwise.config import TrainConfig
        from rankwise.plan import resolve
        from rankwise.training.rank import run

        config = resolve(
            TrainConfig(dataset=tiny.DATASET, model=tiny.MODEL, lr=0.02, epochs=2, ranks=3, threads=1)
        )
        folder = RunFolder(tmp_path / "threads")
        folder.create()
        run_in_threads(3, lambda world: run(config, world, folder, say=print))
        threads = read_weights(folder)
        assert all((one[name] == threads[name]).all() for name in one)


@effort.only_in_full
def test_resume_to_the_bit_under_mpi(command: Command, tmp_path: Path) -> None:
    """A run whose launcher was killed leaves no rank behind, and resumed ends with the bits of one that
    was not."""
    words = [*tiny.WORDS, "--ranks", "3", "--flip", "random"]
    whole = command.rankwise("train", *words, "--epochs", "40", "--out", "whole")
    assert whole.code == 0, whole
    process = command.start(sys.executable, *train(*words, "--epochs", "40", "--out", "killed"))
    wait_for(lambda: (tmp_path / "killed/metrics.jsonl").exists() and count_epochs(tmp_path / "killed") >= 2)
    ranks = ranks_of(tmp_path / "killed")
    process.kill()
    process.wait(10)
    command.belongings.launcher_was_killed = True
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in ranks), 20)
    assert record(tmp_path / "killed").outcome in ("running", "interrupted")
    done = command.rankwise("train", "--resume", "killed")
    assert done.code == 0, done
    one, two = (read_weights(RunFolder(tmp_path / name)) for name in ("whole", "killed"))
    assert all((one[name] == two[name]).all() for name in one)
    losses = [[row.train_loss for row in record(tmp_path / name).epochs] for name in ("whole", "killed")]
    assert losses[0] == losses[1]


def ranks_of(folder: Path) -> list[int]:
    """The processes of the ranks that our launcher started for this run folder, in rank order where they
    show it (forks of a warm Python do not)."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd", "environ"]):
        words = process.info["cmdline"] or []
        if not ("rankwise.launch.rank" in words and "python" in Path(words[0]).name and process.info["cwd"]):
            continue
        if Path(process.info["cwd"], words[-1]) == folder.absolute():
            known = process.info["environ"] or {}
            rank = known.get("OMPI_COMM_WORLD_RANK", known.get("PMI_RANK", "-1"))
            found.append((int(rank), process.pid))
    return [pid for _, pid in sorted(found)]


def test_a_ranks_command_line_shows_its_run_folder(command: Command, tmp_path: Path) -> None:
    """A rank is started with its run folder alone, which its command line shows."""
    words = [*tiny.WORDS, "--epochs", "2000", "--ranks", "2"]
    process = command.start(sys.executable, *train(*words))
    wait_for(lambda: list(tmp_path.glob("runs/*/record.json")))
    (folder,) = tmp_path.glob("runs/*")
    lines = [" ".join(psutil.Process(pid).cmdline()) for pid in ranks_of(folder)]
    assert len(lines) == 2
    assert all(line.endswith(f"-P -m rankwise.launch.rank runs/{folder.name}") for line in lines)
    process.terminate()
    assert process.wait(30) == 130


FAULTY = """
import os
from rankwise.comm.mpi_environment import placement
from torch import nn

class Net(nn.Sequential):
    steps = 0
    def __init__(self, shape, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, classes))
    def forward(self, x):
        Net.steps += self.training
        if Net.steps == 10 and placement().rank == int(os.environ["FAULTY_RANK"]):
            raise ValueError("on purpose")
        return super().forward(x)
"""


@pytest.mark.parametrize(
    ("ranks", "faulty", "topology", "launcher"),
    effort.rotating(
        [(3, 1, "master"), (3, 2, "master"), (2, 0, "allreduce"), (5, 4, "allreduce")], ["ours", "given"]
    ),
)
def test_a_rank_that_raises_ends_the_job(
    command: Command, tmp_path: Path, ranks: int, faulty: int, topology: str, launcher: str
) -> None:
    """A rank that raises ends all ranks, with one message that names it, code 1, the record `failed`, and no
    process left behind."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    words = [
        *tiny.WORDS[:2],
        "--model",
        "faulty:Net",
        "--epochs",
        "50",
        "--topology",
        topology,
        "--on-failure",
        "stop",
        "--out",
        "run",
    ]
    environment = {"FAULTY_RANK": str(faulty)}
    if launcher == "ours":
        done = command.rankwise("train", *words, "--ranks", str(ranks), **environment)
    else:
        done = command.mpiexec(ranks, *train(*words), **environment)
    assert done.code == 1, done
    assert len(done.told) == 1, done
    assert f"rank {faulty} on " in done.told[0]
    assert "ValueError: on purpose" in done.told[0]
    assert "Traceback" not in done.err
    if launcher == "ours":
        assert [
            line for line in done.err.splitlines() if not line.startswith(("epoch", "preparing", "overs"))
        ] == done.told
    run = record(tmp_path / "run")
    assert run.outcome == "failed"
    assert "on purpose" in (run.message or "")
    failure = json.loads((tmp_path / "run" / "failure.json").read_bytes())
    assert "Traceback" in failure["traceback"]
    assert (tmp_path / "run" / "checkpoints").exists()
    assert ranks_of(tmp_path / "run") == []


def test_a_killed_rank_ends_the_job(command: Command, tmp_path: Path) -> None:
    """With --on-failure stop a rank killed from outside ends the job with code 1, one message, and the record
    `failed`."""
    words = [*tiny.WORDS, "--epochs", "5000", "--ranks", "3", "--out", "run"]
    process = command.start(sys.executable, *train(*words, "--on-failure", "stop"))
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and count_epochs(tmp_path / "run") >= 1)
    os.kill(ranks_of(tmp_path / "run")[-1], signal.SIGKILL)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 1
    assert len([line for line in err.splitlines() if line.startswith("rankwise: ")]) == 1
    assert record(tmp_path / "run").outcome == "failed"
    wait_for(lambda: ranks_of(tmp_path / "run") == [], 20)


@pytest.mark.alone  # how soon it ends tells whether it ended by itself
@pytest.mark.parametrize(
    ("ranks", "topology", "strategy", "number"),
    [
        (2, "allreduce", "parameter-averaging", signal.SIGINT),
        (3, "master", "paper-stopwatch", signal.SIGUSR1),
        (5, "master", "parameter-averaging", signal.SIGTERM),
    ],
)
def test_stopping_several_ranks(
    command: Command, tmp_path: Path, ranks: int, topology: str, strategy: str, number: signal.Signals
) -> None:
    """Ctrl-C, SIGTERM and SIGUSR1 end all ranks in order, in the middle of an epoch too: code 130, one
    message, the record `interrupted` with closed ledgers, and a checkpoint from which the run goes on."""
    words = ["--dataset", "synthetic:5000", "--epochs", "100", "--ranks", str(ranks), "--topology", topology]
    process = command.start(command.python, *train(*words, "--strategy", strategy, "--out", "run"))
    wait_for(lambda: (tmp_path / "run/.progress").exists())
    time.sleep(0.5)
    asked = time.monotonic()
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    assert time.monotonic() - asked < 15, "it hung until it was killed"
    assert len([line for line in err.splitlines() if line.startswith("rankwise: ")]) == 1
    run = record(tmp_path / "run")
    assert run.outcome == "interrupted"
    assert closes(run)
    assert len(run.ranks) == ranks
    assert ranks_of(tmp_path / "run") == []
    again = command.rankwise("train", "--resume", "run", "--epochs", str(len(run.epochs) + 1))
    assert again.code == 0, again
    assert record(tmp_path / "run").outcome == "completed"


def test_stopping_a_given_mpiexec(command: Command, tmp_path: Path) -> None:
    """When the user's own mpiexec is stopped, the last epoch's record and checkpoint lie on disk."""
    words = [*tiny.WORDS, "--epochs", "5000", "--out", "run"]
    process = command.start(*mpiexec_words(3), command.python, *train(*words))
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").exists() and count_epochs(tmp_path / "run") >= 2)
    process.send_signal(signal.SIGINT)
    process.wait(30)
    run = record(tmp_path / "run")
    assert run.outcome in ("running", "interrupted")
    assert len(run.epochs) >= 2
    done = command.rankwise("train", "--resume", "run", "--epochs", str(len(run.epochs) + 2))
    assert done.code == 0, done


def test_different_options_on_ranks(command: Command) -> None:
    """Ranks that were given different options are told which, once, with code 2, and nothing is left."""
    base = ["-n", "1", command.python, *train(*tiny.WORDS[:4], "--epochs", "2", "--out", "run")]
    done = command(*mpiexec_words(1)[:-2], *base, "--lr", "0.1", ":", *base, "--lr", "0.2")
    assert done.code == 2, done
    assert len(done.told) == 1, done
    assert "--lr" in done.told[0]


def test_debug_shows_the_traceback_of_the_rank(command: Command) -> None:
    """With --debug the launcher shows where the rank was that failed, and only then."""
    words = [*tiny.WORDS[:2], "--model", "nothing:Here", "--ranks", "2"]
    done = command.rankwise("train", *words, "--debug")
    assert done.code == 2, done
    assert "Traceback" in done.err.partition("On rank ")[2]
    assert "Traceback" not in command.rankwise("train", *words).err


@pytest.mark.parametrize("launcher", ["ours", "given"])
def test_wrong_use_is_told_once(command: Command, tmp_path: Path, launcher: str) -> None:
    """What only the ranks can find out, and all of them do, is told in one line with code 2, and no run
    folder is left behind."""
    words = [*tiny.WORDS[:2], "--model", "nothing:Here", "--out", "run"]
    if launcher == "ours":
        done = command.rankwise("train", *words, "--ranks", "3")
    else:
        done = command.mpiexec(3, *train(*words))
    assert done.code == 2, done
    assert len(done.told) == 1, done
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ranks", effort.daily([1, 2, 5], [1, 2]))
def test_the_example_runs_on_any_number_of_ranks(command: Command, ranks: int) -> None:
    """examples/own_loop.py, a PyTorch loop put in step by five lines, learns on any number of ranks."""
    example = Path(__file__).parents[1] / "examples" / "own_loop.py"
    done = command.mpiexec(ranks, str(example), OMP_NUM_THREADS="1")
    assert done.code == 0, done
    assert done.out.startswith(f"{ranks} ranks, accuracy ")
    assert float(done.out.split()[-1].rstrip("%")) > 85
    lines = example.read_text().splitlines()
    assert len(lines) < 60
    assert sum(bool(re.search(r"  # \d", line)) for line in lines) == 5
    if ranks == 1:
        assert command(command.python, str(example), OMP_NUM_THREADS="1").out == done.out


def test_the_example_of_own_images(command: Command, tmp_path: Path) -> None:
    """examples/own_images.py, a user's own images and network, trains with the command that it names."""
    example = Path(__file__).parents[1] / "examples" / "own_images.py"
    (tmp_path / example.name).write_text(example.read_text())
    words = re.search(r"rankwise (train .*)", example.read_text())
    assert words is not None
    done = command.rankwise(*words[1].split(), "--out", "run")
    assert done.code == 0, done
    assert record(tmp_path / "run").epochs[-1].val_accuracy > 0.9


def test_an_error_in_a_users_own_loop_ends_all_ranks(command: Command, tmp_path: Path) -> None:
    """An uncaught exception in one rank of a user's own script ends the others instead of hanging them, and
    each part of the script that joins gets the same world."""
    (tmp_path / "own.py").write_text(
        "import rankwise\n"
        "world = rankwise.join()\n"
        "assert rankwise.join() is world\n"
        "if world.rank == 1: raise ValueError('on purpose')\n"
        "world.barrier()\n"
    )
    done = command.mpiexec(3, "own.py", timeout=90)
    assert done.code != 0
    assert "rank 1 failed" in done.err


def test_the_public_function(command: Command, tmp_path: Path) -> None:
    """`rankwise.train` does in a script what the command line does, several ranks included."""
    (tmp_path / "own.py").write_text(
        "import rankwise\n"
        f"tiny = dict(dataset={tiny.DATASET!r}, model={tiny.MODEL!r})\n"
        "options = dict(**tiny, ranks=3, epochs=1, out='run', flip='random')\n"
        "config = rankwise.TrainConfig(**options)\n"
        "record = rankwise.train(config)\n"
        "print(record.outcome, len(record.ranks), record.config['flip'])\n"
    )
    done = command(command.python, "own.py")
    assert done.code == 0, done
    assert done.out.split() == ["completed", "3", "random"]


def test_a_live_bar_on_a_terminal(command: Command, tmp_path: Path) -> None:
    """On a terminal a bar shows epoch, samples a second, loss, accuracy and the time left."""
    words = train("--dataset", "synthetic:8000", "--ranks", "3", "--epochs", "2", "--out", "run")
    mine, theirs = pty.openpty()
    with subprocess.Popen(
        [command.python, *words],
        cwd=tmp_path,
        env=os.environ | SURROUNDINGS | {"COLUMNS": "140", "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        screen = b""
        with contextlib.suppress(OSError):  # Linux says that a terminal was closed by an error
            while chunk := os.read(mine, 65536):
                screen += chunk
    os.close(mine)
    assert process.returncode == 0, screen
    for word in ("epoch 2/2", "samples/s", "loss ", "accuracy ", "left", "run folder"):
        assert word in screen.decode(errors="replace")


@pytest.mark.parametrize("ranks", effort.daily(MPI_SIZES, [2]))
def test_every_strategy_under_mpi(command: Command, ranks: int) -> None:
    """Each strategy with each compression that it takes does under MPI what it does on threads: all samples
    are committed, replicas agree, the ledger closes."""
    program = Path(__file__).parent / "strategies" / "under_mpi.py"
    done = command.mpiexec(ranks, "-m", f"tests.strategies.{program.stem}", cwd=program.parents[2])
    assert done.code == 0, done
    assert done.out.split() == ["ok"]


def test_ddp_is_allreduce(command: Command, tmp_path: Path) -> None:
    """PyTorch's DistributedDataParallel ends near the weights of our own allreduce: the same algorithm, but
    for the weight of ragged last batches."""
    for name in ("ddp", "allreduce"):
        done = command.rankwise("train", *SMALL, "--ranks", "3", "--strategy", name, "--out", name)
        assert done.code == 0, done
        assert closes(record(tmp_path / name))
    one, two = (read_weights(RunFolder(tmp_path / name)) for name in ("ddp", "allreduce"))
    for key, value in one.items():
        assert (value - two[key]).abs().max() < 0.02, key


@effort.only_in_full
def test_the_example_of_an_own_strategy(command: Command, tmp_path: Path) -> None:
    """examples/majority_vote.py, a strategy in a user's own file, trains with the command that it names."""
    example = Path(__file__).parents[1] / "examples" / "majority_vote.py"
    (tmp_path / example.name).write_text(example.read_text())
    words = re.search(r"rankwise (train .*)", example.read_text())
    assert words is not None
    done = command.rankwise(*words[1].split(), "--epochs", "10", "--out", "run")
    assert done.code == 0, done
    run = record(tmp_path / "run")
    assert run.best.val_accuracy > 0.9
    assert run.samples.trained == run.samples.expected
    assert closes(run)
