"""`rankwise run`: programs with a training loop of their own, under a real mpiexec."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rankwise.cli.programs import split_program
from rankwise.errors import ConfigError
from rankwise.runs.folder import RunFolder
from rankwise.runs.record import Record

from . import effort
from .conftest import Command, mpiexec_words
from .processes import wait_for
from .test_mpi import closes

TRAINS = """
import os, signal, sys, time
import torch, rankwise
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

words = dict(word.split("=") for word in sys.argv[1:])
torch.manual_seed(0)
x = torch.randn(60, 8, dtype=torch.float64)
y = (x.sum(1) > 0).long()
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2)).double()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
ema = torch.optim.swa_utils.AveragedModel(
    model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
)
run = rankwise.Run(**({"seed": int(words["seed"])} if "seed" in words else {}))
workers = int(words.get("workers", 0))
data = DataLoader(
    TensorDataset(x, y),
    batch_size=4,
    shuffle=True,
    generator=torch.Generator().manual_seed(1) if "generator" in words else None,
    num_workers=workers,
    persistent_workers=workers > 0,
)
model, loader = run.model(model), run.loader(data)
run.keep(optimizer=optimizer, scheduler=scheduler, ema=ema)
for epoch in run.epochs(4):
    for step, (images, labels) in enumerate(loader):
        if words.get("kill") == f"{run.world.number}:{epoch}:{step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if words.get("fail") == f"{run.rank}:{epoch}:{step}":
            raise ValueError("a fault of the loop's own")
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        ema.update_parameters(model)
        run.log(loss=loss, twice=2 * loss)
        time.sleep(float(words.get("sleep", 0)))
    scheduler.step()
    model.eval()
    with torch.no_grad():
        part = run.shard(y)
        scores = model(run.shard(x))
    run.log(val_loss=F.cross_entropy(scores, part), val_accuracy=(scores.argmax(1) == part).double().mean())
    model.train()
    run.print(f"epoch {epoch} of {run.size} ranks, rate {optimizer.param_groups[0]['lr']}")
if run.first:
    torch.save((model.state_dict(), ema.state_dict()), words.get("to", "weights.pt"))
"""


@pytest.fixture
def program(tmp_path: Path) -> str:
    """A training loop of a user's own, in a script."""
    (tmp_path / "loop.py").write_text(TRAINS)
    return "loop.py"


def record(folder: Path) -> Record:
    return RunFolder(folder).read()


def weights(path: Path) -> np.ndarray:
    """Of the model and of its average."""
    import torch

    return np.concatenate(
        [its.double().flatten().numpy() for part in torch.load(path) for its in part.values()]
    )


def test_the_words_of_a_program_are_its_own() -> None:
    """From the script on nothing is taken for an option of rankwise, whatever it looks like."""
    words = ["--ranks", "2", "--cross-check", "--out=x", "train.py", "--ranks", "7", "--", "-x"]
    assert split_program(words) == (words[:4], words[4:])
    assert split_program(["--ranks", "2", "--", "-odd.py", "a"]) == (["--ranks", "2"], ["-odd.py", "a"])
    assert split_program(["--help"]) == (["--help"], [])


@pytest.mark.mpi
@pytest.mark.timeout(240)
@pytest.mark.parametrize("ranks", effort.daily([1, 3], [3]))
def test_a_loop_leaves_a_run(command: Command, tmp_path: Path, program: str, ranks: int) -> None:
    """A loop of a user's own leaves what `rankwise train` leaves: a record whose ledger closes, with samples
    counted and what was logged, checkpoints, timelines, and what its ranks printed."""
    done = command.rankwise("run", "--ranks", str(ranks), "--out", "run", program)
    assert done.code == 0, done
    run, folder = record(tmp_path / "run"), RunFolder(tmp_path / "run")
    assert run.outcome == "completed"
    assert closes(run)
    assert run.samples.model_dump() == {"expected": 240, "trained": 240, "duplicated": 0, "lost": 0}
    assert [row.metrics["twice"] for row in run.epochs] == pytest.approx(
        [2 * row.train_loss for row in run.epochs]
    )
    assert [row.learning_rate for row in run.epochs] == [0.02, 0.01, 0.01, 0.005]
    assert run.best.val_accuracy > 0.6
    assert run.config["model"] == "loop.py"
    assert run.config["epochs"] == 4
    assert run.config["lr"] is None
    assert all(
        row.phases_ns[phase] > 0 for row in run.ranks for phase in ("forward", "backward", "optimizer")
    )
    assert all(folder.timeline_of(rank).exists() for rank in range(ranks))
    assert "epoch 3 of" in folder.output_of(0).read_text()
    exports = [
        ["export", "run", "--format", one, "--output", f"out.{one}"]
        for one in ("csv", "mlperf", "otf2", "talp")
    ]
    for words in (
        ["report", "run", "--output", "page.html"],
        ["trace", "run"],
        ["compare", "run", "run"],
        *exports,
    ):
        told = command.rankwise(*words)
        assert told.code == 0, told


