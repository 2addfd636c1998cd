"""A run that goes on with other ranks while it trains."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from rankwise.config import TrainConfig
from rankwise.errors import ConfigError, StorageError, UsageError
from rankwise.launch.backoff import RestartBackoff
from rankwise.launch.elastic import Elastic
from rankwise.launch.generations import Generations, resized
from rankwise.launch.order import Order
from rankwise.launch.plan_file import read_asked, read_plan, write_plan
from rankwise.launch.running import resize as resize_run
from rankwise.launch.supervision import MpiexecResult
from rankwise.plan import RunPlan, recorded_plan, resolve
from rankwise.program_plan import program_plan
from rankwise.runs import resize
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from .conftest import Command
from .processes import wait_for
from .test_mpi import closes
from .test_running import running

SMALL = ("--dataset", "digits", "--model", "mlp", "--lr", "0.01", "--strategy", "allreduce")


class Running:
    """A run that trains until it is told to stop."""

    def __init__(self, command: Command, tmp_path: Path, *words: str, out: str = "run") -> None:
        self.command = command
        self.folder = RunFolder(tmp_path / out)
        words = words or ("train", "--resume", out)
        if words[0].startswith("-"):
            words = ("train", *SMALL, "--epochs", "100000", "--out", out, *words)
        self.process = command.start(command.python, "-m", "rankwise", *words)
        epochs = len(self.folder.read_metrics())
        wait_for(lambda: len(self.folder.read_metrics()) > epochs)

    def resize(self, *words: str) -> Any:
        """Ask for other ranks, and wait for them."""
        return self.command.rankwise("resize", "run", *words)

    def stop(self) -> Record:
        """Let it save, and end; all is as it should be then."""
        epoch = len(self.folder.read().epochs)
        wait_for(lambda: len(self.folder.read().epochs) > epoch + 1)
        self.process.send_signal(signal.SIGINT)
        _, told = self.process.communicate(timeout=60)
        assert self.process.returncode == 130, told
        record = self.folder.read()
        assert record.outcome == "interrupted", told
        assert record.samples.trained == record.samples.expected > 0
        assert (record.samples.lost, record.samples.duplicated) == (0, 0)
        assert [row.epoch for row in record.epochs] == list(range(1, len(record.epochs) + 1))
        assert closes(record)
        for generation in record.earlier:
            assert all(sum(row.phases_ns.values()) == row.wall_ns for row in generation.ranks)
        return record


@pytest.mark.mpi
@pytest.mark.timeout(200)
def test_a_run_goes_on_with_more_and_with_fewer_ranks(command: Command, tmp_path: Path) -> None:
    """Resized in the middle of epochs it trains each sample once, in one record: each generation has its
    ranks' rows, and the pause between them is `recovery`, no start-up."""
    run = Running(command, tmp_path, "--ranks", "2")
    for ranks in (3, 1):
        done = run.resize("--ranks", str(ranks))
        assert done.code == 0, done
        assert done.out.startswith(f"run: {ranks} rank")
        assert run.folder.read().config["ranks"] == ranks
    record = run.stop()
    assert (len(record.ranks), record.generation, record.config["ranks"]) == (1, 2, 1)
    assert [len(generation.ranks) for generation in record.earlier] == [2, 3]
    for pause_s, ranks in (
        (record.earlier[1].pause_s, record.earlier[1].ranks),
        (record.pause_s, record.ranks),
    ):
        assert pause_s is not None
        assert 0 < pause_s < 30
        assert all(row.phases_ns["startup"] == 0 < row.phases_ns["recovery"] for row in ranks)


LOOP = """
import torch, torch.nn.functional as F, rankwise
from torch.utils.data import DataLoader, TensorDataset
run = rankwise.Run()
x = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
model = run.model(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
loader = run.loader(DataLoader(TensorDataset(x), batch_size=4, shuffle=True))
run.keep(optimizer=optimizer)
for epoch in run.epochs(100000):
    for (batch,) in loader:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
"""


