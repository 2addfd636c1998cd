"""The frozen, validated configuration of a run.

Every option of ``rankwise train`` is a field here, with its default, unit and range; the command
line, TOML files, presets, the record and a user's script all speak in these names. A field alone
is checked when the object is made. What several fields say together is checked by `resolve`, once
all layers (preset, file, stored run, command line) lie on top of each other.
"""

from __future__ import annotations

import tomllib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PositiveInt,
    ValidationError,
)

from rankwise.errors import ConfigError, one_line, unknown_name
from rankwise.system.files import misspelt

PRESETS = Path(__file__).parent / "presets"

_PathAsText = Annotated[Path, PlainSerializer(str, return_type=str)]


def _flip_of_old(value: object) -> object:
    """Records and files from when there was one way to flip say yes or no."""
    return {True: "random", False: "none"}[value] if isinstance(value, bool) else value


def _whole_number(value: object) -> object:
    """A number that is written as text, as on a command line."""
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class CheckedOptions(BaseModel):
    """Options of a command, which do not change."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        """Raises ConfigError, one line, for an unknown name or a value out of range."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(explain(error)) from None


class TrainConfig(CheckedOptions):
    """One training run. The defaults are the paper's."""

    ranks: int = Field(1, ge=1, description="MPI processes in all, a master included.")
    hosts: str | None = Field(
        None,
        description="Start the ranks on these hosts, NAME:SLOTS,NAME:SLOTS, over ssh. Without --ranks "
        "as many as there are slots.",
    )
    hostfile: _PathAsText | None = Field(
        None, description="The same from a file with a line NAME slots=N for each host."
    )
    dataset: str = Field(
        "cifar10",
        description="Images to train on: digits, cifar10, cifar100, synthetic:N, folder:PATH, "
        "module:function.",
    )
    data_dir: _PathAsText | None = Field(
        None, description="Archive or folder that holds the dataset; otherwise it is downloaded to the cache."
    )
    cache_dir: _PathAsText | None = Field(
        None, description="Where decoded images are kept; otherwise the user's cache folder."
    )
    image_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="folder: cut the largest square out of the middle of each image, and scale it to this "
        "many pixels (bilinear, over all pixels that become one). Otherwise all must have one size.",
    )
    background: str = Field(
        "white", description="folder: the colour behind what is transparent, by name or as #rrggbb."
    )
    classes: int | None = Field(
        None, ge=2, description="Refuse a dataset with another number of classes, for which a recipe is not."
    )
    model: str = Field(
        "paper-cnn",
        description="Network: paper-cnn, mlp, resnet9, resnet18, airbench, airbench-wide, airbench-deep, or "
        "module:callable.",
    )
    fork: bool = Field(
        True,
        description="Import torch once on each host, and fork the ranks from there: they start sooner, and "
        "share its memory. Otherwise, and where it cannot be done, each imports it by itself. Linux only.",
    )
    strategy: str | None = Field(
        None,
        description="How ranks keep in step: single, parameter-averaging, replication, allreduce, "
        "gradient-server, local-sgd, post-local-sgd, slowmo, diloco, two-level, easgd, downpour, gossip, "
        "ddp, paper-stopwatch, or module:Class. By default single on one rank, else parameter-averaging.",
    )
    topology: Literal["master", "allreduce", "ring", "exponential", "complete"] | None = Field(
        None,
        description="master: rank 0 averages and evaluates and does not train; allreduce: all ranks train; "
        "ring, exponential, complete: who is whose neighbour in gossip. "
        "By default the strategy's own, master for averaging.",
    )
    shards: str = Field(
        "redealt",
        description="How the training set is dealt to workers: redealt each epoch, fixed for the run, "
        "or dirichlet:ALPHA for uneven classes.",
    )
    batch_size: int = Field(16, ge=1, description="Samples per worker and step.")
    balance: str = Field(
        "none",
        description="Batches, and with them shards, of workers that are not equally fast: measured (in "
        "proportion to their speed, found out before training), or N samples each, N,N,...; the sum "
        "stays that of equal ones.",
    )
    epochs: int = Field(25, ge=1, description="Passes over the training set.")
    lr: float = Field(0.001, gt=0, description="Learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Momentum of SGD.")
    nesterov: bool = Field(False, description="Nesterov's form of the momentum.")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty (AdamW: decoupled decay).")
    optimizer: Literal["sgd", "adam", "adamw", "muon"] = Field(
        "sgd", description="Optimiser of each worker; muon takes SGD for what is no hidden matrix."
    )
    muon_lr: float | None = Field(
        None, gt=0, description="muon: learning rate of the hidden matrices. By default 0.02."
    )
    muon_fixed_norm: bool = Field(
        False,
        description="muon: keep each hidden matrix as large as an orthogonal one, for networks that "
        "normalise what it makes.",
    )
    norm_bias_lr_scale: float = Field(
        1.0,
        gt=0,
        description="Learning rate of the biases of normalisation layers, as a multiple of the others'; "
        "their weight decay is divided by it.",
    )
    optimizer_state: Literal["keep", "average", "reset"] = Field(
        "keep", description="What a synchronisation does to the optimiser's state, e.g. its momentum."
    )
    sync_every: PositiveInt | Literal["epoch"] | None = Field(
        None,
        description="Steps between synchronisations, or epoch. By default the strategy's own. "
        "Strategies that send gradients add them up over this many steps (gradient accumulation).",
    )
    compress: str = Field(
        "none",
        description="What is sent in place of float32: fp16, bf16, int8, topk:FRACTION, sign, powersgd:RANK, "
        "each with error feedback.",
    )
    local_after: float | None = Field(
        None,
        ge=0,
        le=1,
        description="post-local-sgd: part of the epochs in which every step is synchronised. By default 0.5.",
    )
    outer_lr: float | None = Field(
        None,
        gt=0,
        description="Learning rate of what is averaged. By default 1 for slowmo, 0.7 for diloco.",
    )
    outer_momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Momentum of what is averaged. By default 0.7 for slowmo, 0.9 for diloco.",
    )
    elasticity: float | None = Field(
        None,
        gt=0,
        le=1,
        description="easgd: how far all workers together pull the centre with an exchange each. "
        "By default 0.9.",
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="easgd, downpour: exchanges by which a worker may be ahead of the slowest. By default no "
        "limit.",
    )
    bucket_mb: float | None = Field(
        None,
        gt=0,
        description="allreduce: gradients are sent in pieces of this many megabytes, while the backward pass "
        "still runs. By default 25.",
    )
    sync_across_hosts: int | None = Field(
        None,
        ge=1,
        description="Asks for two-level: steps between averagings of weights across hosts, while "
        "inside a host every step is synchronised. By default 8.",
    )
    clip_norm: float | None = Field(
        None, gt=0, description="Limit of the norm of all gradients together, in each step of an optimiser."
    )
    schedule: Literal["constant", "cosine", "one-cycle", "step", "triangular"] = Field(
        "constant",
        description="Learning rate over the run; step divides it by 10 after half and three quarters of it, "
        "triangular rises and falls in straight lines.",
    )
    peak_at: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="one-cycle, triangular: part of the run after which the learning rate is highest. By "
        "default 0.3 and 0.23.",
    )
    final_lr_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="cosine, one-cycle, triangular: where the learning rate ends, as a part of the highest. "
        "By default 0, 0 and 0.07.",
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = Field(
        "none", description="Multiply the learning rate by the number of workers, or its square root."
    )
    warmup: float = Field(0.0, ge=0, description="Epochs in which the learning rate rises from 0.")
    flip: Annotated[Literal["none", "random", "alternating"], BeforeValidator(_flip_of_old)] = Field(
        "none",
        description="Mirror training images, each by chance or, alternating, in every other epoch.",
    )
    translate: int = Field(
        0, ge=0, le=64, description="Move training images by up to this many pixels, with reflected borders."
    )
    cutout: int = Field(
        0, ge=0, le=64, description="Cut a square of this many pixels out of training images, at random."
    )
    resize: str = Field(
        "none",
        description="Train the first epochs on smaller images, HEIGHT:EPOCHS,...: 16:1,24:3 is one epoch on "
        "images of 16 pixels and three of 24, before those of full size.",
    )
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Part of each label that the training loss spreads evenly over all classes "
        "(arXiv:1512.00567).",
    )
    whitening: int = Field(
        0,
        ge=0,
        description="Make the first convolution whiten its patches, as found in this many training images, "
        "and do not train it; 0 leaves it alone.",
    )
    init: str | None = Field(
        None,
        description="Begin with trained weights in place of random ones: those of a run folder's newest "
        "checkpoint, of RUN@best or RUN@EPOCH, or of a file (.safetensors, .pt). Names and shapes must fit.",
    )
    freeze: str = Field(
        "none",
        description="NAME:EPOCH,...: from this epoch on parameters whose names begin so stay as they are, "
        "e.g. blocks.0:6, which spares the backward pass of a network's first layers.",
    )
    averaged_weights: Literal["none", "ema", "lookahead"] = Field(
        "none",
        description="Evaluate a moving average of the weights; with lookahead training goes on from it, too.",
    )
    average_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="ema, lookahead: part of the average that stays at a step (or synchronisation of "
        "weights). By default 0.99 and 0.95.",
    )
    evaluate_every: int = Field(
        1, ge=1, description="Epochs between evaluations; after the last one there always is one."
    )
    tta: Literal["none", "flip", "flip+shift"] = Field(
        "none",
        description="Evaluate the mean of the scores of each image and its mirror image, and of both moved "
        "by a pixel.",
    )
    tta_from_epoch: int = Field(
        1, ge=1, description="First epoch that is evaluated so; those before take one pass an image."
    )
    tta_below: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Leave it at one pass for images whose likeliest class has at least this probability "
        "after it; 1 looks at all from all sides.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of every random choice.")
    threads: PositiveInt | Literal["auto", "all"] = Field(
        "auto",
        description="Arithmetic threads a rank: auto shares the allowed cores among the ranks of a host; "
        "all gives every rank every core.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="Arithmetic of forward and backward pass: float32, or bfloat16 where that is safe "
        "(autocast). Weights, gradients that are exchanged, and averages are float32 with both.",
    )
    compile: Literal["off", "on", "auto"] = Field(
        "off",
        description="torch.compile for the model in training: auto where training takes minutes and a "
        "compiled step turns out to be faster. Needs a C++ compiler; without one the model trains as it is.",
    )
    memory_format: Literal["channels-last", "contiguous"] = Field(
        "channels-last", description="How images and weights of convolutions lie in memory."
    )
    onednn: bool = Field(
        True, description="Convolutions by oneDNN; PyTorch's own can be faster for batches of a few images."
    )
    train_limit: int | None = Field(None, ge=1, description="Use this many training samples at most.")
    val_limit: int | None = Field(None, ge=1, description="Use this many validation samples at most.")
    validation_split: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Validate on this fraction of the training set (which then does not train), "
        "not on the test set.",
    )
    target_accuracy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Stop after the epoch that reaches this accuracy (fraction) on the test set, or on the "
        "held-out images of --validation-split. The record has the time to it.",
    )
    on_failure: Literal["continue", "restart", "stop"] | None = Field(
        None,
        description="What a rank that is lost means: continue (the others share its samples out and go on), "
        "restart (all are started again from the newest checkpoint) or stop. By default continue where MPI "
        "and strategy can, else stop.",
    )
    hang_timeout: float = Field(
        60.0,
        ge=0,
        description="End a rank that is stopped, or asleep in a lock while others wait for it, after this "
        "many seconds; one that takes as long in another way is shown as slow and left alone. 0 never.",
    )
    step_timeout: float = Field(
        0.0,
        ge=0,
        description="End a rank that is still in the same forward pass, backward pass, optimiser's step or "
        "batch of an evaluation after this many seconds, whatever it does, if another one is on its host; "
        "0 never.",
    )
    on_shrink: Literal["keep-local-batch", "keep-global-batch"] = Field(
        "keep-local-batch",
        description="What ranks that go on without another keep: the batch of each worker, or that of all "
        "together, which then each worker has a larger part of.",
    )
    spares: int = Field(
        0,
        ge=0,
        description="Ranks over and above --ranks that sleep until one is lost, and take its place.",
    )
    elastic: str | None = Field(
        None,
        description="MIN:MAX ranks. Where ranks were lost, others get ready while the rest train, and take "
        "over; and with --hostfile there are as many as the file has slots for, whenever it changes.",
    )
    keep_copies: bool = Field(
        False,
        description="After each synchronisation send what only this rank has (its optimiser's state, what "
        "its compression has left out) to another one, on another host where there is one, so that it is not "
        "lost with the rank.",
    )
    min_ranks: int = Field(
        1,
        ge=1,
        description="The least ranks to go on with; with fewer others get ready, while they train, and take "
        "over. Where nobody can start others the run ends.",
    )
    max_restarts: int = Field(
        3, ge=0, description="How often a run is started again from its newest checkpoint."
    )
    fail_on_lost_rank: bool = Field(
        False,
        description="End with exit code 1 if a rank was lost, even though the run was completed without it "
        "or started again.",
    )
    fault: tuple[str, ...] = Field(
        (),
        description="Put a fault into the run, KIND:KEY=VALUE,...: kill, crash, hang, sleep (seconds), slow "
        "(factor), nan, drop-host or cut (a rank's host), at a rank, epoch, step and phase (compute, "
        "exchange, evaluation, checkpoint, recovery), or by chance with probability p an epoch. Can be given "
        "several times.",
    )
    cross_check: bool = Field(
        False,
        description="Put a barrier before each exchange and time it, to check the ledger's waiting by it "
        "(slower; ranks[].barrier_wait_ns in the record).",
    )
    track: Literal["none", "tensorboard", "mlflow"] = Field(
        "none",
        description="Write metrics where you look for them too: tensorboard (in the run folder) or mlflow "
        "(where its environment variables say).",
    )
    checkpoint_every: Annotated[int | str, BeforeValidator(_whole_number)] = Field(
        1,
        description="Between checkpoints: N or Nepochs, Nsteps or Ns (seconds). Those inside an epoch are "
        "written behind the next synchronisation.",
    )
    keep: Literal["newest", "best"] = Field(
        "newest",
        description="best: beside the newest checkpoints also that of the epoch with the highest validation "
        "accuracy, which is written even if --checkpoint-every leaves it out.",
    )
    checkpoint_keep: int = Field(2, ge=2, description="Checkpoints kept, the newest ones.")
    out: _PathAsText | None = Field(None, description="Run folder; otherwise runs/<time>-<name>.")

    @property
    def processes(self) -> int:
        """All ranks that are started, those that stand by included."""
        return self.ranks + self.spares

    def given(self) -> dict[str, Any]:
        """Only what was set on purpose, not the defaults."""
        return self.model_dump(include=self.model_fields_set)

    def over(self, *layers: dict[str, Any]) -> TrainConfig:
        """This configuration on top of others: what was given here wins, then earlier layers."""
        merged: dict[str, Any] = {}
        for layer in reversed(layers):
            merged.update(layer)
        return TrainConfig(**{**merged, **self.given()})


