"""Jobs for batch systems: what is written keeps every option, and is what the batch system takes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rankwise.cli import app
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.launch.order import to_arguments
from rankwise.submit import Kubernetes, Slurm, Work, work_of
from rankwise.submit.kubernetes import SETTINGS

from .conftest import Finished
from .effort import only_in_full
from .mpijob import SCHEMA
from .processes import wait_for
from .readers import ask, find_or_install
from .test_cli import call

GOLDEN = Path(__file__).parent / "golden"
WORDS = ["--ranks", "8", "--spares", "1", "--strategy", "local-sgd", "--sync-every", "16", "--lr", "0.05"]
WORDS += ["--fault", "kill:rank=1,epoch=2", "--fault", "sleep:p=0.1,seconds=2", "--nesterov"]
SLURM = [
    "--nodes",
    "3",
    "--partition",
    "long",
    "--time-limit",
    "02:00:00",
    "--setup",
    "module load openmpi/5",
]
KUBERNETES = ["kubernetes", "--workers", "3", "--namespace", "team"]
JOBS = {
    "slurm.sh": ["slurm", *SLURM, *WORDS, "--out", "$SCRATCH/first"],
    "trainjob.yaml": [*KUBERNETES, *WORDS, "--out", "/shared/first"],
    "mpijob.yaml": [*KUBERNETES, "--operator", "v2beta1", *WORDS, "--out", "/shared/first"],
}


Submit = Callable[..., Finished]


@pytest.fixture
def submit(capsys: pytest.CaptureFixture[str]) -> Submit:
    """Runs `rankwise submit` in this process."""

    def run(*words: str) -> Finished:
        code = call("submit", *words)
        return Finished(code, *capsys.readouterr())

    return run


def test_the_mpi_of_this_machine_says_nothing(submit: Submit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares are taken where the MPI here, a login node's, does not survive failures: that of the job may."""
    monkeypatch.setattr("rankwise.plan.survives_failures", lambda: False)
    done = submit("slurm", "--nodes", "2", "--ranks", "4", "--spares", "1", "--out", "run")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize("name", JOBS)
def test_jobs_are_as_they_were(submit: Submit, name: str) -> None:
    """The files for a batch system, letter by letter; `rankwise submit` with these words writes them anew."""
    done = submit(*JOBS[name])
    assert (done.code, done.err) == (0, "")
    assert done.out == (GOLDEN / name).read_text()


def every_option() -> dict[str, Any]:
    """For each option of a training a value that is not its default."""
    values: dict[str, Any] = {
        "sync_every": 7, "topology": "ring", "strategy": "two-level", "model": "mlp", "dataset": "digits",
        "data_dir": "/data/it's here", "cache_dir": "$HOME/cache", "shards": "dirichlet:0.5",
        "compress": "topk:0.01", "optimizer": "adamw", "optimizer_state": "average", "schedule": "cosine",
        "lr_scaling": "sqrt", "threads": "all", "on_failure": "restart", "on_shrink": "keep-global-batch",
        "fault": ("kill:rank=1", "nan:p=0.5"), "track": "mlflow", "balance": "24,8", "flip": "random",
        "tta": "flip", "averaged_weights": "ema", "precision": "bf16", "resize": "24:1", "freeze": "1:2",
        "compile": "on", "memory_format": "contiguous", "background": "black", "keep": "best",
        "init": "/runs/it is@best", "elastic": "2:8",
    }  # fmt: skip
    for name, field in TrainConfig.model_fields.items():
        if name in values or name in ("hosts", "hostfile", "out"):
            continue
        if isinstance(field.default, bool):
            values[name] = not field.default
        elif isinstance(field.default, int):
            values[name] = field.default + 3
        elif isinstance(field.default, float):
            values[name] = field.default / 2 + 0.125
        else:
            assert field.default is None, f"say here what --{name} could be"
            try:
                TrainConfig(**{name: 3})
                values[name] = 3
            except ConfigError:
                values[name] = 0.25
    return values


def said_by(script: str, folder: Path, environment: Mapping[str, str]) -> list[str]:
    """What a script calls rankwise with."""
    stub = folder / "rankwise"
    stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@" > "$SAID"\n')
    stub.chmod(0o755)
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "SAID": str(folder / "said")}
    subprocess.run(["bash", "-c", script], env={**path, **environment}, cwd=folder, check=True, timeout=20)
    return (folder / "said").read_text().split("\0")[:-1]


