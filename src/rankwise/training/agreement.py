"""What all ranks must have been told alike, and hold alike, before they begin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rankwise.comm import World
from rankwise.errors import ConfigError, ModelError, OutOfStepError, RankwiseError
from rankwise.system.call_sites import here

if TYPE_CHECKING:
    import torch
    from torch import nn

NOTHING, UNSAID = "nothing more", "not given"


SHAPELESS = "that has no shape yet"


def require_same_options(world: World, mine: Mapping[str, Any]) -> None:
    """Compare options by name; all ranks together. Raises ConfigError if a rank was given others."""
    for rank, theirs in enumerate(world.allgather_object(dict(mine))):
        for name in mine | theirs:
            value, its = mine.get(name, UNSAID), theirs.get(name, UNSAID)
            if value != its:
                raise ConfigError(
                    f"ranks were given different options: --{name.replace('_', '-')} is {value} on rank "
                    f"{world.rank} and {its} on rank {rank}; start all ranks with the same command"
                )


def require_same_place(world: World, doing: str, error: type[RankwiseError] = OutOfStepError) -> None:
    """Compare what the ranks do next; all ranks together. Raises the error, on all, if one does something
    else."""
    words: list[tuple[str, str]] = world.allgather_object((doing, here()))
    for rank, (its, place) in enumerate(words):
        if its != words[0][0]:
            first, where = words[0]
            raise error(
                f"rank 0 is to {first} in {where} where rank {rank} is to {its} in {place}: do the same on "
                "all ranks"
            )


def require_same_model(world: World, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Compare names, shapes, types and order of parameters and buffers, and the optimiser's settings; all
    ranks together. Raises ModelError if a rank has others, and on all for what has no shape yet."""
    mine = _parts(model, optimizer)
    for rank, theirs in enumerate(world.allgather_object(mine)):
        if (pair := first_difference(mine, theirs)) is not None:
            part, its = pair
            raise ModelError(
                f"ranks hold different models: rank {world.rank} has {part} where rank {rank} has {its}; "
                "make model and optimiser in the same order and with the same values on each rank"
            )
    for part in mine:
        if SHAPELESS in part:
            raise ModelError(f"{part}: call model(inputs) once, as lazy layers want, before synchronise")


def first_difference(mine: Sequence[str], theirs: Sequence[str]) -> tuple[str, str] | None:
    """The first two parts, in words, in which what two ranks hold differs; None if it does not."""
    pairs = zip([*mine, NOTHING], [*theirs, NOTHING], strict=False)
    return next((pair for pair in pairs if pair[0] != pair[1]), None)


def _parts(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Model and optimiser in words, one for each part."""
    from torch.nn.parameter import is_lazy

    from rankwise.models.optimizer_state import settings_of

    tensors: list[tuple[str, str, torch.Tensor]] = [("parameter", *its) for its in model.named_parameters()]
    tensors += [("buffer", *its) for its in model.named_buffers()]
    parts = []
    for kind, name, tensor in tensors:
        shape = SHAPELESS if is_lazy(tensor) else list(tensor.shape)
        frozen = "" if tensor.requires_grad or kind == "buffer" else ", frozen"
        parts.append(f"the {kind} {name} {shape} of {str(tensor.dtype).removeprefix('torch.')}{frozen}")
    settings = settings_of(optimizer)
    parts += [
        f"{name} = {value} in the optimiser's group {group}" for (group, name), value in settings.items()
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for number, group in enumerate(optimizer.param_groups):
        known = (names.get(id(parameter), "one of its own") for parameter in group["params"])
        parts += [f"{name} in the optimiser's group {number}" for name in known]
        begun = sum(bool(optimizer.state.get(parameter)) for parameter in group["params"])
        parts.append(f"state of {begun} parameters in the optimiser's group {number}")
    return [*parts, f"the optimiser {type(optimizer).__name__}"]
