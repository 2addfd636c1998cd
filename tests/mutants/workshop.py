"""Copies of a tree, and processes that are forked to run tests in them."""

from __future__ import annotations

import compileall
import itertools
import multiprocessing
import py_compile
import queue
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeVar

import psutil

from tests.mutants import child
from tests.mutants.catalogue import PACKAGE

LIBRARIES = """
    pytest xdist pytest_timeout hypothesis psutil jsonschema numpy scipy.stats sklearn.datasets torch
    torch.optim safetensors.torch pydantic cyclopts rich.progress PIL.Image simpy filelock yaml jinja2
"""
"""What a forked process need not load. None of them starts threads or MPI when it is imported."""

LEFT_OUT = (".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "build", "dist", "runs")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Report:
    """What came of a job: ``over``, with the seconds of the tests that ran, what failed, in order, and the
    end of what pytest printed; ``hung`` or ``crashed``."""

    end: str
    seconds: dict[str, float] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    text: str = ""


class Workshop:
    """As many copies of a tree as workers, in a folder that is gone when the block is left."""

    def __init__(self, tree: Path, workers: int) -> None:
        self._tree, self._workers = tree, workers
        self._copies: queue.Queue[Path] = queue.Queue()
        self._numbers = itertools.count()
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(LIBRARIES.split())

    def __enter__(self) -> Workshop:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.folder = Path(tempfile.mkdtemp(prefix="mutants-"))
        for number in range(self._workers):
            copy = self.folder / str(number)
            shutil.copytree(self._tree, copy, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
            # By hash: a mutant may be as long as what it stands for, and be written in the same second.
            by_hash = py_compile.PycInvalidationMode.CHECKED_HASH
            compileall.compile_dir(copy / "src", quiet=1, invalidation_mode=by_hash)
            self._copies.put(copy)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is KeyboardInterrupt:
            print("interrupted; what is stored stays", file=sys.stderr)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def copy(self, texts: Mapping[str, str] | None = None) -> Iterator[Path]:
        """A copy for this thread alone, with other texts in some modules."""
        copy = self._copies.get()
        paths = {copy / PACKAGE / module: text for module, text in (texts or {}).items()}
        before = {path: path.read_text("utf-8") for path in paths}
        try:
            for path, text in paths.items():
                path.write_text(text, "utf-8")
            yield copy
        finally:
            for path, text in before.items():
                path.write_text(text, "utf-8")
            self._copies.put(copy)

    def run(self, job: child.Job, copy: Path, limit_s: float | None = None) -> Report:
        """Run a job in a process of its own, which is ended after so long, with all that it has started."""
        place = self.folder / f"p{next(self._numbers)}"
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=child.run, args=(job, copy, place, sender))
        process.start()
        sender.close()
        try:
            if not receiver.poll(limit_s):
                return Report("hung")
            seconds, failed, code = receiver.recv()
            text = (place / "log").read_text("utf-8", "replace")[-2000:]
            # 5 is no test at all, as when tests have parameters that a mutant has taken away: nothing failed.
            return Report("over", seconds, failed or ["pytest's start"] * (code not in (0, 5)), text)
        except EOFError:
            return Report("crashed")
        finally:
            _end(process)
            shutil.rmtree(place, ignore_errors=True)

    def each(self, do: Callable[[T], R], tasks: Iterable[T]) -> Iterator[tuple[T, R]]:
        """Do something for each task, as many at once as there are workers; yields what is done."""
        with ThreadPoolExecutor(self._workers) as pool:
            futures = {pool.submit(do, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                for process in psutil.Process().children(recursive=True):
                    process.kill()
                raise


def _end(process: BaseProcess) -> None:
    with suppress(psutil.NoSuchProcess):
        for member in psutil.Process(process.pid).children(recursive=True):
            member.kill()
    process.kill()
    process.join()