@pytest.mark.mpi
@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("ours", ["generator=1", "workers=1"]),
        pytest.param("mpiexec", ["generator=1"], marks=effort.only_in_full),
        ("python", []),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    command: Command, tmp_path: Path, program: str, how: str, words: list[str]
) -> None:
    """Ctrl-C ends all ranks with code 130 and a line that says how to go on; a resumed run ends with the
    weights of one that was never stopped, those of its average too, to the bit; whoever started it, also with
    samples in the order of a generator of the user's, and with workers, which end without a word."""
    ranks = "1" if how == "python" else "2"
    start = {
        "ours": [command.python, "-m", "rankwise", "run", "--ranks", ranks, "--out", "runs/one", program],
        "mpiexec": [*mpiexec_words(2), command.python, program],
        "python": [command.python, program],
    }[how]
    done = command.rankwise("run", "--ranks", ranks, "--out", "whole", program, *words, "to=whole.pt")
    assert done.code == 0, done
    assert "Traceback" not in done.err
    process = command.start(*start, *words, "sleep=0.05")
    wait_for(lambda: list(tmp_path.glob("runs/*/metrics.jsonl")))
    (folder,) = tmp_path.glob("runs/*")
    wait_for(lambda: len(RunFolder(folder).read_metrics()) >= 1)
    process.send_signal(signal.SIGUSR1 if how == "mpiexec" else signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 or how == "mpiexec", told
    assert "Traceback" not in told
    assert f"go on with: rankwise run --resume {folder.relative_to(tmp_path)}" in told
    assert record(folder).outcome == "interrupted"
    done = command.rankwise("run", "--resume", str(folder))
    assert done.code == 0, done
    assert record(folder).outcome == "completed"
    assert (weights(tmp_path / "weights.pt") == weights(tmp_path / "whole.pt")).all()
    again = command.rankwise("run", "--resume", str(folder))
    assert again.code == 0
    assert "is completed already" in again.err


@pytest.mark.mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("rank", effort.daily([0, 1], [1]))
def test_whichever_rank_fails_says_why(command: Command, tmp_path: Path, program: str, rank: int) -> None:
    """Where a user's own mpiexec has started the ranks, the record of a run that failed on any one of them
    says why, though that one ends all of them."""
    done = command.mpiexec(2, program, f"fail={rank}:1:2")
    assert done.code != 0, done
    (folder,) = tmp_path.glob("runs/*")
    run = record(folder)
    assert (run.outcome, run.message, len(run.epochs)) == ("failed", "a fault of the loop's own", 1), done


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.timeout(240)
@pytest.mark.parametrize("killed", effort.daily(["0:1:3", "2:2:0", "1:3:4"], ["0:1:3"]))
def test_a_killed_rank_loses_no_sample(command: Command, tmp_path: Path, program: str, killed: str) -> None:
    """If a rank is killed in the middle of its loop, rank 0 too, the others go on; each sample is trained
    once, schedulers have made their steps once, and the run says who was lost."""
    done = command.rankwise("run", "--ranks", "3", "--out", "run", program, f"kill={killed}")
    assert done.code == 0, done
    run = record(tmp_path / "run")
    assert run.samples.model_dump() == {"expected": 240, "trained": 240, "duplicated": 0, "lost": 0}
    assert [row.learning_rate for row in run.epochs] == [0.02, 0.01, 0.01, 0.005]
    assert [(fault.rank, fault.epoch, fault.action) for fault in run.faults] == [
        (int(killed[0]), int(killed[2]) + 1, "continue")
    ]
    assert f"lost rank {killed[0]}" in done.out
    assert closes(run)
    failing = command.rankwise("run", "--ranks", "2", "--fail-on-lost-rank", program, "kill=1:0:2")
    assert failing.code == 1, failing


@pytest.mark.ulfm
@pytest.mark.mpi
@pytest.mark.timeout(240)
def test_a_spare_comes_into_a_program(command: Command, tmp_path: Path, program: str) -> None:
    """If rank 0 is killed, a spare goes through the program and comes in, in the middle of an epoch: as many
    ranks as before train each sample once, and the record knows who was lost. Nobody waits for a spare that
    is not needed, and a program without a Run has no use for one."""
    words = ["--spares", "1", "--seed", "3"]
    done = command.rankwise(
        "run", "--ranks", "2", *words, "--out", "run", program, "kill=0:1:3", "generator=1"
    )
    assert done.code == 0, done
    assert "lost rank 0 in epoch 2: 2 go on, with rank 2 in place" in done.err
    run = record(tmp_path / "run")
    assert run.samples.model_dump() == {"expected": 240, "trained": 240, "duplicated": 0, "lost": 0}
    assert [(fault.rank, fault.action) for fault in run.faults] == [(0, "continue")]
    assert [(row.rank, row.died_at_s is None) for row in run.ranks] == [(0, False), (1, True), (2, True)]
    assert [row.learning_rate for row in run.epochs] == [0.02, 0.01, 0.01, 0.005]
    whole = command.rankwise("run", "--ranks", "2", *words, "--out", "whole", program, "generator=1")
    assert whole.code == 0, whole
    assert record(tmp_path / "whole").ranks[2].role == "spare"
    (tmp_path / "none.py").write_text("print('done')")
    none = command.rankwise("run", "--ranks", "2", "--spares", "1", "--out", "none", "none.py")
    assert none.code == 2, none
    (told,) = none.told
    assert "--spares 1 was given, but the program made no rankwise.Run, in which they wait" in told


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_options_of_the_command_line_win(command: Command, tmp_path: Path, program: str) -> None:
    """`--epochs`, `--seed` and `--strategy` of the command line win over those in the program."""
    words = ["--ranks", "2", "--epochs", "2", "--seed", "5", "--strategy", "local-sgd", "--out", "run"]
    done = command.rankwise("run", *words, program, "seed=3")
    assert done.code == 0, done
    run = record(tmp_path / "run")
    assert len(run.epochs) == 2
    assert (run.config["seed"], run.config["strategy"]) == (5, "local-sgd")


@pytest.mark.mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_program_ends_as_it_ends_itself(command: Command, tmp_path: Path, ranks: str) -> None:
    """Output goes to the stream on which it came, with its rank if there are several, a line of dashes
    too; the exit code is the program's; an error is shown as Python shows it, and ends with one line. Its
    input is at its end at once."""
    (tmp_path / "ends.py").write_text(
        "import sys; sys.stdin.read()\nfrom beside import text\nprint('-' * 60)\n"
        "print(text, sys.argv[1:], __name__)\n"
        "print('error', file=sys.stderr)\nif sys.argv[1] == 'raise':\n    raise ValueError('on purpose')\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    (tmp_path / "beside.py").write_text("text = 'found'")
    mark = "[0] " if ranks == "2" else ""
    for code in (0, 3):
        done = command.rankwise("run", "--ranks", ranks, "--out", f"run{code}", "ends.py", str(code), "--x")
        assert done.code == code, done
        assert f"{mark}found ['{code}', '--x'] __main__\n" in done.out
        assert mark + 60 * "-" in done.out
        assert f"{mark}error\n" in done.err
        assert bool(done.told) == bool(code)
    done = command.rankwise("run", "--ranks", ranks, "--out", "run", "ends.py", "raise")
    assert done.code == 1, done
    assert f'{mark}  File "{tmp_path / "ends.py"}", line 7, in <module>' in done.err
    assert "rankwise/launch" not in done.err
    assert len(done.told) == 1
    assert done.told[0].endswith("ValueError: on purpose")


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_json_alone_is_on_stdout(command: Command, tmp_path: Path, program: str) -> None:
    """With `--format json` stdout holds the record and nothing else; what the program prints is on stderr."""
    done = command.rankwise("run", "--ranks", "2", "--epochs", "1", "--format", "json", program)
    assert done.json["config"]["program"] == ["loop.py"]
    assert "[0] epoch 0 of 2 ranks" in done.err


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_a_stop_before_a_run_is_made(command: Command, tmp_path: Path) -> None:
    """Ctrl-C in a program that has made no Run ends with code 130 and one line, and leaves what is known of
    its time; an interrupt that a program raises itself is not tried again."""
    (tmp_path / "starts.py").write_text(
        "import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n"
    )
    process = command.start(
        command.python, "-m", "rankwise", "run", "--ranks", "2", "--out", "run", "starts.py"
    )
    wait_for((tmp_path / "begun").exists)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert record(tmp_path / "run").outcome == "interrupted"
    assert told.splitlines()[-1].startswith("rankwise: stopped")
    (tmp_path / "stops.py").write_text("import rankwise\nrankwise.Run()\nraise KeyboardInterrupt\n")
    done = command.rankwise("run", "--ranks", "2", "stops.py")
    assert done.code in (1, 130), done
    assert "starting again" not in done.err


@pytest.mark.mpi
@pytest.mark.timeout(120)
def test_a_ddp_script_starts_unchanged(command: Command, tmp_path: Path) -> None:
    """A script that torchrun starts finds its ranks in the environment, and they find each other."""
    (tmp_path / "ddp.py").write_text(
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo')\n"
        "total = torch.tensor([float(dist.get_rank())])\n"
        "dist.all_reduce(total)\n"
        "print(dist.get_world_size(), os.environ['LOCAL_RANK'], total.item())\n"
        "dist.destroy_process_group()\n"
    )
    done = command.rankwise("run", "--ranks", "3", "ddp.py")
    assert done.code == 0, done
    assert sorted(done.out.splitlines()) == [f"[{rank}] 3 {rank} 3.0" for rank in range(3)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "no program was given"),
        (["nowhere.py"], "nowhere.py is no file"),
        (["--lr", "3", "loop.py"], "--lr"),
        (["--strategy", "easgd", "--ranks", "3", "loop.py"], "all ranks train"),
        (["--strategy", "ddp", "--ranks", "3", "loop.py"], "makes the optimiser's steps itself"),
        (["--strategy", "gradient-server", "--ranks", "3", "loop.py"], "all ranks train"),
        (["--ranks", "0", "loop.py"], "--ranks"),
        (["--resume", "nowhere"], "nowhere holds no run"),
    ],
)
def test_wrong_use_is_one_line(
    command: Command, tmp_path: Path, program: str, words: list[str], line: str
) -> None:
    """What cannot be run ends with one line and code 2, and leaves nothing behind."""
    done = command.rankwise("run", *words)
    assert done.code == 2, done
    assert len(done.told) == 1
    assert line in done.told[0]
    assert [path.name for path in tmp_path.iterdir()] == ["loop.py"]


