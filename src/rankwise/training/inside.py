"""Where a rank is inside an epoch, as a checkpoint there keeps it: what a newcomer gets in the middle of an
epoch, and what a rank has of its own.

A run that goes on with as many ranks, and in the same way, does so at the very step. With other ranks, or in
another way, what is left of the epoch is dealt to those that are there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rankwise.comm import World
from rankwise.data.partition import NOTHING, Indices, join
from rankwise.data.sampler import RoundSampler
from rankwise.errors import ResumeError, one_line
from rankwise.runs.checkpoint import Checkpoint, Place
from rankwise.strategies.base import State, Strategy
from rankwise.strategies.recovery import Recovery, Stop
from rankwise.training.admission import replicated
from rankwise.training.generators import generators, set_generators
from rankwise.training.snapshots import Progress, Work

if TYPE_CHECKING:
    from rankwise.models.replica import Replica

How = Mapping[str, Any]
"""The options by which ranks keep in step: with others an epoch is not cut in the same way."""

OF_PLAN, OF_STATE, OF_REPLICA, OF_GENERATORS, OF_LOOP = "plan.", "state.", "replica.", "generators.", "loop."


@dataclass(frozen=True)
class Inside:
    """Takes the place of a rank inside an epoch, and brings the rank to such a place."""

    work: Work
    replica: Replica
    strategy: Strategy[Any]
    sampler: RoundSampler
    world: World

    @property
    def is_a_place(self) -> bool:
        """Whether a run could go on from here: not if the weights hold steps that are to be taken back."""
        return self.strategy.recovery is not Recovery.ROLL_BACK or not self.work.under_way

    def take(
        self, how: How, loop: Mapping[str, Any], arrays_of_loop: Mapping[str, Tensor] | None = None
    ) -> tuple[Place, dict[str, Any]]:
        """This rank's place, with what the loop has of its own, and what all ranks note alike; all ranks
        together."""
        work, world = self.work, self.world
        keeps = self.strategy.recovery.keeps_local_work
        kept, trained = join(work.under_way) if keeps else NOTHING, join(work.trained)
        done = len(kept) + work.ahead
        counts = world.allgather(np.array([done, len(trained) + len(kept), work.made if keeps else 0]))
        plan = self.sampler.plan(work.progress.epoch)
        arrays = {"kept": kept, "trained": trained, "rounds": np.array([*map(len, work.trained)], np.int64)}
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if world.rank == 0:
            of_plan = plan.arrays(work.progress.rounds, counts[:, 0], counts[:, 2])
            found |= {OF_PLAN + name: torch.from_numpy(array) for name, array in of_plan.items()}
        arrays, values = _of_state(work.state if keeps else replace(work.state, pending=0))
        found |= {OF_STATE + name: torch.from_numpy(array) for name, array in arrays.items()}
        tensors, rest = self.replica.snapshot().content()
        differs = counts[:, 0].any() or not self.strategy.recovery.synchronous
        places = range(len(tensors)) if differs else self.replica.unshared
        found |= {f"{OF_REPLICA}{place}": tensors[place] for place in places}
        drawn, its = generators()
        found |= {OF_GENERATORS + name: tensor for name, tensor in drawn.items()}
        found |= {OF_LOOP + name: tensor for name, tensor in (arrays_of_loop or {}).items()}
        notes = {
            "ahead": work.ahead,
            "made": work.made,
            "state": values,
            "generators": its,
            "loop": dict(loop),
        }
        of_all = {
            "ranks": world.size,
            "epoch": work.progress.epoch,
            "rounds": work.progress.rounds,
            "trained": int(counts[:, 1].sum() + len(plan.credited)),
            "how": dict(how),
        }
        return Place(found, notes, rest), of_all

    def go_on(self, checkpoint: Checkpoint, how: How) -> list[Mapping[str, Any]]:
        """Bring this rank, whose replica was restored, to where the run was. Returns what the loop had of its
        own, on rank 0 with that of ranks that are not there any more; nothing for a newcomer. Raises
        ResumeError if the checkpoint does not fit."""
        try:
            return self._go_on(checkpoint, how)
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise ResumeError(
                f"checkpoint {checkpoint.path} does not fit this run: {one_line(error)[:300]}"
            ) from None

    def _go_on(self, checkpoint: Checkpoint, how: How) -> list[Mapping[str, Any]]:
        world, work, inside = self.world, self.work, checkpoint.inside
        assert inside is not None
        ranks, same = int(inside["ranks"]), inside["how"] == dict(how)
        of_plan = {name: its.numpy() for name, its in part_of(checkpoint.place_of(0), OF_PLAN).items()}
        plan = self.sampler.plan_of(of_plan, int(inside.get("epoch", checkpoint.epoch + 1)))
        mine = checkpoint.place_of(world.rank) if world.rank < ranks else None
        meets = self.strategy.recovery.synchronous or self.strategy.stop is Stop.LATER
        if same and meets and ranks == world.size and self.sampler.follow_alike(plan):
            assert mine is not None
            rounds = int(inside["rounds"])
            lengths = mine.arrays["rounds"].tolist()
            trained = np.split(mine.arrays["trained"].numpy(), np.cumsum(lengths)[:-1]) if lengths else []
            kept, work.ahead = mine.arrays["kept"].numpy(), int(mine.notes["ahead"])
            work.made = int(mine.notes.get("made", 0))
        else:
            trained, kept = self._deal_rest(checkpoint, plan, ranks, same=same)
            rounds = 1
        work.progress = Progress(plan.epoch, rounds, closed=False)
        work.trained, work.under_way = list(trained), [kept] if len(kept) else []
        if mine is not None and same:
            self._restore(mine)
            values: dict[str, Any] = dict(mine.notes["state"])
            values |= {name: tensor.numpy() for name, tensor in part_of(mine, OF_STATE).items()}
            work.state = replace(work.state, **values)
        else:
            self._begin_from(checkpoint, same=same)
        gone = range(world.size, ranks) if world.rank == 0 else ()
        places = [*([mine] if mine else []), *map(checkpoint.place_of, gone)]
        return [place.notes["loop"] for place in places]

    def _deal_rest(
        self, checkpoint: Checkpoint, plan: Any, ranks: int, *, same: bool
    ) -> tuple[list[Indices], Indices]:
        """Deal what is left; returns what this rank has committed, and what it keeps of a round.

        Where ranks keep in step in another way all take the replica of rank 0, and with it what that one has
        trained; what the others have not committed is trained again.
        """
        places = [checkpoint.place_of(rank).arrays for rank in range(ranks)]
        trained = [place["trained"].numpy() for place in places]
        kept = [place["kept"].numpy() for place in places]
        if not same:
            trained[0], kept = join([trained[0], kept[0]]), [NOTHING] * ranks
        self.sampler.deal_rest(plan, trained, kept)
        rank = self.world.rank
        return ([trained[rank]], kept[rank]) if rank < ranks else ([NOTHING], NOTHING)

    def _restore(self, mine: Place) -> None:
        """Give the replica what this rank had of its own, and the generators where they were."""
        copy = self.replica.snapshot()
        tensors, rest = copy.content()
        for place, tensor in part_of(mine, OF_REPLICA).items():
            tensors[int(place)].copy_(tensor)
        rest.update(mine.rest)
        copy.restore()

    def _begin_from(self, checkpoint: Checkpoint, *, same: bool) -> None:
        """Be a newcomer, from the weights that all had last, if they are known, or those of rank 0."""
        work, strategy = self.work, self.strategy
        anchor = checkpoint.place_of(0).arrays.get(f"{OF_STATE}anchor") if same else None
        if anchor is not None:
            self.replica.unpack(anchor.numpy().copy())
        state = replace(work.state, memory=replicated(work.state.memory, strategy))
        work.state = strategy.open_epoch(state, self.replica, self.world)


def restore_generators(checkpoint: Checkpoint, rank: int) -> None:
    """Draw on where a rank was, if it was there. Raises ResumeError if that cannot be read."""
    if checkpoint.inside is None or rank >= checkpoint.inside["ranks"]:
        return
    place = checkpoint.place_of(rank)
    try:
        set_generators((part_of(place, OF_GENERATORS), place.notes["generators"]))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise ResumeError(f"checkpoint {checkpoint.path} does not fit: {one_line(error)[:300]}") from None


def part_of(place: Place, what: str) -> dict[str, Tensor]:
    """The arrays of a place whose names begin with `what`, under the rest of their names."""
    return {name.removeprefix(what): its for name, its in place.arrays.items() if name.startswith(what)}


def _of_state(state: State) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A strategy's state: its arrays, and its numbers. Its memory is kept elsewhere."""
    arrays, values = {}, {}
    for its in dataclasses.fields(state):
        value = getattr(state, its.name)
        if its.metadata.get("of_sitting") or its.name in ("memory", "measured"):
            continue
        if isinstance(value, np.ndarray):
            arrays[its.name] = np.ascontiguousarray(value)
        elif isinstance(value, bool | int | float | str):
            values[its.name] = value
    return arrays, values
