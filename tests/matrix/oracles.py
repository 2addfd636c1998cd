"""The rules of the strategies in plain torch, on one process: what ranks have to end with.

Each takes the batches that the ranks saw, and a way to make the user's program anew.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.matrix.compressors import Sums
from tests.matrix.models import Program
from tests.matrix.styles import EPOCHS, Style

Batches = list[np.ndarray]
Ended = dict[str, Tensor]
"""What a rank ends with, by name."""


@dataclass(frozen=True)
class Turn:
    """What the workers train at one time in a round: the `batches` of those that have one, by worker.

    How much of the training is `done` in its middle a schedule goes by, which sees a worker's last step in a
    round at the round's end; where all steps are `together`, that of the last turn.
    """

    batches: dict[int, np.ndarray]
    done: dict[int, float]
    done_together: float
    ends: bool

    @property
    def together(self) -> np.ndarray:
        return np.concatenate(list(self.batches.values()))


@dataclass(frozen=True)
class Course:
    """A loop as ranks went through it: `seen` are the batches [epoch][worker], of `batch_size` samples. A
    schedule goes by those `by_rank`, where several ranks are one worker."""

    make: Callable[[], Program]
    style: Style
    seen: list[list[Batches]]
    batch_size: int
    by_rank: list[list[Batches]] | None = None

    @property
    def workers(self) -> int:
        return len(self.seen[0])

    def grouped(self, groups: Sequence[Sequence[int]]) -> Course:
        """With each group of workers as one, which trains the batches of all of them together."""
        seen = [
            [
                [np.concatenate([b for b in row if b is not None]) for row in itertools.zip_longest(*its)]
                for its in ([epoch[worker] for worker in group] for group in groups)
            ]
            for epoch in self.seen
        ]
        return replace(self, seen=seen, by_rank=self.seen)

    def rounds(self, epoch: int, every: int | None) -> Iterator[list[Turn]]:
        """The turns of each round of so many steps, all of an epoch for None."""
        per_worker = self.seen[epoch]
        steps = every or max(map(len, per_worker))
        starts = range(0, max(map(len, per_worker)), steps)
        parts = [[batches[start : start + steps] for batches in per_worker] for start in starts]
        ranks = (self.by_rank or self.seen)[epoch]
        parts_of_ranks = [[its[start : start + steps] for its in ranks] for start in starts]
        lengths = [max(sum(map(len, its)) for its in part) / self.batch_size for part in parts_of_ranks]
        over = np.concatenate([[0.0], np.cumsum(lengths)])
        for number, part in enumerate(parts):
            # As many turns as batches: a last sample may have joined the batch before it.
            last = over[number] + max(map(len, parts_of_ranks[number])) - 1
            end = (last + over[number + 1]) / 2
            count = max(map(len, part))
            turns = []
            for turn in range(count):
                at = over[number] + turn + 0.5
                mine = {w: its[turn] for w, its in enumerate(part) if turn < len(its)}
                places = {w: end if turn == len(part[w]) - 1 else at for w in mine}
                turns.append(
                    Turn(
                        mine,
                        {w: (epoch + place / over[-1]) / EPOCHS for w, place in places.items()},
                        (epoch + (end if turn == count - 1 else at) / over[-1]) / EPOCHS,
                        turn == count - 1,
                    )
                )
            yield turns


class Worker:
    """A user's program on one process, which goes through a loop as its style says."""

    def __init__(self, course: Course) -> None:
        self.program, self.style = course.make(), course.style
        self.rates = [group["lr"] for group in self.program.optimizer.param_groups]
        groups = self.program.optimizer.param_groups
        held = {id(p) for p in (*self.program.model.parameters(), *(p for g in groups for p in g["params"]))}
        self.trained = [p for p in self.program.parameters if p.requires_grad and id(p) in held]

    def turn(self, indices: np.ndarray, done: float, step: Callable[[], None]) -> None:
        """A turn of the loop, with `step` in the place of the optimiser's."""
        if self.style.rate:
            for group, rate in zip(self.program.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * self.style.rate(done)
        self.style.body(self.program, indices, step)

    def step(self) -> None:
        """The optimiser's step with the gradients that are there."""
        if limit := self.style.options.get("clip_norm"):
            groups = self.program.optimizer.param_groups
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], limit)
        self.program.optimizer.step()

    def weights(self) -> Tensor:
        """What is trained, as one array of float64."""
        return flat([p.detach() for p in self.trained], self.trained)

    def load(self, weights: Tensor) -> None:
        """Overwrite what is trained."""
        with torch.no_grad():
            for p, its in zip(self.trained, parts(weights, self.trained), strict=True):
                p.copy_(its)

    def begin_anew(self, course: Course) -> None:
        """Take a new optimiser, with the rates of the old one."""
        new, old = course.make(), self.program.optimizer
        fresh = type(old)
        assert type(new.optimizer) is fresh
        places = dict(zip(map(id, new.parameters), self.program.parameters, strict=True))
        for group, its in zip(new.optimizer.param_groups, old.param_groups, strict=True):
            group["params"] = [places[id(p)] for p in group["params"]]
            group["lr"] = its["lr"]
        if isinstance(new.optimizer, torch.optim.Adagrad):  # which makes its state when it is made
            new.optimizer.state = {places[id(p)]: its for p, its in new.optimizer.state.items()}
        self.program.optimizer = new.optimizer
        if self.program.scheduler is not None:
            self.program.scheduler.optimizer = new.optimizer

    def moments(self) -> dict[tuple[int, str], Tensor]:
        """The optimiser's tensors that are shaped like their parameter."""
        state = self.program.optimizer.state
        return {
            (number, name): its
            for number, p in enumerate(self.trained)
            for name, its in state.get(p, {}).items()
            if isinstance(its, Tensor) and its.shape == p.shape and name != "step"
        }

    def ended(self) -> Ended:
        """What it ends with."""
        return {name: its.detach().clone() for name, its in self.program.tensors()}