def parsed(words: list[str]) -> TrainConfig:
    """The configuration that a command line of rankwise means."""
    _, bound, _ = app.parse_args(words, exit_on_error=False, print_error=False)
    config = bound.kwargs["config"]
    assert isinstance(config, TrainConfig)
    return config


def given_in(work: Work, folder: Path) -> list[list[str]]:
    """The command lines that both batch systems make of the work."""
    manifest = yaml.safe_load(Kubernetes(operator="v2beta1").manifest(work))
    container = manifest["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"][0]
    _, job = yaml.safe_load_all(Kubernetes().manifest(work))
    assert job["spec"]["trainer"]["command"] == container["command"]
    assert container["command"][:2] == ["/bin/bash", "-c"]
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "job"}
    scripts = (Slurm().script(work), container["command"][2])
    return [said_by(script, folder, environment) for script in scripts]


def test_every_option_goes_along(tmp_path: Path) -> None:
    """Whatever option of train is given arrives in the job as it was given, under both batch systems."""
    values = every_option()
    config = TrainConfig(**values)
    assert all(getattr(config, name) != TrainConfig.model_fields[name].default for name in values)
    for words in given_in(Work(tuple(to_arguments(config)), None, 4, 1), tmp_path):
        arrived = parsed(words)
        assert {name: getattr(arrived, name) for name in values} == {
            name: getattr(config, name) for name in values
        }


@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30))
def test_no_text_is_changed_on_its_way(text: str) -> None:
    """Quotes, dollars, spaces and letters of any script are no shell to the job."""
    work = Work(("--data-dir", f"/{text}"), None, 1, 1)
    with tempfile.TemporaryDirectory() as folder:
        for words in given_in(work, Path(folder)):
            assert f"/{text}" in words


def test_a_manifest_is_what_kubernetes_takes() -> None:
    """It fits the MPIJob of kubeflow.org/v2beta1; ranks are spread evenly, and each has what it asked for."""
    work = work_of(TrainConfig(ranks=7, dataset="digits"), 3)
    cluster = Kubernetes(workers=3, cpus_per_rank=2, namespace="team", operator="v2beta1")
    job = yaml.safe_load(cluster.manifest(work))
    jsonschema.validate(job, SCHEMA)
    assert job["spec"]["slotsPerWorker"] == 3
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]
    assert worker["replicas"] == 3
    needs = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert needs == {"cpu": "6", "memory": "3Gi"}


