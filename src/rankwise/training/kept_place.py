"""Where a user's loop is inside an epoch, as a checkpoint there keeps it: `Place` as tensors and JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ResumeError, one_line
from rankwise.runs.checkpoint import Checkpoint
from rankwise.training.history import SampleCounts
from rankwise.training.inside import OF_LOOP, part_of
from rankwise.training.loader import Draw
from rankwise.training.metrics import added
from rankwise.training.place import Place

ORDER, BATCHES, GRADIENT = "order", "batches", "gradient."


def notes_of(place: Place, of_run: Mapping[str, Any]) -> dict[str, Any]:
    """What of a rank's place is JSON, with what the run notes of it."""
    return {
        "epoch": place.epoch,
        "stage": place.stage,
        "passes_over": place.passes_over,
        "turns": place.turns,
        "counts": {str(number): astuple(its) for number, its in place.counts.items()},
        "ended_early": place.ended_early,
        "draws": list(place.draws),
        "gradients": len(place.gradients),
        "kind": place.kind,
        "sums": place.sums,
        "seconds": place.seconds,
        **of_run,
    }


def arrays_of(place: Place, rank: int) -> dict[str, Tensor]:
    """What of it are tensors; those that all ranks have alike on rank 0."""
    arrays = {
        f"{GRADIENT}{number}": its.to_dense() for number, its in enumerate(place.gradients) if its is not None
    }
    if rank == 0:
        arrays[ORDER] = torch.from_numpy(place.drawn.order)
        if place.drawn.batches is not None:
            arrays[BATCHES] = torch.from_numpy(place.drawn.batches)
    return arrays


def place_in(checkpoint: Checkpoint, rank: int, of_ranks: Sequence[Mapping[str, Any]]) -> Place:
    """Where a rank goes on. `of_ranks` are the notes of those whose part it has, none for a rank that was not
    there. Raises ResumeError if they cannot be read."""
    assert checkpoint.inside is not None
    first = checkpoint.place_of(0)
    is_new = rank >= int(checkpoint.inside["ranks"])
    arrays = part_of(first, OF_LOOP)
    mine = arrays if is_new else part_of(checkpoint.place_of(rank), OF_LOOP)
    try:
        notes = first.notes["loop"]
        batches = arrays.get(BATCHES)
        sums = [
            {name: (float(value), float(weight)) for name, (value, weight) in its["sums"].items()}
            for its in [{"sums": dict.fromkeys(notes["sums"], (0.0, 0.0))}, *of_ranks]
        ]
        return Place(
            epoch=int(notes["epoch"]),
            stage=notes["stage"],
            passes_over=int(notes["passes_over"]),
            turns=int(notes["turns"]),
            is_open=True,
            again=False,
            means=0,
            counts={int(number): SampleCounts(*its) for number, its in notes["counts"].items()},
            ended_early=bool(notes["ended_early"]),
            draws=list(notes["draws"]),
            drawn=Draw(arrays[ORDER].numpy(), None if batches is None else batches.numpy()),
            gradients=[mine.get(f"{GRADIENT}{number}") for number in range(int(notes["gradients"]))],
            kind=str(notes["kind"]),
            sums=reduce(added, sums),
            seconds=float(notes["seconds"]),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ResumeError(f"checkpoint {checkpoint.path} does not fit: {one_line(error)[:300]}") from None