LOOP_OPTIONS = (
    *(
        "strategy",
        "sync_every",
        "sync_across_hosts",
        "optimizer_state",
        "compress",
        "outer_lr",
        "outer_momentum",
    ),
    *("epochs", "seed", "threads", "on_failure", "on_shrink", "min_ranks", "spares"),
    *("hang_timeout", "step_timeout"),
    *("checkpoint_every", "checkpoint_keep", "keep", "target_accuracy", "track", "out", "cross_check"),
)
"""Options that a training loop of a user's own can have."""

PROGRAM_OPTIONS = (
    *("ranks", "hosts", "hostfile", "max_restarts", "fail_on_lost_rank", "fault"),
    *LOOP_OPTIONS,
)
"""Options with which a program with such a loop is started."""

GROUPS: dict[str, tuple[str, ...]] = {
    "Data": (
        *(
            "dataset",
            "data_dir",
            "cache_dir",
            "image_size",
            "background",
            "classes",
            "train_limit",
            "val_limit",
            "validation_split",
        ),
        *("flip", "translate", "cutout", "resize"),
    ),
    "Model": (
        *("model", "init", "whitening", "freeze", "averaged_weights", "average_decay"),
        *("precision", "compile", "memory_format", "onednn"),
    ),
    "Optimiser": (
        *("epochs", "batch_size", "lr", "optimizer", "momentum", "nesterov", "weight_decay", "muon_lr"),
        *("muon_fixed_norm", "norm_bias_lr_scale", "clip_norm", "label_smoothing"),
        *("schedule", "warmup", "peak_at", "final_lr_fraction", "lr_scaling", "seed"),
    ),
    "Ranks in step": (
        *(
            "ranks",
            "hosts",
            "hostfile",
            "fork",
            "threads",
            "strategy",
            "topology",
            "sync_every",
            "sync_across_hosts",
        ),
        *("shards", "balance", "optimizer_state", "compress", "local_after", "outer_lr", "outer_momentum"),
        *("elasticity", "max_staleness", "bucket_mb"),
    ),
    "Survival": (
        *(
            "on_failure",
            "hang_timeout",
            "step_timeout",
            "spares",
            "elastic",
            "keep_copies",
            "min_ranks",
            "on_shrink",
            "max_restarts",
            "fail_on_lost_rank",
            "fault",
        ),
        *("checkpoint_every", "checkpoint_keep", "keep"),
    ),
    "Evaluation and output": (
        *("evaluate_every", "tta", "tta_from_epoch", "tta_below", "target_accuracy"),
        *("out", "track", "cross_check"),
    ),
}
"""The options of a training as `--help` shows them."""