def test_a_train_job_has_a_runtime_of_its_own() -> None:
    """The job refers to the runtime beside it; nodes, slots and needs are those of the work, the launcher
    runs the command, and Open MPI 5 gets settings that it reads."""
    work = work_of(TrainConfig(ranks=7, dataset="digits"), 3)
    runtime, job = yaml.safe_load_all(Kubernetes(workers=3, cpus_per_rank=2).manifest(work))
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert job["spec"]["runtimeRef"]["kind"] == runtime["kind"] == "TrainingRuntime"
    policy, trainer = runtime["spec"]["mlPolicy"], job["spec"]["trainer"]
    assert (policy["numNodes"], policy["mpi"]["numProcPerNode"]) == (3, 3)
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 3)
    node, launcher = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    container = node["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "6", "memory": "3Gi"}
    for its in (node, launcher):
        pod = its["template"]["spec"]["template"]["spec"]
        assert [container["name"] for container in pod["containers"]] == ["node"]  # what Trainer looks for
    names = [its["name"] for its in trainer["env"]]
    assert names == list(SETTINGS)
    assert all(name.startswith("PRTE_MCA_") for name in names)


CHECK = """
import json, sys, yaml
from kubeflow_trainer_api import models
kinds = {"TrainingRuntime": models.TrainerV1alpha1TrainingRuntime, "TrainJob": models.TrainerV1alpha1TrainJob}
given = list(yaml.safe_load_all(open(sys.argv[1])))
print(json.dumps([[its, kinds[its["kind"]].from_dict(its).to_dict()] for its in given]))
"""


@only_in_full
def test_a_train_job_is_what_kubeflow_trainer_takes(tmp_path: Path) -> None:
    """Kubeflow's own models of Trainer's API take every key of it, with its type, and drop none."""
    readers = find_or_install()
    if readers is None:
        pytest.skip("kubeflow-trainer-api cannot be installed from the package index")
    path = tmp_path / "job.yaml"
    path.write_text(Kubernetes(namespace="team").manifest(work_of(TrainConfig(ranks=4, dataset="digits"), 2)))
    for written, kept in ask(readers, CHECK, path):
        assert kept == written


def test_a_job_that_began_goes_on(tmp_path: Path) -> None:
    """Where the run folder holds a record the job resumes it."""
    out = tmp_path / "run"
    out.mkdir()
    work = Work(("--ranks", "2"), out, 2, 1)
    script = Slurm().script(work)
    assert "--resume" not in said_by(script, tmp_path, {})
    (out / "record.json").write_text("{}")
    words = said_by(script, tmp_path, {})
    assert words[words.index("--resume") + 1] == str(out)


@pytest.mark.parametrize(("code", "requeued"), [(130, True), (0, False), (1, False)])
def test_a_notice_reaches_the_ranks(tmp_path: Path, code: int, requeued: bool) -> None:
    """The script passes Slurm's notice on, waits for what comes of it, and only a run that stopped in time is
    put back into the queue; the script's code is that of the run."""
    program = f"import signal, sys; signal.signal(signal.SIGUSR1, lambda *_: sys.exit({code}))\n"
    program += "open('ready', 'w').close()\nimport time\ntime.sleep(30)\n"
    for name, text in {
        "rankwise": f"#!{sys.executable}\n{program}",
        "scontrol": '#!/bin/bash\necho "$@" > requeued\n',
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    script = Slurm().script(Work(("--ranks", "2"), tmp_path / "run", 2, 1))
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "-c", script], env=path, cwd=tmp_path)
    wait_for((tmp_path / "ready").exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["slurm", "--hosts", "a:2"], "--hosts was given, but the batch system says which hosts"),
        (["kubernetes", "--hostfile", "hosts"], "--hostfile was given, but the batch system"),
        (["slurm", "--nodes", "4", "--ranks", "2"], "2 ranks cannot be on 4 hosts"),
        (["slurm", "--nodes", "0"], "0 hosts were asked for"),
        (["slurm", "--model", "nope"], "unknown model 'nope'"),
        (["slurm", "--cpus-per-rank", "0"], "--cpus-per-rank 0 was given, expected 1 or more"),
        (["slurm", "--partition", "a b"], "'a b' was given for Slurm's --partition, expected one word"),
        (["kubernetes", "--out", "/home/x"], "expected a folder below /shared"),
        (["kubernetes", "--job-name", "My Job"], "--job-name My Job was given, expected lower-case"),
        (["kubernetes", "--memory-per-rank", "much"], "expected an amount like 1Gi or 500M"),
        (["slurm", "--to", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_what_cannot_be_submitted_is_told_in_one_line(submit: Submit, words: list[str], told: str) -> None:
    """Options that train or the batch system would refuse, before anything is written; code 2."""
    done = submit(*words)
    assert done.code == 2
    assert told in done.err
    assert len(done.err.splitlines()) == 1
    assert not done.out


def test_the_batch_system_has_its_say(
    submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--run gives the file to sbatch and tells its answer; a refusal, and no sbatch at all, are one line."""
    sbatch = tmp_path / "sbatch"
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submit("slurm", "--ranks", "2", "--run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "--run needs sbatch" in done.err
    sbatch.write_text("#!/bin/bash\nread line\n[ $line = '#!/bin/bash' ] && echo Submitted batch job 7\n")
    sbatch.chmod(0o755)
    done = submit("slurm", "--ranks", "2", "--run", "--to", str(tmp_path / "job.sh"))
    assert (done.code, done.out) == (0, "Submitted batch job 7\n")
    assert (tmp_path / "job.sh").exists()
    sbatch.write_text("#!/bin/bash\necho no such partition >&2\nexit 1\n")
    done = submit("slurm", "--ranks", "2", "--run")
    assert (done.code, done.err) == (2, "rankwise: sbatch refused the job: no such partition\n")


def test_the_image_is_in_order() -> None:
    """hadolint finds nothing in the Containerfile."""
    linter = Path(sys.executable).with_name("hadolint")
    path = Path(__file__).parent.parent / "Containerfile"
    done = subprocess.run([str(linter), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
