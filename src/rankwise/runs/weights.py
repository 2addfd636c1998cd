"""Trained weights that lie on the disk: of a run, or in a file. Finding them loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from rankwise.errors import ModelError, ResumeError, one_line
from rankwise.runs.checkpoint_names import AVERAGE, AVERAGE_REST, MANIFEST, MODEL, REST, numbers_of
from rankwise.runs.folder import RunFolder
from rankwise.system.files import misspelt

if TYPE_CHECKING:
    from torch import nn

Which = Literal["newest", "best"] | int
"""A checkpoint of a run: the newest, the one with the highest validation accuracy, or that of an epoch."""

RESTS = {AVERAGE: AVERAGE_REST, MODEL: REST}
"""In a checkpoint: the tensors of what was evaluated, the first that is there, and what such a file lacks."""

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Weights:
    """A file of trained weights; of a run's checkpoint also the `epoch` after which it was written, and the
    validation accuracy then, if there was an evaluation."""

    path: Path
    epoch: int | None = None
    accuracy: float | None = None

    @property
    def is_of_whole_epoch(self) -> bool:
        """Whether it was written at the end of its epoch, and not on the way through the next one."""
        return _is_of_whole_epoch(self.path.parent)

    @property
    def averaged(self) -> bool:
        """Whether it is the moving average of the weights, which such a run evaluates in place of them."""
        return self.path.name.startswith("average.")

    def read(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tensors by their names, and what else the model holds. Raises ResumeError, one line."""
        import safetensors.torch
        import torch

        from rankwise.models.rest import unpacked

        try:
            if self.path.suffix != ".safetensors":
                found = torch.load(self.path, map_location="cpu", weights_only=True)
                return _state_of(self.path, found), {}
            content = self.path.read_bytes()
            rest = self._rest_of(content)
            return dict(safetensors.torch.load(content)), unpacked(rest) if rest else {}
        except ResumeError:
            raise
        except UnpicklingError:  # in many words, of which some advise to trust the file
            raise ResumeError(
                f"{self.path} cannot be read as weights: expected what torch.save(model.state_dict()) "
                "writes, with tensors and nothing else in it"
            ) from None
        except Exception as error:  # of torch, of safetensors
            raise ResumeError(f"{self.path} cannot be read as weights: {one_line(error)[:200]}") from None

    def _rest_of(self, content: bytes) -> bytes:
        """What the checkpoint holds besides, after a look at whether both are as they were written."""
        manifest = self.path.parent / MANIFEST
        if self.path.name not in RESTS or not manifest.exists():
            return b""
        sums = json.loads(manifest.read_bytes())["files"]
        rest = self.path.with_name(RESTS[self.path.name])
        contents = {self.path.name: content} | ({rest.name: rest.read_bytes()} if rest.exists() else {})
        for name, its in contents.items():
            if hashlib.sha256(its).hexdigest() != sums.get(name):
                raise ResumeError(f"{self.path.with_name(name)} is damaged: it is not what was written")
        return contents.get(rest.name, b"")

    def load_into(self, model: nn.Module, name: str, *, part: str = "") -> None:
        """Give them to `model`, called `name`; with `part` those whose names begin so. Raises ModelError that
        names the first tensor that is missing, has another shape, or has no place in the model."""
        from rankwise.models.expanded import load

        tensors, rest = (
            {key.removeprefix(part): its for key, its in values.items() if key.startswith(part)}
            for values in self.read()
        )
        what = f"the weights in {self.path} do not fit {name}"
        require_fit(model.state_dict(), tensors, rest, what)
        try:
            load(model, tensors | rest)
        except Exception as error:  # modules with a state of their own may raise anything
            raise ModelError(f"{what}: {one_line(error)[:300]}") from None


