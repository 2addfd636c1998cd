"""Ranks that are really killed, wherever they are in a run: the others go on, and nothing is lost."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rankwise.config import TrainConfig
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record
from rankwise.strategies import STRATEGIES

from . import digits, tiny
from .conftest import Command, mpiexec_words
from .effort import daily, only_in_full
from .processes import wait_for
from .test_cli import count_epochs
from .test_mpi import closes, ranks_of

pytestmark = [pytest.mark.mpi, pytest.mark.ulfm, pytest.mark.cold_in_full, pytest.mark.timeout(240)]

WAYS = [
    ("parameter-averaging", "master"),
    ("parameter-averaging", "allreduce"),
    ("replication", "master"),
    ("replication", "allreduce"),
    ("allreduce", "allreduce"),
    ("gradient-server", "master"),
    ("local-sgd", "allreduce"),
    ("local-sgd", "master"),
    ("post-local-sgd", "allreduce"),
    ("post-local-sgd", "master"),
    ("slowmo", "allreduce"),
    ("slowmo", "master"),
    ("diloco", "allreduce"),
    ("diloco", "master"),
    ("two-level", "allreduce"),
]
EVERY_DAY = {
    ("parameter-averaging", "master"),
    ("parameter-averaging", "allreduce"),
    ("allreduce", "allreduce"),
    ("gradient-server", "master"),
    ("two-level", "allreduce"),
}
"""The classes behind these names, with the topologies that each has: the other names are settings of one of
them, and `test_ranks_out_of_step` has the classes whose ranks do not meet."""

PHASES = ("compute", "exchange", "evaluation", "checkpoint", "recovery")
VICTIMS = [(ranks, rank) for ranks in (3, 5) for rank in range(ranks)]

SMALL = [*tiny.WORDS]


@dataclass(frozen=True)
class Kill:
    """A rank that kills itself in some epoch and phase."""

    rank: int
    epoch: int
    phase: str

    def __str__(self) -> str:
        step = ",step=2" if self.phase in ("compute", "exchange") else ""
        return f"kill:rank={self.rank},epoch={self.epoch},phase={self.phase}{step}"


CHAOS = os.environ.get("RANKWISE_CHAOS") == "full"
"""`make chaos` runs all cases, other runs a selection of them."""


def one_by_one() -> list[tuple[str, str, int, list[Kill]]]:
    """Every way, phase and victim, a run for each."""
    cases = []
    for way, phase, (ranks, rank) in itertools.product(WAYS, PHASES, VICTIMS):
        first = [Kill((rank + 1) % ranks, 1, "compute")] if phase == "recovery" else []
        cases.append((*way, ranks, [*first, Kill(rank, 1, phase)]))
    return cases


def one_after_the_other() -> list[tuple[str, str, int, list[Kill]]]:
    """A run of 6 ranks for every way, which loses one in each phase until a single one is left: the second
    dies while the others recover from the first. Rank 0 dies first in one way, second in the next."""
    cases = []
    for turn, way in enumerate(WAYS):
        victims = [(step - turn) % 6 for step in range(5)]
        phases = (("exchange", 1), ("recovery", 1), ("compute", 2), ("evaluation", 2), ("checkpoint", 3))
        kills = [Kill(victim, epoch, phase) for victim, (phase, epoch) in zip(victims, phases, strict=True)]
        cases.append((*way, 6, kills))
    return cases


OUT_OF_STEP = [("gossip", "ring"), ("easgd", "master"), ("downpour", "master")]


def test_the_selection_covers_what_it_says() -> None:
    """Every day each class of strategies that waits for all its ranks loses one in each phase, in each of its
    topologies, and each of the other classes loses some; over all ways rank 0 is lost in each phase."""
    classes = {
        (entry.strategy, topology)
        for entry in STRATEGIES.values()
        if entry.strategy.recovery.survives
        for topology in entry.topologies
    }
    in_step = {(STRATEGIES[name].strategy, topology) for name, topology in EVERY_DAY}
    others = {STRATEGIES[name].strategy for name, _ in OUT_OF_STEP}
    assert {one for one in classes if one[0] not in others} == in_step
    assert others < {strategy for strategy, _ in classes}
    lost = {
        ((strategy, topology), kill.phase)
        for strategy, topology, _, kills in one_after_the_other()
        for kill in kills
    }
    assert lost == set(itertools.product(WAYS, PHASES))
    zero = {kill.phase for *_, kills in one_after_the_other() for kill in kills if kill.rank == 0}
    assert zero == set(PHASES)


def survives(run: Record, dead: set[int]) -> None:
    """What holds of every run that went on: it is complete, no sample is lost or trained twice, every ledger
    closes, and the dead stand in it."""
    assert run.outcome == "completed", run.message
    assert [row.epoch for row in run.epochs] == list(range(1, run.config["epochs"] + 1))
    assert run.samples.trained == run.samples.expected > 0
    assert (run.samples.lost, run.samples.duplicated) == (0, 0)
    assert closes(run)
    assert {fault.rank for fault in run.faults} == dead
    assert {row.rank for row in run.ranks if row.died_at_s is not None} == dead
    assert [row.rank for row in run.ranks] == list(range(run.config["ranks"]))
    assert all(fault.action == "continue" for fault in run.faults)


@pytest.mark.parametrize(
    ("strategy", "topology", "ranks", "kills"),
    one_by_one()
    if CHAOS
    else daily(cases := one_after_the_other(), [c for c in cases if c[:2] in EVERY_DAY]),
    ids=str,
)
def test_killed_ranks_cost_nothing(
    command: Command, tmp_path: Path, strategy: str, topology: str, ranks: int, kills: list[Kill]
) -> None:
    """SIGKILL of any rank in any phase, inside the recovery from another kill too: the run goes on to its end
    with all samples."""
    epochs = max(kill.epoch for kill in kills) + 1
    words = [*SMALL, "--strategy", strategy, "--topology", topology, "--ranks", str(ranks)]
    words += [word for kill in kills for word in ("--fault", str(kill))]
    done = command.rankwise("train", *words, "--epochs", str(epochs), "--out", "run", timeout=200)
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    survives(run, {kill.rank for kill in kills})
    assert math.isfinite(run.epochs[-1].val_loss)
    assert ranks_of(tmp_path / "run") == []
    assert done.err.count("go on, after") >= 1
    assert "NBC_Progress" not in done.err


@only_in_full  # every day ranks that are threads show the same (test_survival)
@pytest.mark.parametrize(("strategy", "topology"), WAYS if CHAOS else WAYS[::7])
def test_killed_ranks_cost_no_accuracy(
    command: Command,
    config: Callable[..., TrainConfig],
    train_in_threads: Callable[..., tuple[Record, Any, Any]],
    tmp_path: Path,
    strategy: str,
    topology: str,
) -> None:
    """A run that really loses rank 0 and another ends within a point of the same run, in threads, that loses
    none."""
    options = {"ranks": 5, "epochs": 15, "strategy": strategy, "topology": topology, "schedule": "cosine"}
    options |= {"dataset": digits.DATASET, "model": digits.MODEL, "lr": 0.05, "batch_size": 16, "threads": 1}
    whole, _, _ = train_in_threads(config(**options), folder="whole")
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--fault", "kill:rank=0,epoch=5,step=2", "--fault", "kill:rank=3,epoch=9,phase=exchange"]
    done = command.rankwise("train", *words, "--out", "struck", timeout=200)
    assert done.code == 0, done
    struck = RunFolder(tmp_path / "struck").read()
    survives(struck, {0, 3})
    assert struck.epochs[-1].val_accuracy > whole.epochs[-1].val_accuracy - 0.01


@pytest.mark.parametrize(("strategy", "topology"), OUT_OF_STEP)
def test_ranks_out_of_step(command: Command, tmp_path: Path, strategy: str, topology: str) -> None:
    """Where ranks do not wait for each other they go on too, each from where it is, without the master as
    well."""
    kills = [Kill(1, 1, "exchange"), Kill(0, 2, "compute"), Kill(3, 2, "evaluation")]
    words = [*SMALL, "--strategy", strategy, "--topology", topology, "--ranks", "5", "--epochs", "3"]
    words += [word for kill in kills for word in ("--fault", str(kill))]
    done = command.rankwise("train", *words, "--out", "run")
    assert done.code == 0, done
    survives(RunFolder(tmp_path / "run").read(), {0, 1, 3})


@pytest.mark.parametrize(
    ("strategy", "topology"),
    daily([("parameter-averaging", "master"), ("allreduce", "allreduce")], [("allreduce", "allreduce")]),
)
def test_spares_come_in(command: Command, tmp_path: Path, strategy: str, topology: str) -> None:
    """Spares take the places of rank 0 and, in a recovery, of one of themselves: the run ends at full
    strength with all samples, and the last spare, which was not needed, ends with it."""
    kills = [Kill(0, 1, "exchange"), Kill(3, 2, "evaluation"), Kill(2, 2, "recovery")]
    words = [*SMALL, "--strategy", strategy, "--topology", topology, "--ranks", "3", "--epochs", "3"]
    words += [word for kill in kills for word in ("--fault", str(kill))]
    done = command.rankwise("train", *words, "--spares", "4", "--out", "run")
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    assert run.outcome == "completed", run.message
    assert run.samples.trained == run.samples.expected == 3 * tiny.TRAIN
    assert {fault.rank for fault in run.faults} == {0, 2, 3}
    roles = {row.rank: row.role for row in run.ranks}
    assert list(roles) == list(range(7))
    assert [rank for rank, role in roles.items() if role == "spare"] == [6]
    assert closes(run)
    assert ranks_of(tmp_path / "run") == []


@pytest.mark.cold
@only_in_full
def test_a_spare_that_died_in_its_sleep(command: Command, tmp_path: Path) -> None:
    """kill -9 of a rank that stands by disturbs nobody; when it is missed, the others go on with fewer."""
    words = [*SMALL, "--ranks", "3", "--spares", "1", "--epochs", "2000", "--out", "run"]
    process = command.start(sys.executable, "-m", "rankwise", "train", *words)
    folder = tmp_path / "run"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and count_epochs(folder) >= 2)
    for victim in (-1, 0):
        before = count_epochs(folder)
        os.kill(ranks_of(folder)[victim], signal.SIGKILL)
        wait_for(lambda before=before: count_epochs(folder) >= before + 3, 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    run = RunFolder(folder).read()
    assert (run.outcome, [fault.rank for fault in run.faults]) == ("interrupted", [0])
    assert closes(run)


@pytest.mark.parametrize("strategy", daily(["parameter-averaging", "allreduce"], ["parameter-averaging"]))
def test_only_one_is_left(command: Command, tmp_path: Path, strategy: str) -> None:
    """All ranks but one are killed, two of them at once: the last trains what is left by itself."""
    faults = ["kill:rank=0,epoch=1,step=2", "kill:rank=2,epoch=1,step=2", "kill:rank=1,epoch=2,step=3"]
    words = [*SMALL, "--strategy", strategy, "--ranks", "4", "--epochs", "3"]
    words += [word for fault in faults for word in ("--fault", fault)]
    done = command.rankwise("train", *words, "--out", "run")
    assert done.code == 0, done
    survives(RunFolder(tmp_path / "run").read(), {0, 1, 2})


def test_a_kill_that_nobody_asked_for(command: Command, tmp_path: Path) -> None:
    """kill -9 from outside is survived as one on demand is; rank 0 is another one then, and Ctrl-C still
    stops the run, which goes on later with all its ranks."""
    words = [*SMALL, "--epochs", "2000", "--ranks", "3", "--out", "run"]
    # What is killed is a Python of its own; what goes on later need not be.
    process = command.start(sys.executable, "-m", "rankwise", "train", *words)
    folder = tmp_path / "run"
    wait_for(lambda: (folder / "metrics.jsonl").exists() and count_epochs(folder) >= 2)
    os.kill(ranks_of(folder)[0], signal.SIGKILL)
    before = count_epochs(folder)
    wait_for(lambda: count_epochs(folder) >= before + 3, 30)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 130, err
    run = RunFolder(folder).read()
    assert (run.outcome, len(run.faults), run.faults[0].kind) == ("interrupted", 1, "lost")
    assert closes(run)
    epochs = len(run.epochs) + 2
    again = command.rankwise("train", "--resume", "run", "--epochs", str(epochs))
    assert again.code == 0, again
    run = RunFolder(folder).read()
    assert (run.outcome, len(run.epochs), len(run.ranks)) == ("completed", epochs, 3)
    assert run.samples.trained == run.samples.expected
    assert all(row.died_at_s is None for row in run.ranks)


def test_a_rank_that_raises(command: Command, tmp_path: Path) -> None:
    """An exception on one rank is told in one line, and the others go on."""
    words = [*SMALL, "--ranks", "3", "--epochs", "2", "--fault", "crash:rank=1,epoch=1,step=3"]
    done = command.rankwise("train", *words, "--fail-on-lost-rank", "--out", "run")
    assert done.code == 1, done  # though the run is complete
    assert done.out.splitlines()[-1] == "lost rank 1 (crash) in epoch 1, and went on"
    assert done.told == [
        "rankwise: lost rank 1 (crash) in epoch 1, and went on: --fail-on-lost-rank was given"
    ]
    run = RunFolder(tmp_path / "run").read()
    survives(run, {1})
    assert run.faults[0].kind == "crash"
    told = [line for line in done.err.splitlines() if line.startswith("lost rank 1")]
    assert len(told) == 1
    assert "InjectedCrash" in told[0]
    assert "Traceback" not in done.err


def test_all_ranks_raise(command: Command, tmp_path: Path) -> None:
    """An error that all ranks make is the program's own: it ends the run at once with code 1 and one line."""
    faults = [word for rank in range(3) for word in ("--fault", f"crash:rank={rank},epoch=1,step=1")]
    done = command.rankwise("train", *SMALL, "--ranks", "3", "--epochs", "2", *faults, "--out", "run")
    assert done.code == 1, done
    assert len(done.told) == 1
    assert "InjectedCrash" in done.told[0]
    assert "starting again" not in done.err
    assert RunFolder(tmp_path / "run").read().outcome == "failed"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            "raise ValueError(f'a white image in {len(x)}')",
            "ValueError in brittle.py, line 9: a white image in",
        ),
        ("ctypes.string_at(0)", r"Segmentation fault in __init__.py, line \d+, called in brittle.py, line 9"),
        pytest.param("os.abort()", "Aborted in brittle.py, line 9", marks=pytest.mark.full),
    ],
    ids=["exception", "SIGSEGV", "SIGABRT"],
)
def test_an_error_of_a_sample_hunts_no_rank(command: Command, tmp_path: Path, error: str, line: str) -> None:
    """An error that a sample makes, an exception or a crash of what is not Python, ends the rank that has it,
    and the one to which it is dealt then: the second one ends the run, as the program's error, in one line
    with code 1, and no further rank is lost."""
    (tmp_path / "brittle.py").write_text(
        "import ctypes, os; from torch import nn\n"
        "from tests import tiny\n"
        "class Brittle(nn.Module):\n"
        "    def __init__(self, shape, classes):\n"
        "        super().__init__()\n"
        "        self.net = tiny.net(shape, classes)\n"
        "    def forward(self, x):\n"
        "        if self.training and (x > 0.999).all(dim=(1, 2, 3)).any():\n"
        f"            {error}\n"
        "        return self.net(x)\n"
        "def images():\n"
        "    train, labels, *validation = tiny.images()\n"
        "    train[17] = 255\n"
        "    return train, labels, *validation\n"
    )
    words = ["--dataset", "brittle:images", "--model", "brittle:Brittle", "--batch-size", "16"]
    done = command.rankwise(
        "train", *words, "--ranks", "4", "--strategy", "allreduce", "--epochs", "2", "--out", "run"
    )
    assert done.code == 1, done
    (told,) = done.told
    assert re.search(line, told), told
    assert "one rank after the other" in told
    assert "starting again" not in done.err
    assert "Traceback" not in done.err
    assert "*** Process received signal" not in done.err
    left = RunFolder(tmp_path / "run").read_all_words()
    assert len(left) == 2, left
    assert RunFolder(tmp_path / "run").read().outcome == "failed"
    assert ranks_of(tmp_path / "run") == []