@pytest.mark.mpi
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("rankwise.Run(lr=3)", "a loop of one's own says itself"),
        ("rankwise.Run(stratgy='x')", "stratgy"),
        ("rankwise.Run('easgd')", "all ranks train"),
        ("rankwise.Run(); rankwise.Run()", "a second Run"),
        ("next(iter(rankwise.Run().epochs(3)))", "trains no model"),
    ],
)
def test_wrong_use_in_a_program(command: Command, tmp_path: Path, line: str, told: str) -> None:
    """What a program asks of its Run in vain ends all ranks with one line and code 2 before the first turn,
    and leaves no run behind."""
    (tmp_path / "wrong.py").write_text(f"import rankwise\n{line}\n")
    done = command.rankwise("run", "--ranks", "3", "--out", "run", "wrong.py")
    assert done.code == 2, done
    assert len(done.told) == 1, done
    assert told in done.told[0]
    assert not (tmp_path / "run").exists()


def test_a_record_of_a_program_can_be_read_again(tmp_path: Path) -> None:
    """Options that a program says itself are None in its record, and stay so when it is read and written."""
    from rankwise.config import TrainConfig
    from rankwise.program_plan import program_plan

    plan = program_plan(TrainConfig(ranks=2), ("loop.py", "x"), mpi_survives=lambda: True)
    config = plan.recorded()
    assert (config["lr"], config["momentum"], config["strategy"]) == (None, None, "allreduce")
    from rankwise.runs.record import _options

    assert _options(json.loads(json.dumps(config))) == json.loads(json.dumps(config))


def test_an_option_that_no_program_has_is_refused() -> None:
    """An option that a loop says itself is refused by name."""
    from rankwise.launch.program import run_options

    with pytest.raises(ConfigError, match="batch_size"):
        run_options(None, {"batch_size": 3})


def test_an_option_in_a_file_that_no_program_has_is_refused(tmp_path: Path) -> None:
    """A file of options that says what a loop says itself is refused by the name, and not passed over."""
    (tmp_path / "loop.py").write_text("")
    (tmp_path / "options.toml").write_text("batch-size = 3\n")
    words = ["run", "--config", str(tmp_path / "options.toml"), str(tmp_path / "loop.py")]
    done = subprocess.run(
        [sys.executable, "-m", "rankwise", *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done
    assert "options.toml: unknown option 'batch_size'" in done.stderr
    assert "label_smoothing" not in done.stderr