@pytest.mark.timeout(60)
def test_a_program_that_fails_while_it_waits_harms_no_run(command: Command, tmp_path: Path) -> None:
    """Ranks that were to take over, and do not come to a `Run`, leave nothing in the folder of the run that
    goes on."""
    for script, code in (("x = 1", 2), ("raise ValueError", 1)):
        (tmp_path / "loop.py").write_text(script)
        folder = RunFolder(tmp_path / "run")
        folder.path.mkdir(exist_ok=True)
        config = TrainConfig(ranks=1)
        write_plan(folder, config, program_plan(config, ("loop.py",)), is_next=True)
        done = command(command.python, "-P", "-m", "rankwise.launch.program_rank", "run", "mark")
        assert done.code == code, done
        assert {path.name for path in folder.path.iterdir()} == {".next-plan.json", ".rank-0"}


@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.timeout(200)
def test_a_loop_of_ones_own_goes_on_with_other_ranks(command: Command, tmp_path: Path) -> None:
    """A program whose `Run` trains is taken over in an epoch too, by ranks that wait where they make theirs:
    each sample counts once, in one record."""
    (tmp_path / "loop.py").write_text(LOOP)
    run = Running(command, tmp_path, "run", "--ranks", "1", "--out", "run", "loop.py")
    for ranks in (3, 1, 2):
        done = run.resize("--ranks", str(ranks))
        assert done.code == 0, done
        assert run.folder.read().config["ranks"] == ranks
    record = run.stop()
    assert len(record.ranks) == 2
    assert {row.train_samples for row in record.epochs} == {500}
    assert all(row.phases_ns["startup"] == 0 < row.phases_ns["recovery"] for row in record.ranks)


def ranks_of(folder: RunFolder, mark: str) -> dict[int, int]:
    """The processes of the ranks that were started for a run: those with the name of a start, or without."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            words, rank = process.cmdline(), process.environ().get("OMPI_COMM_WORLD_RANK")
            mine = "rankwise.launch.rank" in words and process.cwd() == str(folder.path.parent)
            if mine and rank is not None and words[-1] == (mark or "run"):
                found[int(rank)] = process.pid
    return found


MOMENTS = [(state, victim) for state in ("starting", "ready", "handing over") for victim in range(-1, 5)]


@pytest.mark.cold
@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("state", "victim"), MOMENTS)
def test_whoever_is_killed_while_ranks_change(
    command: Command, tmp_path: Path, state: str, victim: int
) -> None:
    """A rank of the present generation (0, 1), of the next one (2 to 4) or the launcher (-1) is killed in
    each phase of a hand-over: the run goes on, by itself or by --resume, and trains each sample once."""
    run = Running(command, tmp_path, "--ranks", "2", "--max-restarts", "3")
    asks = command.start(*(command.python, "-m", "rankwise", "resize", "run", "--ranks", "3"))
    change = None

    def is_there() -> bool:
        nonlocal change
        change = resize.read_resize(run.folder.resize)
        return change is not None and (change.state == state or change.is_over)

    wait_for(is_there)
    assert change is not None
    if victim < 0:
        run.process.kill()
        run.process.wait(30)
        command.belongings.launcher_was_killed = True
        assert asks.wait(60) == 1
        wait_for(lambda: not ranks_of(run.folder, "") and not ranks_of(run.folder, change.mark))
        Running(command, tmp_path).stop()
        return
    number = victim if victim < 2 else victim - 2
    with contextlib.suppress(KeyError, ProcessLookupError):  # it has left already
        os.kill(ranks_of(run.folder, change.mark if victim > 1 else "")[number], signal.SIGKILL)
    _, told = asks.communicate(timeout=120)
    assert asks.returncode in (0, 1), told
    run.stop()


class Ranks:
    """Ranks that are no processes: what a launcher does with them is written down."""

    def __init__(self) -> None:
        self.did: list[str] = []
        self.asked_at: list[float] = []
        self.is_over = False

    def ask_to_stop(self) -> None:
        self.did.append("asked to stop")

    def end(self) -> None:
        self.did.append("ended")

    def kill(self) -> None:
        self.did.append("killed")


class Launcher:
    """A launcher's part in a run of two ranks, by a clock of its own; `told` is what the user reads."""

    def __init__(self, folder: RunFolder, **options: Any) -> None:
        self.folder = folder
        self.present, self.coming = Ranks(), Ranks()
        self.started: list[RunPlan] = []
        self.told: list[str] = []
        self.now_s = 0.0
        plan = recorded_plan(folder.read().config).with_options(**options)
        self.generations = Generations(
            *(Order(TrainConfig()), plan, folder, self.start, self.told.append),
            RestartBackoff(),
            clock=lambda: self.now_s,
        )

    def start(self, plan: RunPlan, mark: str) -> Any:
        self.started.append(plan)
        return self.coming

    def look(self) -> resize.Resize:
        """Have a look, as ten times in a second; returns how far the change is then."""
        self.generations.look(self.present)  # type: ignore[arg-type]
        found = resize.read_resize(self.folder.resize)
        assert found is not None
        return found