@pytest.mark.cold
def test_a_rank_that_hangs(command: Command, tmp_path: Path) -> None:
    """A stopped process is found, named and killed after --hang-timeout, and the others go on."""
    words = [*SMALL, "--ranks", "3", "--epochs", "2", "--hang-timeout", "2"]
    done = command.rankwise("train", *words, "--fault", "hang:rank=0,epoch=1,step=2", "--out", "run")
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    survives(run, {0})
    (fault,) = run.faults
    assert fault.kind == "hang"
    assert fault.detected_after_s is not None
    assert fault.detected_after_s > 1
    assert "no sign of life" in done.err
    assert "waiting for it: rank" in done.err


@pytest.mark.parametrize("kind", daily(["kill", "crash"], ["kill"]))
def test_a_run_is_started_again(command: Command, tmp_path: Path, kind: str) -> None:
    """With --on-failure restart all ranks begin again from the newest checkpoint, and the fault does not come
    back; the record holds it, and the samples of every epoch once."""
    words = [*SMALL, "--ranks", "3", "--epochs", "3", "--on-failure", "restart"]
    done = command.rankwise("train", *words, "--fault", f"{kind}:rank=1,epoch=3,step=2", "--out", "run")
    assert done.code == 0, done
    run = RunFolder(tmp_path / "run").read()
    # The newest checkpoint was just being written when the rank died, or had been.
    assert (run.outcome, len(run.epochs)) == ("completed", 3)
    assert run.resumed_from_epoch in (1, 2)
    assert run.samples.trained == run.samples.expected == 3 * tiny.TRAIN
    (fault,) = run.faults
    assert (fault.rank, fault.kind, fault.epoch, fault.action) == (1, kind, 3, "restart")
    assert fault.recovered_after_s is not None
    assert fault.recovered_after_s > 1
    assert done.err.count("starting again in") == 1