def explain(error: ValidationError) -> str:
    """A pydantic error as one line: the option, what was given, what was expected."""
    first = error.errors(include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "extra_forbidden":
        return unknown_name("option", field, TrainConfig.model_fields)
    # A field of several types reports one error a type: tell all that it could have been.
    expected = " or ".join(
        dict.fromkeys(
            str(e["msg"]).removeprefix("Input should be ").split(", unable to parse")[0]
            for e in error.errors(include_url=False)
            if e["loc"][:1] == first["loc"][:1]
        )
    )
    return f"--{field.replace('_', '-')}: {first['input']!r} was given, expected {expected}"


def read_table(path: Path, kind: str) -> dict[str, Any]:
    """What a TOML file holds; `kind` is what the user calls such a file. Raises ConfigError, one line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the {kind} file {path}: {one_line(error)}{misspelt(path)}") from None


def read_toml(path: Path, known: Collection[str] | None = None) -> dict[str, Any]:
    """The options in a TOML file, unchecked (TrainConfig checks them). Dashes and underscores are one. Raises
    ConfigError for a name that is not `known`, by default as an option of `train`."""
    options = {key.replace("-", "_"): value for key, value in read_table(path, "configuration").items()}
    known = TrainConfig.model_fields if known is None else known
    for key in options:
        if key not in known:
            raise ConfigError(f"{path}: {unknown_name('option', key, known)}")
    return options


def preset_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read_preset(name: str) -> dict[str, Any]:
    """The options of a recipe that comes with the package."""
    return read_toml(_preset(name))


def preset_text(name: str) -> str:
    """The file of a recipe that comes with the package, which begins with comments that say what it is."""
    return _preset(name).read_text(encoding="utf-8")


def _preset(name: str) -> Path:
    if name not in preset_names():
        raise ConfigError(unknown_name("preset", name, preset_names()))
    return PRESETS / f"{name}.toml"