def require_fit(
    held: Mapping[str, Any], tensors: Mapping[str, Any], rest: Mapping[str, Any], what: str
) -> None:
    """Compare names and shapes, in the order of what the model holds, and of names. Raises ModelError at the
    first that differs."""
    others = sorted(name for name in tensors if name not in held)  # a file has them in any order
    for name, ours in held.items():
        if name not in tensors and name not in rest:
            raise ModelError(f"{what}: they lack {name}{f', and have {others[0]}' if others else ''}")
        shapes = [tuple(getattr(its, "shape", ())) for its in (ours, tensors.get(name, ours))]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{what}: {name} has the shape {shapes[1]} there, and {shapes[0]} in the network"
            )
    if others:
        raise ModelError(f"{what}: they have {others[0]}, and the network has not")


def find_weights(source: Path, which: Which = "newest") -> Weights:
    """The weights of the run in the folder `source`, or of that file. Raises ResumeError, one line."""
    if source.is_file():
        if source.suffix not in SUFFIXES:
            raise ResumeError(
                f"{source} is no file of weights: expected a run folder, or a file {', '.join(SUFFIXES)}"
            )
        return Weights(source)
    if not source.is_dir():
        raise ResumeError(
            f"{source} does not exist{misspelt(source)}: expected a run folder or a file of weights"
        )
    kept = _kept(RunFolder(source).checkpoints)
    if not kept:
        raise ResumeError(f"{source} has no weights: there is no finished checkpoint in {source}/checkpoints")
    if which == "newest":
        return kept[-1]
    epochs = ", ".join(str(its.epoch) for its in kept if its.is_of_whole_epoch)
    if which == "best":
        return _best(source, kept, epochs)
    for its in kept:
        if its.epoch == which and its.is_of_whole_epoch:
            return its
    raise ResumeError(f"{source} holds no checkpoint of epoch {which}: those of {epochs} were kept")


def _best(source: Path, kept: list[Weights], epochs: str) -> Weights:
    evaluated = [its for its in kept if its.accuracy is not None]
    if not evaluated:
        raise ResumeError(f"{source} was not evaluated at a checkpoint, so none is the best: leave it out")
    best = max(evaluated, key=lambda its: (its.accuracy or 0.0, -(its.epoch or 0)))
    rows = RunFolder(source).read_metrics()
    reached = [row for row in rows if (row.get("val_accuracy") or 0.0) > (best.accuracy or 0.0)]
    if reached:
        top = max(reached, key=lambda row: row["val_accuracy"])
        raise ResumeError(
            f"{source} was best after epoch {top['epoch']}, and its checkpoint was not kept (those of "
            f"{epochs} were): train with --keep best, or name one of these"
        )
    return best


def _kept(folder: Path) -> list[Weights]:
    """What finished checkpoints hold, the oldest first."""
    found = []
    for manifest in folder.glob(f"[!.]*/{MANIFEST}"):
        try:
            content = json.loads(manifest.read_bytes())
            epoch, rows = int(content["epoch"]), list(content["notes"]["epochs"])
            of_it = rows if _is_of_whole_epoch(manifest.parent) else []  # whose weights nobody has evaluated
            accuracy = next((row.get("val_accuracy") for row in of_it if row["epoch"] == epoch), None)
        except (OSError, ValueError, TypeError, LookupError, AttributeError):
            continue  # damaged, or just being taken away
        for name in RESTS:
            if (manifest.parent / name).is_file():
                found.append(Weights(manifest.parent / name, epoch, accuracy))
                break
    return sorted(found, key=lambda its: (its.epoch or 0, its.path))


def _is_of_whole_epoch(checkpoint: Path) -> bool:
    return numbers_of(checkpoint.name)[1:] in ((), (0,))


def _state_of(path: Path, found: object) -> dict[str, Any]:
    """The tensors of what `torch.save` has written: a state dict, or one under its usual names."""
    for name in ("state_dict", "model_state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
            break
    if not isinstance(found, dict) or not all(hasattr(its, "shape") for its in found.values()):
        raise ResumeError(f"{path} holds no state dict: expected what torch.save(model.state_dict()) writes")
    return dict(found)