def test_too_few_ranks_train_until_others_take_over(command: Command, tmp_path: Path) -> None:
    """When fewer than --min-ranks are left they train until as many as before take over; where the run may
    not be started again it fails, with the reason."""
    words = [*SMALL, "--ranks", "3", "--min-ranks", "3", "--fault", "kill:rank=2,epoch=2,step=2"]
    folder = RunFolder(tmp_path / "run")
    words += ["--epochs", "100000"]
    run = command.start(command.python, "-m", "rankwise", "train", *words, "--out", "run")
    wait_for(lambda: folder.record.exists() and folder.read().generation == 1)
    run.send_signal(signal.SIGINT)
    _, told = run.communicate(timeout=60)
    assert run.returncode == 130, told
    record = folder.read()
    assert [(fault.rank, fault.action) for fault in record.faults] == [(2, "continue")]
    assert [row.died_at_s is None for row in record.ranks] == [True] * 3
    assert record.samples.trained == record.samples.expected
    assert (record.samples.lost, record.samples.duplicated) == (0, 0)
    done = command.rankwise("train", *words, "--max-restarts", "0", "--out", "fails")
    assert done.code == 1, done
    assert done.told == ["rankwise: 2 ranks are left, fewer than the 3 of --min-ranks"]
    assert RunFolder(tmp_path / "fails").read().outcome == "failed"


