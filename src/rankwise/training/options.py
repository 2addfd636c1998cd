"""The options of a loop of one's own, by the names that `rankwise train` has for them."""

from __future__ import annotations

from typing import Literal, TypedDict


class LoopOptions(TypedDict, total=False):
    """Options of `rankwise train` that mean something to a loop of one's own, with the same defaults.

    Which values they take, `TrainConfig` checks.
    """

    # How ranks keep in step
    strategy: str | None
    topology: Literal["master", "allreduce", "ring", "exponential", "complete"] | None
    sync_every: int | Literal["epoch"] | None
    optimizer_state: Literal["keep", "average", "reset"]
    compress: str
    local_after: float | None
    outer_lr: float | None
    outer_momentum: float | None
    elasticity: float | None
    max_staleness: int | None
    bucket_mb: float | None
    sync_across_hosts: int | None
    # What each rank trains
    batch_size: int
    balance: str
    shards: str
    seed: int
    # How the learning rate goes, and what becomes of gradients and weights
    epochs: int
    schedule: Literal["constant", "cosine", "one-cycle", "step", "triangular"]
    peak_at: float | None
    final_lr_fraction: float | None
    lr_scaling: Literal["none", "linear", "sqrt"]
    warmup: float
    clip_norm: float | None
    averaged_weights: Literal["none", "ema", "lookahead"]
    average_decay: float | None
    # What happens when a rank is lost
    on_failure: Literal["continue", "restart", "stop"] | None
    on_shrink: Literal["keep-local-batch", "keep-global-batch"]
    min_ranks: int


class RunOptions(TypedDict, total=False):
    """Options of `rankwise run` that a `Run` takes in a program, with the same defaults."""

    # How ranks keep in step
    sync_every: int | Literal["epoch"] | None
    sync_across_hosts: int | None
    optimizer_state: Literal["keep", "average", "reset"]
    compress: str
    outer_lr: float | None
    outer_momentum: float | None
    seed: int
    threads: int | Literal["auto", "all"]
    target_accuracy: float | None
    # What happens when a rank is lost
    on_failure: Literal["continue", "restart", "stop"] | None
    on_shrink: Literal["keep-local-batch", "keep-global-batch"]
    min_ranks: int
    spares: int
    hang_timeout: float
    step_timeout: float
    # What the run leaves
    out: str | None
    track: Literal["none", "tensorboard", "mlflow"]
    checkpoint_every: int | str
    checkpoint_keep: int
    keep: Literal["newest", "best"]
    cross_check: bool
