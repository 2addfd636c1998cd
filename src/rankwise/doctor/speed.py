"""How far a training step is from what the machine can do: `rankwise doctor --speed`."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rankwise import models
from rankwise.config import TrainConfig
from rankwise.errors import ConfigError
from rankwise.models.blank import blank_batch, make_gradients, seconds_of
from rankwise.models.optimizers import make_optimizer
from rankwise.models.replica import Replica
from rankwise.system import machine

IMAGE_SHAPE, CLASSES = (3, 32, 32), 10

PRECISIONS: dict[Literal["fp32", "bf16"], torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}

SIDE = 1024
"""Of the square matrices whose product is timed: large enough that starting it costs nothing, small enough
for a processor's cache."""

ARRAY = 1 << 24
"""Numbers in each array whose copying is timed, 64 MB: more than caches hold."""


@dataclass(frozen=True)
class Cost:
    """What a training step cannot do without.

    `flops` are those of matrix products and convolutions, forward and backward, a multiply-add being two.
    `bytes` are the least that move between processor and memory if nothing stays in a cache from one use to
    the next: images once; weights twice, forward and backward, and once more to be written; gradients,
    the optimiser's state, and what the forward pass keeps for the backward pass, written and read.
    """

    flops: int
    bytes: int


def measure(model: str, batch_size: int, threads: int | None) -> dict[str, Any]:
    """The machine's limits and a step's distance to them, as JSON can hold it; takes some ten seconds.

    Raises ConfigError, ModelError.
    """
    models.check(model)
    if batch_size < 1:
        raise ConfigError(f"--batch-size {batch_size} was given, expected 1 or more")
    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads} was given, expected 1 or more")
    cores = machine.usable_cores()
    threads = threads or cores
    machine.keep_freed_memory()
    limits = {n: limits_of(n) for n in sorted({1, cores, threads})}
    config = TrainConfig(model=model, batch_size=batch_size)
    steps = {name: _step(config, name, limits[threads], threads) for name in PRECISIONS}
    return {
        "cpu_model": machine.cpu_model(),
        "usable_cores": cores,
        "multiplies_bf16": machine.multiplies_bf16(),
        "limits": [{"threads": n, **found} for n, found in limits.items()],
        "model": model,
        "batch_size": batch_size,
        "threads": threads,
        "steps": [{"precision": name, **found} for name, found in steps.items()],
    }


@contextmanager
def _with_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def limits_of(threads: int) -> dict[str, float]:
    """The best of several tries each: a limit is what can be reached."""
    found = {}
    with _with_threads(threads), torch.inference_mode():
        for name, dtype in PRECISIONS.items():
            one, two, product = torch.ones(3, SIDE, SIDE, dtype=dtype).unbind()
            seconds = _best(functools.partial(torch.mm, one, two, out=product))
            found[f"{name}_flops_per_s"] = 2 * SIDE**3 / seconds
        a, b, c = torch.ones(3, ARRAY).unbind()
        # As STREAM counts: the bytes that the program names, each array once (McCalpin 1995).
        found["copy_bytes_per_s"] = 2 * a.nbytes / _best(lambda: a.copy_(b))
        found["triad_bytes_per_s"] = 3 * a.nbytes / _best(lambda: torch.add(b, c, alpha=3.0, out=a))
    return found


def _best(action: Callable[[], object]) -> float:
    return min(seconds_of(action, at_least_s=0.5))


def _step(
    config: TrainConfig, precision: Literal["fp32", "bf16"], limits: dict[str, float], threads: int
) -> dict[str, float]:
    """A step of the training loop without its data: what it takes, and what it could not do without."""
    with _with_threads(threads):
        torch.manual_seed(0)
        model = models.build(config.model, IMAGE_SHAPE, CLASSES)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # its stub lacks it
        replica = Replica(model, make_optimizer(config, model))
        batch = blank_batch(IMAGE_SHAPE, CLASSES, config.batch_size)

        def step() -> None:
            make_gradients(model, replica.optimizer, batch, precision)
            replica.step()

        needs = cost(model, replica, batch, precision)
        seconds = seconds_of(step, at_least_s=1.0)
    bandwidth = max(limits["copy_bytes_per_s"], limits["triad_bytes_per_s"])
    arithmetic_s, memory_s = needs.flops / limits[f"{precision}_flops_per_s"], needs.bytes / bandwidth
    step_s = statistics.median(seconds)
    return {
        "flops": needs.flops,
        "bytes": needs.bytes,
        "step_s": step_s,
        "fastest_step_s": min(seconds),
        "arithmetic_floor_s": arithmetic_s,
        "memory_floor_s": memory_s,
        "times_arithmetic_floor": step_s / arithmetic_s if arithmetic_s else float("inf"),
        "times_memory_floor": step_s / memory_s,
    }


def cost(
    model: nn.Module, replica: Replica, batch: tuple[Tensor, Tensor], precision: Literal["fp32", "bf16"]
) -> Cost:
    """What a step of this model on this batch cannot do without, found out by making its gradients once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # by where they lie: several operations may keep the same one

    def keep(tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in weights and where != batch[0].untyped_storage().data_ptr():
            kept[where] = tensor  # holds it, so that nothing else comes to lie there
        return tensor

    counter = FlopCounterMode(display=False)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        make_gradients(model, replica.optimizer, batch, precision)
    of_weights = sum(parameter.nbytes for parameter in model.parameters())
    of_state = sum(tensor.nbytes for tensor in replica.optimizer_tensors())
    of_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    moved = batch[0].nbytes + 3 * of_weights + 2 * (of_weights + of_state + of_kept)
    return Cost(counter.get_total_flops(), moved)


def page(facts: dict[str, Any]) -> RenderableType:
    """The facts of `measure` for a person."""
    limits = Table(title="What this machine reaches (best of several tries)", box=None)
    for column in ("threads", "float32, GFLOP/s", "bfloat16, GFLOP/s", "copy, GB/s", "triad, GB/s"):
        limits.add_column(column, justify="right")
    for row in facts["limits"]:
        limits.add_row(
            str(row["threads"]), *(f"{value / 1e9:.1f}" for key, value in row.items() if "_per_s" in key)
        )
    steps = Table(
        title=f"A step of {facts['model']}, batch {facts['batch_size']}, {facts['threads']} thread(s)",
        box=None,
    )
    for column in ("", "MFLOP", "MB to move", "step, ms", "arithmetic floor, ms", "memory floor, ms"):
        steps.add_column(column, justify="right")
    for row in facts["steps"]:
        times = (row[key] for key in ("step_s", "arithmetic_floor_s", "memory_floor_s"))
        steps.add_row(
            row["precision"],
            f"{row['flops'] / 1e6:.1f}",
            f"{row['bytes'] / 1e6:.1f}",
            *(f"{1e3 * seconds:.3f}" for seconds in times),
        )
    return Group(limits, steps, *(Text(_verdict(row)) for row in facts["steps"]), *_remarks(facts))


def _verdict(row: dict[str, Any]) -> str:
    closer = "arithmetic" if row["arithmetic_floor_s"] >= row["memory_floor_s"] else "memory"
    return (
        f"{row['precision']}: a step takes {row['times_arithmetic_floor']:.1f} times what its arithmetic "
        f"needs and {row['times_memory_floor']:.1f} times what its bytes need; {closer} is the nearer limit"
    )


def _remarks(facts: dict[str, Any]) -> Iterator[Text]:
    if not facts["multiplies_bf16"]:
        yield Text("This processor has no instructions for bfloat16: --precision bf16 is slow here.")