def test_restarts_come_to_an_end(command: Command, tmp_path: Path) -> None:
    """After --max-restarts the run fails with the reason and code 1, and can be resumed."""
    words = [*SMALL, "--ranks", "2", "--epochs", "2", "--on-failure", "restart", "--max-restarts", "1"]
    faults = [word for epoch in (1, 2) for word in ("--fault", f"kill:rank=1,epoch={epoch},step=2")]
    done = command.rankwise("train", *words, *faults, "--out", "run")
    assert done.code == 1, done
    assert len(done.told) == 1
    run = RunFolder(tmp_path / "run").read()
    assert (run.outcome, len(run.epochs), len(run.faults)) == ("failed", 1, 1)
    assert command.rankwise("train", "--resume", "run").code == 0


@only_in_full
@pytest.mark.cold
def test_under_a_given_mpiexec(command: Command, tmp_path: Path) -> None:
    """The user's own mpiexec --with-ft ulfm is enough for ranks to go on, and progress is still shown when
    rank 0 is gone; without it they are told so."""
    words = ["-m", "rankwise", "train", *SMALL, "--epochs", "2", "--out", "run", "--strategy", "local-sgd"]
    mpiexec = mpiexec_words(3)
    tolerant = [mpiexec[0], "--with-ft", "ulfm", *mpiexec[1:]]
    done = command(*tolerant, sys.executable, *words, "--fault", "kill:rank=0,epoch=1,step=2")
    assert (done.out + done.err).count("epoch 2/2") == 1, done
    survives(RunFolder(tmp_path / "run").read(), {0})
    refused = command(*mpiexec, sys.executable, *words[:-4], "--on-failure", "continue")
    assert refused.code == 2, refused
    assert "mpiexec --with-ft ulfm" in refused.err


@pytest.mark.parametrize("strategy", ["ddp", "paper-stopwatch"])
def test_strategies_that_cannot_go_on(command: Command, strategy: str) -> None:
    """A strategy whose ranks cannot do without one of them refuses --on-failure continue in one line, before
    a rank is started."""
    done = command.rankwise(
        "train", *SMALL, "--ranks", "3", "--strategy", strategy, "--on-failure", "continue"
    )
    assert done.code == 2, done
    assert f"--strategy {strategy}" in done.err
    assert len(done.err.splitlines()) == 1


def test_the_words_of_a_crash_are_kept(command: Command, tmp_path: Path) -> None:
    """The traceback of a rank that ended is in the run folder, for whoever looks for the cause."""
    words = [*SMALL, "--ranks", "2", "--epochs", "1", "--fault", "crash:rank=1"]
    assert command.rankwise("train", *words, "--out", "run").code == 0
    (path,) = (tmp_path / "run" / "last-words").iterdir()
    assert "Traceback" in json.loads(path.read_bytes())["traceback"]
