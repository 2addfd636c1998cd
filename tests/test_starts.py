"""Starts into one folder at the same instant: one of them is in it, and the others are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rankwise.config import TrainConfig
from rankwise.errors import ResumeError
from rankwise.launch.order import Order, open_folder
from rankwise.plan import make_plan
from rankwise.runs.folder import RunFolder
from rankwise.system import files

from . import tiny
from .conftest import Command
from .effort import daily
from .processes import wait_for
from .records import record

PATIENT = """
import time
from pathlib import Path
from tests import tiny

def wait():
    while not Path("go").exists():
        time.sleep(0.01)

def net(image_shape, classes):
    wait()
    return tiny.net(image_shape, classes)
"""

LOOP = """
import rankwise, torch
from patient import wait

run = rankwise.Run()
wait()
model = run.model(torch.nn.Linear(2, 1))
data = torch.utils.data.DataLoader(torch.ones(8, 2), batch_size=2)
loader, optimizer = run.loader(data), torch.optim.SGD(model.parameters(), 0.1)
run.keep(optimizer=optimizer)
for epoch in run.epochs(1):
    for x in loader:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
"""

WAYS = [(what, ranks, resumes) for what in ("train", "run") for ranks in (1, 2) for resumes in (False, True)]


@pytest.mark.mpi
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("what", "ranks", "resumes"), daily(WAYS, [("train", 1, False), ("train", 2, True), ("run", 1, True)])
)
def test_one_start_is_in_a_folder(
    command: Command, tmp_path: Path, what: str, ranks: int, resumes: bool
) -> None:
    """Of two starts at once, with --out or --resume of one folder, one goes through to the end, with 0, and
    the other is refused with 2 and a line before it trains; the folder holds the run of the one."""
    (tmp_path / "patient.py").write_text(PATIENT)
    (tmp_path / "loop.py").write_text(LOOP)
    go = tmp_path / "go"
    given = ["--dataset", tiny.DATASET, "--model", "patient:net"] if what == "train" else []
    begins = [what, *given, "--ranks", str(ranks), "--epochs", "1", "--out", "run"]
    begins += ["loop.py"] if what == "run" else []
    if resumes:
        go.touch()
        done = command.rankwise(*begins)
        assert done.code == 0, done
        go.unlink()
    words = [what, "--resume", "run", "--epochs", "2"] if resumes else begins
    starts = [command.start(command.python, "-m", "rankwise", *words) for _ in range(2)]
    wait_for(lambda: any(start.poll() is not None for start in starts), 400)
    assert sorted(start.poll() is None for start in starts) == [False, True]  # none ends well before it may
    go.touch()
    told = [start.communicate(timeout=200)[1] for start in starts]
    assert sorted(start.returncode for start in starts) == [0, 2], told
    (refused,) = (text for start, text in zip(starts, told, strict=True) if start.returncode == 2)
    (*_, line) = refused.splitlines()  # behind a remark that --epochs is another one
    assert line.startswith("rankwise: run is in use by ")  # a process, once that has written its number
    left = RunFolder(tmp_path / "run").read()
    assert (left.outcome, len(left.epochs)) == ("completed", 1 + resumes)


def test_a_claim_is_on_the_file_that_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that opened the file just before the one that held it took it away has not got the folder by
    that: the next one would make the file anew, and be in it, too."""
    place = tmp_path / "claim"
    lock = files.fcntl.flock

    def too_late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(files.fcntl, "flock", lock)
        place.unlink()
        lock(descriptor, how)

    monkeypatch.setattr(files.fcntl, "flock", too_late)
    first = files.claim(place, "the first")
    assert first is not None
    with pytest.raises(files.Claimed, match="the first"):
        files.claim(place, "the second")
    os.close(first)


def test_a_run_that_another_start_went_on_with_is_looked_at_again(tmp_path: Path) -> None:
    """A start that finds the folder free, but the run no longer as it was when its options were put together,
    is refused and changes nothing."""
    folder = RunFolder(tmp_path / "run")
    config = TrainConfig(dataset=tiny.DATASET, model=tiny.MODEL, out=folder.path)
    first = open_folder(Order(config), make_plan(config))
    stored = record()
    folder.write(stored)
    first.release()
    order = Order(config, resume=folder.path, stored=stored)
    folder.write(stored.model_copy(update={"message": "it went on"}))
    before = folder.plan.read_bytes()
    with pytest.raises(ResumeError, match="another start has gone on with"):
        open_folder(order, make_plan(config))
    assert folder.plan.read_bytes() == before
    open_folder(Order(config, resume=folder.path, stored=folder.read()), make_plan(config)).release()
