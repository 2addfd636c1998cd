"""What the tests share: a place for caches and runs, ranks in threads, and ranks under a real mpiexec."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis.database import DirectoryBasedExampleDatabase

from rankwise.comm import run_in_threads
from rankwise.comm.mpi_environment import find_mpiexec, mpi_environment, survives_failures
from rankwise.comm.threads import Killed
from rankwise.config import TrainConfig
from rankwise.data import prepare
from rankwise.errors import LaunchError
from rankwise.launch import forking
from rankwise.plan import RunPlan, resolve
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record, Samples
from rankwise.system import limits

from . import effort, tiny, warm
from .processes import Belongings, Process, where_all_stand

# How long an example takes says nothing about the code. What failed once is tried first the next time, from
# wherever the tests are started.
hypothesis.settings.register_profile(
    "daily",
    deadline=None,
    max_examples=100 if effort.FULL else 30,
    database=DirectoryBasedExampleDatabase(Path(__file__).parents[1] / ".hypothesis" / "examples"),
)
hypothesis.settings.load_profile("daily")

# A shell lets what it starts in the background (`make test &`) ignore Ctrl-C; all that tests start would too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SURROUNDINGS = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    ),
}
"""With it programs of the tests find this Python's mpiexec, and the tests' own modules."""

MPI_SIZES = (1, 2, 5)
"""5 ranks are more than the 2 cores of a small machine: they must take turns."""


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Datasets are decoded once for all tests, and not into the user's cache; the tiny one here, so that no
    program of a test says that it does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        prepare(tiny.DATASET)
        yield


@pytest.fixture(autouse=True)
def _disk_in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the disk, but tests that are about it."""
    if not request.node.get_closest_marker("disk"):
        monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True, scope="session")
def _memory_measured_once() -> Iterator[None]:
    """The kernel looks at each page of this process to tell how much of it is its own: a tenth of what a
    small run costs, if each rank in a thread asks anew after each epoch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "pss_bytes", functools.cache(limits.pss_bytes))
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """On these small problems more threads compute nothing faster; they wait for each other, and while they
    do they take the cores from other tests. torch is not loaded for it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture
def config() -> Callable[..., RunPlan]:
    """Makes the plan of a run that takes the blink of an eye."""

    def make(**options: Any) -> RunPlan:
        # One thread: sums are cut up by thread, so other numbers of threads give other bits.
        defaults = {
            "dataset": tiny.DATASET,
            "model": tiny.MODEL,
            "epochs": 2,
            "lr": 0.02,
            "batch_size": 16,
            "threads": 1,
        }
        return resolve(TrainConfig(**{**defaults, **options}))

    return make


@pytest.fixture
def train_in_threads(tmp_path: Path) -> Callable[..., tuple[Record, RunFolder, dict[str, Any]]]:
    """Trains with one thread a rank; gives the record, the folder, and the weights at the end."""
    from rankwise.runs import checkpoint
    from rankwise.training.rank import run

    def train(
        config: RunPlan,
        *,
        folder: str = "run",
        resume: bool = False,
        kill_at: dict[int, int] | None = None,
        hosts: list[int] | None = None,
    ) -> tuple[Record, RunFolder, dict[str, Any]]:
        place = RunFolder(tmp_path / folder)
        if not resume:
            place.create()
        start = checkpoint.newest(place.checkpoints, on_damage=print) if resume else None
        records = run_in_threads(
            config.processes,
            lambda world: run(config, world, place, say=print, start=start),
            kill_at=kill_at,
            hosts=hosts,
        )
        record = next(record for record in records if record is not Killed)
        return record, place, read_weights(place)

    return train


def stopped(folder: RunFolder, name: str = "parts", *, epoch: int = 1) -> RunFolder:
    """A copy beside a run, as it would be if it had been stopped in the epoch after `epoch`: what comes later
    is taken out. The run must have kept the checkpoint of `epoch`."""
    copy = RunFolder(folder.path.with_name(name))
    shutil.copytree(folder.path, copy.path)
    for place in copy.checkpoints.glob("epoch-*"):
        if int(place.name.removeprefix("epoch-")) > epoch:
            shutil.rmtree(place)
    record = copy.read()
    epochs = record.epochs[:epoch]
    notes = json.loads((copy.checkpoints / f"epoch-{epoch:04d}" / "manifest.json").read_bytes())["notes"]
    samples = Samples(**notes["samples"])
    copy.write(record.model_copy(update={"outcome": "interrupted", "epochs": epochs, "samples": samples}))
    copy.keep_metrics(epochs)
    return copy


def read_weights(folder: RunFolder) -> dict[str, Any]:
    """The model in the newest checkpoint of a run."""
    import safetensors.torch

    newest = max(folder.checkpoints.glob("epoch-*"))
    return safetensors.torch.load_file(newest / "model.safetensors")