@pytest.fixture
def launcher(
    train_in_threads: Callable[..., object], config: Callable[..., object], tmp_path: Path
) -> Launcher:
    """Of a run that is asked for three ranks."""
    folder = running(train_in_threads, config, tmp_path)
    resize.ask(folder.resize, {"ranks": 3})
    return Launcher(folder)


ENDED = MpiexecResult(130, interrupted=False, last_words="")


def test_the_next_generation_takes_over_when_the_present_one_has_left(launcher: Launcher) -> None:
    """It is started once, the present one is asked to stop when it is ready, and then the start that it waits
    for begins, with its plan in force."""
    folder, generations = launcher.folder, launcher.generations
    starting = launcher.look()
    assert (starting.state, launcher.look()) == ("starting", starting)
    assert [plan.ranks for plan in launcher.started] == [3]
    assert generations.take_over(ENDED) is None
    assert launcher.present.did == []
    resize.tell(folder.resize, "ready")
    assert launcher.look().state == "handing over"
    assert launcher.look().state == "handing over"
    assert launcher.present.did == ["asked to stop"]
    assert not folder.has_begun(starting.mark)
    coming = generations.take_over(ENDED)
    assert coming is not None
    assert coming.started is launcher.coming
    assert folder.has_begun(starting.mark)
    assert read_plan(folder).ranks == 3
    generations.abandon("it is over")
    assert launcher.coming.did == []


@pytest.mark.parametrize("event", ["dies", "a user's stop", "the end", "a failure"])
def test_a_generation_that_does_not_take_over_is_ended(launcher: Launcher, event: str) -> None:
    """Where the next one dies, or the run ends before, nothing of it is left, and whoever asked is told; in
    the first case the present one trains on."""
    folder, generations = launcher.folder, launcher.generations
    launcher.look()
    if event == "dies":
        launcher.coming.is_over = True
        assert launcher.look().state == "failed"
        assert launcher.present.did == []
        assert not folder.next_plan.exists()
    else:
        resize.tell(folder.resize, "ready")
        launcher.look()
        if event == "the end":
            folder.write(folder.read().model_copy(update={"outcome": "completed"}))
        if event == "a failure":
            folder.leave_failure({"rank": 0})
        ending = MpiexecResult(130, interrupted=event == "a user's stop", last_words="")
        assert generations.take_over(ending) is None
        generations.__exit__()
        change = resize.read_resize(folder.resize)
        assert change is not None
        assert (change.state, change.message) == ("failed", "the run ended before")
    assert launcher.coming.did == ["ended"]
    assert read_asked(folder) is None  # no plan but that of the run itself is in force


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"ranks": 0}, "ranks"),
        ({"ranks": 4000}, "training samples"),
        ({"hosts": "a:1,a:1,b:1", "ranks": 4}, "have room for 3 ranks"),
    ],
)
def test_what_cannot_be_is_refused_and_the_run_goes_on(
    launcher: Launcher, given: dict[str, Any], told: str
) -> None:
    """Ranks that the data or the hosts have no room for: in one line, and nothing is started."""
    resize.tell(launcher.folder.resize, "failed")
    resize.ask(launcher.folder.resize, given)
    change = launcher.look()
    assert change.state == "refused"
    assert told in change.message
    assert launcher.started == launcher.present.did == []
    assert launcher.told[-1] == f"the run was not resized: {change.message}"


def test_a_program_of_one_rank_may_grow(launcher: Launcher) -> None:
    """A program's single rank takes no strategy; several are in step by `allreduce` again."""
    record = launcher.folder.read()
    launcher.folder.write(record.model_copy(update={"config": {**record.config, "ranks": 1}}))
    _, plan = resized(Order(TrainConfig()), launcher.folder, {"ranks": 2}, ("loop.py",))
    assert (plan.ranks, plan.strategy, plan.program) == (2, "allreduce", ("loop.py",))


