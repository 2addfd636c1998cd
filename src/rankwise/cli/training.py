"""Commands that train, here or by a batch system."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from rankwise.cli.options import (
    CacheDir,
    ConfigFile,
    DataDir,
    DatasetName,
    Debug,
    Format,
    InGroups,
    Options,
    Preset,
    Run,
    To,
    app,
    layered,
    stdout,
    submit_app,
    tell_result,
)
from rankwise.config import TrainConfig, preset_names, preset_text
from rankwise.submit import Kubernetes, Slurm, hand_over, work_of
from rankwise.system.numbers import WHOLE


@app.command(help_formatter=InGroups())
def train(
    *,
    config: Options = TrainConfig(),  # noqa: B008
    config_file: ConfigFile = None,
    preset: Preset = None,
    resume: Annotated[
        Path | None, Parameter(help="Go on in this run folder, with its options and from its checkpoint.")
    ] = None,
    tune: Annotated[
        bool,
        Parameter(
            negative="",
            help="First find out by short runs how this machine trains this fastest: threads, memory format, "
            "compiling, and ranks unless --ranks is given (the batch of all ranks stays). The mathematics "
            "stays: bf16 and fp32 are only compared with --precision bf16. What is found is remembered.",
        ),
    ] = False,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Train a network on N ranks; they are started here unless mpiexec or srun did so already.

    The command line wins over --config, and that over --preset.
    """
    from rankwise.launch import Order, launch
    from rankwise.system import machine

    order = Order(
        layered(config, config_file, preset),
        resume=resume,
        tune=tune,
        asked_ns=machine.process_start_ns(),
    )
    result = launch(order)
    if result.speaks:
        tell_result(result.record, result.folder, format)


@app.command
def presets(
    name: Annotated[str | None, Parameter(help="The recipe to print, to be copied and edited.")] = None,
    /,
    *,
    debug: Debug = False,
) -> None:
    """List the recipes that come with the package, or print one as the TOML file that --config takes."""
    if name is not None:
        print(preset_text(name), end="")
        return
    for each in preset_names():
        about = itertools.takewhile(lambda line: line.startswith("#"), preset_text(each).splitlines())
        print(each, *(f"    {line.removeprefix('#').strip()}" for line in about), sep="\n")


@app.command
def reproduce(
    experiment: Annotated[
        Literal[
            "baseline", "replication", "processes", "batch-size", "timing", "all", "strategies", "faults"
        ],
        Parameter(
            help="The paper's experiment, all of them, all strategies against each other, or the experiment "
            "with faults that the paper left out."
        ),
    ],
    /,
    *,
    output: Annotated[
        Path, Parameter(help="Folder for its page, tables, records and runs; what is finished there is kept.")
    ] = Path("reproduction"),
    dataset: DatasetName = "cifar10",
    data_dir: DataDir = None,
    cache_dir: CacheDir = None,
    repeats: Annotated[
        int, WHOLE, Parameter(help="Seeds 0, 1, ...; from 2 on results come with intervals.")
    ] = 1,
    quick: Annotated[bool, Parameter(negative="", help="A short form of a few minutes.")] = False,
    task: Annotated[
        Literal["images", "language"],
        Parameter(help="strategies: learn images by a convolutional network, or text by a transformer."),
    ] = "images",
    text: Annotated[
        Path | None,
        Parameter(help="language: a text file in UTF-8; by default Python's own help, 0.5 MB."),
    ] = None,
    ranks: Annotated[int | None, WHOLE, Parameter(help="language: ranks that train. By default 4.")] = None,
    tokens: Annotated[
        int | None,
        WHOLE,
        Parameter(help="language: characters that all ranks of a final run train. By default 4096000."),
    ] = None,
    width: Annotated[
        int | None,
        WHOLE,
        Parameter(
            help="language: width of the transformer, which has a layer for each 32: by default 128, "
            "with 0.8 M parameters; 64 has 0.1 M."
        ),
    ] = None,
    lr: Annotated[
        float | None,
        Parameter(help="language: learning rate of all strategies; by default each has the best of some."),
    ] = None,
    format: Format = "text",
    debug: Debug = False,
) -> None:
    """Run the paper's experiments with its settings, and set its results beside ours."""
    from rankwise import studies

    study = studies.Study(
        experiment,
        output,
        dataset,
        data_dir,
        cache_dir,
        repeats,
        quick,
        task=task,
        text=text,
        ranks=ranks,
        tokens=tokens,
        width=width,
        lr=lr,
    )
    done = studies.reproduce(study)
    if format == "json":
        print(studies.to_json(done))
    else:
        stdout().print(studies.summary(done))


@submit_app.command(help_formatter=InGroups())
def slurm(
    *,
    cluster: Annotated[Slurm, Parameter(name="*")] = Slurm(),  # noqa: B008
    config: Options = TrainConfig(),  # noqa: B008
    config_file: ConfigFile = None,
    preset: Preset = None,
    to: To = None,
    run: Run = False,
    debug: Debug = False,
    arguments: Annotated[list[str], Parameter(parse=False)],
) -> None:
    """Write a batch script for Slurm, with every option of train.

    The job saves itself before its time is up or others go first, is put back into the queue, and goes on.
    """
    work = work_of(layered(config, config_file, preset), cluster.nodes)
    print(hand_over(cluster.script(work, ["submit", *arguments]), to, ["sbatch"] if run else None))


@submit_app.command(help_formatter=InGroups())
def kubernetes(
    *,
    cluster: Annotated[Kubernetes, Parameter(name="*")] = Kubernetes(),  # noqa: B008
    config: Options = TrainConfig(),  # noqa: B008
    config_file: ConfigFile = None,
    preset: Preset = None,
    to: To = None,
    run: Run = False,
    debug: Debug = False,
    arguments: Annotated[list[str], Parameter(parse=False)],
) -> None:
    """Write a job for Kubernetes with Kubeflow's Trainer or MPI Operator, with every option of train.

    A launcher that is evicted has the ranks save, and one that is started again goes on.
    """
    work = work_of(layered(config, config_file, preset), cluster.workers)
    program = ["kubectl", "create", "-f", "-"] if run else None
    print(hand_over(cluster.manifest(work, ["submit", *arguments]), to, program))