class Command:
    """Runs programs of the tests, and leaves nothing of them behind."""

    def __init__(self, cwd: Path, python: Path | str = sys.executable) -> None:
        self._cwd = cwd
        self.python = str(python)
        """What runs Python programs: a stand-in for tests that are not about how processes start or end."""
        self._started: list[Process] = []
        self.belongings = Belongings()

    def start(self, *words: str, cwd: Path | None = None, **environment: str) -> Process:
        """Start a program in a session of its own."""
        process = Process(
            self.belongings,
            words,
            cwd=cwd or self._cwd,
            env=self.belongings.environment(mpi_environment() | SURROUNDINGS | environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def __call__(
        self, *words: str, timeout: float = 180, cwd: Path | None = None, **environment: str
    ) -> Finished:
        """Run a program to its end."""
        process = self.start(*words, cwd=cwd, **environment)
        out, err = process.communicate(timeout=timeout)
        return Finished(process.returncode, out, err)

    def rankwise(self, *words: str, **options: Any) -> Finished:
        """Run the command line of rankwise to its end."""
        return self(self.python, "-m", "rankwise", *words, **options)

    def mpiexec(self, ranks: int, *words: str, **options: Any) -> Finished:
        """Run a Python program on some ranks of a real mpiexec."""
        return self(*mpiexec_words(ranks), self.python, *words, **options)

    def end_all(self) -> None:
        """Kill what is still running; the sessions are our own. Whatever they started must go with them."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                if not process.ends_within(3):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(10)
        left = self.belongings.close()
        assert not left, "left behind, and removed by now:\n" + "\n".join(left)


class Finished:
    """A program that has ended: its code and what it printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"code {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"

    @property
    def told(self) -> list[str]:
        """What rankwise told the user; mpiexec's own words end with a NUL, after which its line may begin."""
        return [line for line in self.err.splitlines() if line.lstrip(" \0").startswith("rankwise: ")]

    @property
    def json(self) -> Any:
        """What stands on stdout, which must be JSON and nothing else."""
        return json.loads(self.out)


def mpiexec_words(ranks: int) -> list[str]:
    """A real mpiexec for any number of ranks on this machine."""
    mpiexec = find_mpiexec()
    crowd = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none"] if mpiexec.is_open_mpi else []
    return [str(mpiexec.path), *crowd, "-n", str(ranks)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that mostly wait begin first, and where no rank survives another's death those that need it are
    skipped."""
    items.sort(key=lambda item: item.get_closest_marker("waits") is None)
    needy = [item for item in items if item.get_closest_marker("ulfm")]
    if needy and not survives_failures():
        for item in needy:
            item.add_marker(pytest.mark.skip(reason="this MPI ends a job of which a rank dies (no ULFM)"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """When a test's time is up, its report tells where its processes stand; the threads of this one pytest
    shows itself."""
    try:
        yield
    except pytest.fail.Exception as error:
        if "Timeout" in str(error) and Belongings.living:
            item.add_report_section("call", "processes", where_all_stand())
        raise


@contextlib.contextmanager
def launched(folder: Path, python: Path | str = sys.executable) -> Iterator[Command]:
    """Programs run in a folder, and are ended at the end."""
    runner = Command(folder, python)
    try:
        yield runner
    finally:
        runner.end_all()


@pytest.fixture(scope="session")
def warm_python(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What stands for Python where it need not be started anew."""
    with warm.warm_python(tmp_path_factory.mktemp("warm")) as python:
        yield python


@pytest.fixture
def warm_processes(warm_python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process starts as Python is forked from a warm one."""
    monkeypatch.setattr(sys, "executable", str(warm_python))
    monkeypatch.setattr(forking, "possible", lambda plan: False)
    for name, value in SURROUNDINGS.items():
        monkeypatch.setenv(name, value)


def on_open_mpi() -> bool:
    """Whether this Python's mpiexec is Open MPI's. MPICH's ranks talk to it through an inherited file, which
    a fork of a warm Python has not."""
    try:
        return find_mpiexec().is_open_mpi
    except LaunchError:
        return True


@pytest.fixture
def command(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Command]:
    """Programs run in the test's own folder, and are ended with the test."""
    markers = ("cold", "cold_in_full") if effort.FULL else ("cold",)
    cold = any(request.node.get_closest_marker(name) for name in markers) or not on_open_mpi()
    python = sys.executable if cold else request.getfixturevalue("warm_python")
    with launched(tmp_path, python) as runner:
        yield runner


@pytest.fixture(params=(1, 2, 3, 5))
def ranks(request: pytest.FixtureRequest) -> int:
    """A number of ranks."""
    return int(request.param)