def test_one_change_at_a_time(tmp_path: Path) -> None:
    """Who asks while another change is under way is told of that one; a damaged file is in nobody's way."""
    path = tmp_path / ".resize"
    resize.ask(path, {"ranks": 3})
    with pytest.raises(UsageError, match="being resized already"):
        resize.ask(path, {"ranks": 4})
    resize.tell(path, "done")
    resize.ask(path, {"ranks": 4})
    path.write_text("{")
    resize.ask(path, {"ranks": 5})
    found = resize.read_resize(path)
    assert found is not None
    assert (found.state, found.given) == ("asked", {"ranks": 5})


def test_what_cannot_be_resized_is_one_line(
    train_in_threads: Callable[..., object], config: Callable[..., object], tmp_path: Path
) -> None:
    """A run that is over, one that is its own launcher, a folder without a run."""
    folder = running(train_in_threads, config, tmp_path)
    for path, said in (
        (tmp_path / "whole", r"whole is over \(completed, 3 epochs\): nothing to resize"),
        (folder.path, "does not run"),
        (tmp_path, "holds no run"),
    ):
        with pytest.raises(UsageError, match=said):
            resize_run(path, {"ranks": 3}, print)


def test_an_elastic_run_gets_back_what_it_lost(launcher: Launcher) -> None:
    """Lost ranks are replaced when the launcher looks next, which after a change that failed is twice as
    late; with a hostfile the run has as many as it has room for, within the bounds, from then on."""
    folder, now_s = launcher.folder, 0.0
    config = TrainConfig(ranks=3, elastic="2:4")
    plan = recorded_plan(folder.read().config).with_options(ranks=3, elastic="2:4")
    elastic = Elastic(Order(config), plan, folder, clock=lambda: now_s)

    def looks(at_s: float, *, failed: bool = False) -> dict[str, Any] | None:
        nonlocal now_s
        now_s = at_s
        return elastic.change(plan, failed=failed)

    folder.tell_ranks(3)
    assert looks(5.0) is None  # nobody is missing
    folder.tell_ranks(2)
    assert looks(9.9) is None
    assert looks(10.0) == {"ranks": 3}
    assert looks(15.0, failed=True) == {"ranks": 3}
    assert looks(20.0) is None
    assert looks(25.0) == {"ranks": 3}
    now_s = 30.0
    assert elastic.change(plan.with_options(ranks=2), failed=False) is None  # resized by hand since
    hostfile = folder.path / "hosts"
    elastic = Elastic(
        Order(config.model_copy(update={"hostfile": hostfile})), plan, folder, clock=lambda: now_s
    )
    for slots, change in (
        (3, {"ranks": 3, "hosts": "a:3"}),
        (9, {"ranks": 4, "hosts": "a:9"}),
        (1, None),  # fewer than it may have
    ):
        hostfile.write_text(f"a slots={slots}\n")
        assert looks(now_s + 5) == change
    hostfile.write_text("a slots=x\n")  # being written just now
    assert looks(now_s + 5) is None


def test_too_few_ranks_train_on_until_others_take_over(launcher: Launcher) -> None:
    """Where fewer are left than --min-ranks as many as before get ready, which counts as a restart, and is
    tried again later if nothing comes of it; a run that may not be started again ends, with the reason."""
    folder = launcher.folder
    resize.tell(folder.resize, "done")
    launcher = Launcher(folder, ranks=3, min_ranks=2, max_restarts=2)

    def looks(at_s: float) -> resize.Resize:
        launcher.now_s = at_s
        return launcher.look()

    for there in (None, 3, 2):
        if there:
            folder.tell_ranks(there)
        assert looks(0).state == "done"
    folder.tell_ranks(1)
    assert (looks(10).state, looks(10.9).state) == ("done", "done")
    assert launcher.told == [
        "1 rank is left, fewer than the 2 of --min-ranks: 3 get ready while they train (1 of 2 restarts)"
    ]
    asked = looks(11)
    assert (asked.state, asked.given) == ("asked", {"ranks": 3, "spares": 0})
    assert looks(11).state == "starting"
    launcher.coming.is_over = True
    assert looks(12).state == "failed"
    assert (looks(20).state, looks(21.9).state) == ("failed", "failed")  # two seconds, as no epoch ended
    assert looks(22).state == "asked"
    launcher.coming = Ranks()
    assert looks(22).state == "starting"
    resize.tell(folder.resize, "ready")
    assert looks(23).state == "handing over"
    assert launcher.generations.take_over(ENDED) is not None
    assert folder.read_ranks() is None
    resize.tell(folder.resize, "done")
    assert looks(30).state == "done"
    assert launcher.present.did == ["asked to stop"]
    launcher = Launcher(folder, ranks=3, min_ranks=2, max_restarts=0)
    folder.tell_ranks(1)
    looks(40)
    assert (launcher.present.did, launcher.started) == (["killed"], [])
    failure = folder.read_failure()
    assert failure is not None
    assert failure["message"] == "1 rank is left, fewer than the 2 of --min-ranks"
    assert failure["may_restart"]