def flat(tensors: Sequence[Tensor], like: Sequence[Tensor]) -> Tensor:
    """Tensors as one array of float64, each in the order in which its parameter lies in memory."""
    rows = [t.permute(_order(p)).reshape(-1).double() for t, p in zip(tensors, like, strict=True)]
    return torch.cat(rows)


def parts(array: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The tensors of an array that `flat` has made."""
    pieces = array.split([p.numel() for p in like])
    found = []
    for piece, p in zip(pieces, like, strict=True):
        order = _order(p)
        back = [order.index(axis) for axis in range(p.dim())]
        found.append(piece.view([p.shape[axis] for axis in order]).permute(back))
    return found


def _order(p: Tensor) -> list[int]:
    return sorted(range(p.dim()), key=p.stride, reverse=True)


def epochs_of(course: Course, workers: Sequence[Worker]) -> Iterator[int]:
    """The epochs, with what the loop does around each; and at its end all agree on buffers."""
    for epoch in range(len(course.seen)):
        for worker in workers:
            course.style.before(worker.program, epoch)
        yield epoch
        _agree_on_buffers(workers, [sum(map(len, its)) for its in course.seen[epoch]])
        for worker in workers:
            course.style.after(worker.program, epoch)


def _agree_on_buffers(workers: Sequence[Worker], samples: Sequence[int]) -> None:
    """Floats that differ become their mean, and integers the largest."""
    for buffers in zip(*(worker.program.model.buffers() for worker in workers), strict=True):
        if all(torch.equal(buffers[0], its) for its in buffers):
            continue
        if buffers[0].is_floating_point():
            shared = sum(n / sum(samples) * its for n, its in zip(samples, buffers, strict=True))
        else:
            shared = torch.stack(buffers).amax(0)
        for its in buffers:
            its.copy_(shared)


def one_process(course: Course, every: int | None = 1, *, each_turn: bool = False) -> list[Ended]:
    """Synchronous SGD: a plain loop with the samples of all ranks in one batch. Of a round of several turns
    gradients are added up, unless there is a step in `each_turn`."""
    worker = Worker(course)
    for epoch in epochs_of(course, [worker]):
        for turns in course.rounds(epoch, every):
            samples = sum(len(turn.together) for turn in turns)
            held: dict[nn.Parameter, Tensor] = {}
            for turn in turns:

                def add_up(turn: Turn = turn, held: dict = held, samples: int = samples) -> None:
                    for p in worker.trained:
                        if p.grad is not None:
                            held[p] = held.get(p, 0) + len(turn.together) / samples * p.grad.to_dense()
                    if turn.ends:
                        for p in worker.trained:
                            p.grad = held.get(p)
                        worker.step()

                alone = each_turn or len(turns) == 1
                worker.turn(turn.together, turn.done_together, worker.step if alone else add_up)
    return [worker.ended()] * course.workers


def gradients_by_rank(course: Course, name: str, every: int = 1, *, master: bool = False) -> list[Ended]:
    """All ranks step with the sum of their gradients, compressed or not, each made of its own batch."""
    workers = [Worker(course) for _ in range(course.workers)]
    laid = workers[0].trained[::-1]  # the last layers first, as their gradients come
    shapes = [tuple(p.shape[axis] for axis in _order(p)) for p in laid]
    sums = Sums(name, course.workers + master, shapes, master)
    for epoch in epochs_of(course, workers):
        for turns in course.rounds(epoch, every):
            samples = sum(len(turn.together) for turn in turns)
            made = [torch.zeros(sum(p.numel() for p in laid), dtype=torch.float64) for _ in range(sums.ranks)]
            for turn in turns:
                for number, batch in turn.batches.items():
                    own = workers[number]

                    def take(own: Worker = own, place: int = number + master, n: int = len(batch)) -> None:
                        mine = own.trained[::-1]
                        gradients = [
                            torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in mine
                        ]
                        made[place] += n / samples * flat(gradients, laid)  # noqa: B023 (called at once)

                    own.turn(batch, turn.done[number], take)
            total = sums.add_up(made).double()
            for own in workers:
                _set_rates(own, turns[-1].done_together)
                for p, gradient in zip(own.trained[::-1], parts(total, laid), strict=True):
                    p.grad = gradient.to(p.dtype).clone() if p.requires_grad else None
                own.step()
                for p in own.trained:
                    p.grad = None
    return [own.ended() for own in workers]


def _set_rates(worker: Worker, done: float) -> None:
    """Those of a step that ends here, for a worker that had no batch in the last turn too."""
    if worker.style.rate:
        for group, rate in zip(worker.program.optimizer.param_groups, worker.rates, strict=True):
            group["lr"] = rate * worker.style.rate(done)


@dataclass(frozen=True)
class Outside:
    """The optimiser between rounds."""

    rate: float = 1.0
    momentum: float = 0.0
    nesterov: bool = False
    by_rate: bool = False


def averaging(
    course: Course,
    every: Callable[[int], int | None],
    *,
    state: str = "keep",
    outside: Outside | None = None,
    compress: str | None = None,
    master: bool = False,
    in_turn: bool = False,
) -> list[Ended]:
    """Workers train on their own, and after each round take the mean of their weights, by their samples. They
    are `in_turn` where they wait for each other in each step."""
    workers = [Worker(course) for _ in range(course.workers)]
    x = workers[0].weights()
    u = torch.zeros_like(x)
    laid = workers[0].trained
    shapes = [tuple(p.shape[axis] for axis in _order(p)) for p in laid]
    sums = Sums(compress or "", len(workers) + master, shapes, master)
    for epoch in epochs_of(course, workers):
        for turns in course.rounds(epoch, every(epoch)):
            samples = [sum(len(t.batches.get(w, ())) for t in turns) for w in range(len(workers))]
            for turn, (number, own) in itertools.product(turns, enumerate(workers)):
                if number in turn.batches:
                    done = turn.done_together if in_turn else turn.done[number]
                    own.turn(turn.batches[number], done, own.step)
            shares = [n / sum(samples) for n in samples]
            weights = [own.weights() for own in workers]
            if compress:
                changes = [share * (its - x) for share, its in zip(shares, weights, strict=True)]
                mean = x + sums.add_up([torch.zeros_like(x)] * master + changes)
            else:
                mean = sum(share * its for share, its in zip(shares, weights, strict=True))
            if outside:
                for own in workers:
                    _set_rates(own, turns[-1].done_together)
                scale = workers[0].program.optimizer.param_groups[0]["lr"] if outside.by_rate else 1.0
                d = (x - mean) / scale
                u = outside.momentum * u + d
                mean = x - outside.rate * scale * (d + outside.momentum * u if outside.nesterov else u)
            x = mean
            for own in workers:
                own.load(x)
            if state == "reset":
                for own in workers:
                    own.begin_anew(course)
            elif state == "average":
                _average_moments(workers, shares)
    return [own.ended() for own in workers]


def _average_moments(workers: Sequence[Worker], shares: Sequence[float]) -> None:
    rows = [own.moments() for own in workers]
    for key in rows[0]:
        mean = sum(share * row[key] for share, row in zip(shares, rows, strict=True))
        for row in rows:
            row[key].copy_(mean)


def gossip(course: Course, heard: Callable[[int, int, int], list[int]]) -> list[Ended]:
    """After each step a rank takes the mean of its own weights and those of whom it has `heard` of in this
    round; at an epoch's end the mean of all is looked at."""
    workers = [Worker(course) for _ in range(course.workers)]
    rounds, own_weights = 0, [worker.weights() for worker in workers]
    for epoch in epochs_of(course, workers):
        for worker, its in zip(workers, own_weights, strict=True):
            worker.load(its)
        for turns in course.rounds(epoch, 1):
            for turn, (number, worker) in itertools.product(turns, enumerate(workers)):
                if number in turn.batches:
                    worker.turn(turn.batches[number], turn.done[number], worker.step)
            now = [worker.weights() for worker in workers]
            for number, worker in enumerate(workers):
                others = {number, *heard(number, len(workers), rounds)}
                worker.load(sum(now[other] for other in sorted(others)) / len(others))
            rounds += 1
        own_weights = [worker.weights() for worker in workers]
        for worker in workers:
            worker.load(sum(own_weights) / len(workers))
    return [worker.ended() for worker in workers]


def on_a_ring(rank: int, ranks: int, number: int) -> list[int]:
    return [(rank - 1) % ranks, (rank + 1) % ranks]


def by_powers_of_two(rank: int, ranks: int, number: int) -> list[int]:
    hops = max(1, math.ceil(math.log2(ranks)))
    return [(rank - 2 ** (number % hops)) % ranks]


def of_all(rank: int, ranks: int, number: int) -> list[int]:
    return list(range(ranks))


def with_a_centre(course: Course, pulls: bool) -> list[Ended]:
    """One worker and its centre, which it pulls and is pulled by (EASGD), or changes as it has changed
    (Downpour); gives the centre's end too."""
    worker = Worker(course)
    centre = worker.weights()
    for epoch in epochs_of(course, [worker]):
        for turns in course.rounds(epoch, 4):
            for turn in turns:
                worker.turn(turn.batches[0], turn.done[0], worker.step)
            x = worker.weights()
            if pulls:
                d = 0.9 * (x - centre)
                centre, x = centre + d, x - d
            else:
                centre = x
            worker.load(x)
    ended = worker.ended()
    worker.load(centre)
    return [worker.ended(), ended]


Rule = Callable[[Course], Any]