def test_a_run_that_is_stopped_gets_no_other_ranks(launcher: Launcher) -> None:
    """Ranks that are asked to stop, and leave one by one, are not too few."""
    resize.tell(launcher.folder.resize, "done")
    launcher.folder.tell_ranks(1)
    launcher.present.asked_at.append(1.0)
    other = Launcher(launcher.folder, min_ranks=2)
    other.present.asked_at.append(0.0)
    assert other.look().state == "done"
    assert other.told == []


@pytest.mark.parametrize("text", ["2", "4:2", "0:3", "1:3", "a:b", "2:3:4", "5:8"])
def test_what_elastic_may_say(text: str) -> None:
    """Two numbers from 2, between which the run begins; the line says what was given."""
    with pytest.raises(ConfigError, match=f"--elastic {text} was given"):
        resolve(TrainConfig(ranks=3, elastic=text))


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.full
@pytest.mark.timeout(200)
def test_killed_ranks_are_replaced(command: Command, tmp_path: Path) -> None:
    """An elastic run whose rank is killed trains on without it, and then with as many as before, in one
    record in which each sample counts once."""
    run = Running(command, tmp_path, "--ranks", "3", "--elastic", "2:3")
    os.kill(ranks_of(run.folder, "")[1], signal.SIGKILL)
    wait_for(lambda: run.folder.read().generation == 1)
    record = run.stop()
    assert [fault.action for fault in record.faults] == ["continue"]
    assert [len(record.earlier[0].ranks), len(record.ranks)] == [3, 3]
    assert all(row.died_at_s is None for row in record.ranks)


def test_a_full_disk_hands_nothing_over(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the present ranks could not save, they are not asked to stop: they train on, and it is told."""

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    launcher.look()
    resize.tell(launcher.folder.resize, "ready")
    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fallocate", full)
        change = launcher.look()
    assert (change.state, launcher.present.did, launcher.coming.did) == ("failed", [], ["ended"])
    assert change.message.endswith("No space left on device")
    assert not [*launcher.folder.checkpoints.glob(".room")]
    resize.ask(launcher.folder.resize, {"ranks": 3})
    launcher.coming = Ranks()
    launcher.look()
    resize.tell(launcher.folder.resize, "ready")
    assert launcher.look().state == "handing over"


@pytest.mark.parametrize("state", ["asked", "ready"])
def test_a_disk_on_which_nothing_can_be_told(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Where the launcher cannot write how far a change is, nothing comes of it, once, and whoever asked does
    not wait for it; the present ranks train on."""

    def full(path: Path, content: bytes) -> None:
        raise StorageError(f"cannot write {path}: No space left on device")

    folder = launcher.folder
    if state == "ready":
        launcher.look()
        resize.tell(folder.resize, "ready")
    told = len(launcher.told)
    with monkeypatch.context() as patched:
        patched.setattr(resize, "write_atomically", full)
        for _ in range(3):
            launcher.generations.look(launcher.present)  # type: ignore[arg-type]
    assert len(launcher.told) == told + 1
    assert launcher.told[-1].endswith("is the disk full?")
    assert (launcher.present.did, len(launcher.started)) == ([], state == "ready")
    assert launcher.coming.did == ["ended"] * (state == "ready")
    assert not folder.resize.exists()
    assert not folder.next_plan.exists()
