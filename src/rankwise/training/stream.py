"""A DataLoader over an IterableDataset, which each rank reads, and of which it keeps its part."""

from __future__ import annotations

import random
import struct
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from rankwise.comm import World
from rankwise.data.partition import NOTHING, Indices
from rankwise.data.streams import WHOLE_STREAM, Dealing
from rankwise.errors import ConfigError, OutOfStepError
from rankwise.training.loader import Draw, Loader, begin_worker, like

if TYPE_CHECKING:
    from rankwise.training.run import Run

T = TypeVar("T")

OVER, LEFT = 2.0**32, -np.inf
"""What a rank adds to the fingerprint of what it has read if that is all, and says if it reads no more."""

READ_AGAIN = (
    "the stream of a loader was read again, as a rank was lost or the run goes on, and gave other samples "
    "than before: let it give the same ones each time that it is read in an epoch"
)


class StreamLoader(Loader[T]):
    """This rank's part of a stream, as `Run.loader` returns it.

    Each rank reads all of it, and collates its part of each turn. Workers read, as in one process, what the
    dataset gives them.
    """

    def __init__(self, run: Run, loader: DataLoader[T]) -> None:
        super().__init__(run, loader)
        self._reader: StreamReader[T] | None = None
        self._drawn = Draw(NOTHING)

    def __len__(self) -> int:
        """As torch's: of a dataset that knows its length, otherwise it raises TypeError."""
        turn = self._run.size * (self.batch_size or 0)
        return (len(self.dataset) + (0 if self.drop_last else turn - 1)) // turn

    def draw(self) -> Draw:
        """What is random in a stream begins with a state of the loader's generator."""
        self.place = None
        return super().draw()

    def draw_on(self) -> Draw:
        """The same for the stream that `run.steps` has not taken to its end, or a new one. Raises ConfigError
        if a run goes on with another number of workers."""
        workers = max(self.num_workers, 1)
        if not self.draws and (place := self._run.place_before(self)) is not None:
            if len(place) != workers:
                raise ConfigError(
                    f"the run goes on in a stream of {len(place)} workers, and its loader has {workers}: "
                    f"give it num_workers={len(place)}"
                )
            while self.draws < self._run.drawn_before(self):
                self._drawn = self._draw()
            self.place = list(place)
        elif self.place is None:
            self._drawn = self.draw()
            self.place = [0] * workers
        return self._drawn

    def _draw(self) -> Draw:
        self.draws += 1
        if self._loader.generator is None:
            return Draw(NOTHING)
        state = self._loader.generator.get_state().numpy().astype(np.int64)
        self._draw_seed()
        return Draw(state)

    def open(
        self, draw: Draw, seed: Sequence[int], world: World, *, stops: Callable[[], bool], compares: bool
    ) -> StreamReader[T]:
        """What reads the pass that begins, by what rank 0 has drawn, or by a seed where that is nothing. It
        `compares` what ranks have read where rounds begin, if exchanges of the rounds do not."""
        if self.place is not None and self._reader is not None and self._reader.goes_on():
            return self._reader
        self._reader = StreamReader(self, draw.order, seed, world, stops, compares=compares)
        return self._reader

    def reads(
        self,
        dealing: Dealing,
        before: list[int],
        without: list[Indices],
        expected: dict[int, dict[int, int]],
        *,
        draws_apart: bool,
    ) -> DataLoader[Any]:
        """Reads the stream from its beginning, without the first samples of each worker, and some others."""
        its = self._loader
        # Workers that stay go on with random numbers of the pass before, which nobody could draw again.
        anew = {"persistent_workers": False, "worker_init_fn": partial(_begin_reader, its.worker_init_fn)}
        return like(
            its,
            _Stream(its.dataset, before, without, expected),
            self.seed,
            batch_size=dealing.turn,
            drop_last=its.drop_last,
            collate_fn=_Collate(dealing, its.collate_fn, self._run.worker_seed() if draws_apart else None),
            **(anew if self.num_workers else {}),
        )

    def end_pass(self) -> None:
        """A pass is over: `run.steps` goes on there, if that is not the stream's end."""
        if self.place is None or self._reader is None or self._reader.is_over:
            self.place = None
            self.leave()

    def leave(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def close(self) -> None:
        self.leave()


class StreamReader(Generic[T]):
    """Reads one pass of a stream for the sampler. A sample's number is its place in its worker's stream times
    the number of workers, plus the worker's."""

    def __init__(
        self,
        loader: StreamLoader[T],
        state: Indices,
        seed: Sequence[int],
        world: World,
        stops: Callable[[], bool],
        *,
        compares: bool,
    ) -> None:
        self._compares = compares
        self._loader = loader
        self._world = world
        self._stops = stops
        words = np.random.SeedSequence(seed).generate_state(4, np.uint32).tolist()
        self._generator = torch.Generator().manual_seed(words[3])
        if len(state):
            self._generator.set_state(torch.from_numpy(state.astype(np.uint8)))
        self._state = self._generator.get_state()
        self._seeds = words[:3]
        self._workers = max(loader.num_workers, 1)
        self._before = [*(loader.place or [0] * self._workers)]
        self._continues = False
        self._dealing: Dealing | None = None
        self._batches: deque[tuple[int, int, T]] = deque()
        self._data: Iterator[Any] | None = None
        self._closed = self._over = self.is_over = False
        self._seen: dict[int, dict[int, int]] = {}
        self._turns = self.mark = 0

    @property
    def is_left(self) -> bool:
        return self._closed or self._stops()

    def goes_on(self) -> bool:
        """Another pass begins where the last one has ended, if that is possible."""
        self._before = [*(self._loader.place or self._before)]
        self._continues = not (self._closed or self._batches)
        return self._continues

    def begin(self, dealing: Dealing, without: Indices) -> None:
        self._turns = self.mark = 0
        continues, self._continues = self._continues and dealing == self._dealing, False
        if continues:
            return
        self._dealing = dealing
        self._batches.clear()
        self._over = self.is_over = False
        self._randomness = _own_randomness(self._seeds) if self._draws_here else nullcontext
        self._loader.seed.set_state(self._state)
        numbers = [
            np.sort(without[without % self._workers == its] // self._workers) + before
            for its, before in enumerate(self._before)
        ]
        made = self._loader.reads(
            dealing, self._before, numbers, self._seen, draws_apart=not self._world.in_threads
        )
        with self._randomness():
            self._data = iter(made)

    def read(self, *, begins_round: bool) -> Indices | None:
        samples: Indices | None = NOTHING
        if self.is_over:
            return None
        if not self.is_left:
            samples = self._next()
        if begins_round and self._compares:
            return self._agreed(samples)
        self.is_over = samples is None and begins_round
        return samples

    def compare(self) -> None:
        """All ranks have come to the end of the pass. Raises OutOfStepError, on all, if they have read other
        streams."""
        marks = np.array([self.mark, -self.mark], np.float64)
        self._world.allreduce(marks, op="max")
        if marks[0] != -marks[1]:
            self._refuse(OVER + self.mark)

    def take(self) -> T:
        """This rank's batch of the next turn of those that were read."""
        worker, number, batch = self._batches.popleft()
        if self._loader.place is not None:
            self._loader.place[worker] = number + 1
        return batch

    def close(self) -> None:
        """No more is read."""
        self._closed = True
        self._data = None
        self._batches.clear()

    @property
    def _draws_here(self) -> bool:
        """Whether a stream draws from the generators of the loop."""
        return not (self._loader.num_workers or self._world.in_threads)

    def _next(self) -> Indices | None:
        """The samples of the next turn; None if there is none."""
        if self._over or self._data is None:
            return None
        ledger = self._world.ledger
        ledger.enter("data")
        try:
            with self._randomness():
                read = next(self._data, None)
        except OutOfStepError:  # with the traceback of a worker
            raise OutOfStepError(READ_AGAIN) from None
        finally:
            ledger.enter("other")
        if read is None:
            self._over = True
            return None
        numbers, worker, mark, batch = read
        seen = self._seen.setdefault(worker, {})
        while len(seen) > 1:
            seen.popitem()
        seen[int(numbers[-1])] = mark
        self._turns += 1
        self.mark = zlib.crc32(struct.pack("<QQQ", mark, len(numbers), worker), self.mark)
        self._batches.append((worker, int(numbers[-1]), batch))
        ids: Indices = (numbers - self._before[worker]) * self._workers + worker
        return ids

    def _agreed(self, samples: Indices | None) -> Indices | None:
        """The same, on all ranks that read on; those that do not hear whether there is more, and all if one
        is to stop. Raises OutOfStepError, on all, if their streams differ."""
        mine = OVER + self.mark if samples is None else float(self.mark) if len(samples) else LEFT
        marks = np.array([mine, -mine if mine != LEFT else LEFT, float(self._stops())])
        self._world.allreduce(marks, op="max")
        if marks[2]:
            return NOTHING
        if marks[0] != LEFT and marks[0] != -marks[1]:
            self._refuse(mine)
        self.is_over = marks[0] >= OVER or marks[0] == LEFT
        return None if self.is_over else samples

    def _refuse(self, mine: float) -> None:
        word = f"is over after {self._turns} turns" if mine >= OVER else f"goes on with turn {self._turns}"
        words: list[tuple[float, str]] = self._world.allgather_object((mine, word))
        first = next(rank for rank, its in enumerate(words) if its[0] != LEFT)
        other = next(rank for rank, its in enumerate(words) if its[0] not in (LEFT, words[first][0]))
        found = f"rank {first}'s {words[first][1]} where rank {other}'s {words[other][1]}"
        if words[first][1] == words[other][1]:
            found = f"rank {other} has read other samples than rank {first} by turn {self._turns}"
        raise OutOfStepError(f"the streams of a loader differ, {found}: {WHOLE_STREAM}")


class _Stream(IterableDataset[Any]):
    """The samples of a dataset, each with its number, from 0. Those `before` [workers] a number, and
    `without` [workers], are read and not given. Raises OutOfStepError if there are not as many, or if one
    that is `expected`, {worker: {number: fingerprint}}, is another."""

    def __init__(
        self,
        dataset: Any,
        before: list[int],
        without: list[Indices],
        expected: Mapping[int, Mapping[int, int]],
    ) -> None:
        self.dataset = dataset
        self._before = before
        self._without = without
        self._expected = {worker: dict(its) for worker, its in expected.items()}

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        info = get_worker_info()
        worker = info.id if info else 0
        expected = self._expected.get(worker, {})
        before, without = self._before[worker], deque(self._without[worker].tolist())
        most, number = max([before - 1, *without, *expected]), -1
        for number, sample in enumerate(self.dataset):
            if number in expected and fingerprint(sample) != expected[number]:
                raise OutOfStepError(READ_AGAIN)
            if without and without[0] == number:
                without.popleft()
            elif number >= before:
                yield number, sample
        if number < most:
            raise OutOfStepError(READ_AGAIN)


@dataclass
class _Collate:
    """Makes a batch of this rank's part of a turn. What the collate function draws comes from generators of
    its own, of this `seed`, as those of the stream are to stay alike on all ranks."""

    dealing: Dealing
    collate: Callable[[list[Any]], Any]
    seed: int | None
    _randomness: Any = None

    def __call__(self, turn: list[tuple[int, Any]]) -> tuple[Indices, int, int, Any]:
        info = get_worker_info()
        worker = info.id if info else 0
        if self._randomness is None:
            words = np.random.SeedSequence([self.seed or 0, worker]).generate_state(3, np.uint32)
            self._randomness = nullcontext if self.seed is None else _own_randomness(words.tolist())
        numbers, samples = zip(*turn, strict=True)
        with self._randomness():
            batch = self.collate(list(samples[self.dealing.mine(len(turn))]))
        return np.array(numbers, np.int64), worker, fingerprint(samples[-1]), batch


def _begin_reader(init: Callable[[int], None] | None, number: int) -> None:
    """A worker's own function, and the dataset itself, find the dataset that they know."""
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, _Stream)
    object.__setattr__(info, "dataset", info.dataset.dataset)  # it is frozen
    begin_worker(init, number)


def _own_randomness(seeds: Sequence[int]) -> Callable[[], AbstractContextManager[None]]:
    """In which a stream draws from generators of its own, and not from those of the loop, which differ
    between ranks."""
    torch_state: Any = torch.Generator().manual_seed(seeds[0]).get_state()
    numpy_state: Any = np.random.RandomState(seeds[1]).get_state()
    python_state: Any = random.Random(seeds[2]).getstate()

    @contextmanager
    def randomness() -> Iterator[None]:
        nonlocal torch_state, numpy_state, python_state
        before = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        _set_random(torch_state, numpy_state, python_state)
        try:
            yield
        finally:
            torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
            python_state = random.getstate()
            _set_random(*before)

    return randomness


def _set_random(torch_state: Any, numpy_state: Any, python_state: Any) -> None:
    torch.set_rng_state(torch_state)
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate(python_state)


def fingerprint(sample: Any, found: int = 0) -> int:
    """A number by which samples can be told apart: of tensors, arrays, images, texts, numbers, and what is
    made of these. Of other objects the type alone counts."""
    if isinstance(sample, torch.Tensor):
        try:
            flat = sample.detach().cpu().contiguous().reshape(-1)
            sample = (list(sample.shape), flat.view(torch.uint8).numpy())
        except (RuntimeError, TypeError):  # as of sparse ones
            sample = list(sample.shape)
    if isinstance(sample, np.ndarray) and sample.dtype != object:
        return zlib.crc32(np.ascontiguousarray(sample).tobytes(), found)
    if isinstance(sample, str | bytes | int | float | complex | np.generic | None):
        return zlib.crc32(sample if isinstance(sample, bytes) else repr(sample).encode(), found)
    if isinstance(sample, Mapping):
        sample = [part for item in sample.items() for part in item]
    elif is_dataclass(sample) and not isinstance(sample, type):
        sample = [getattr(sample, field.name) for field in fields(sample)]
    elif isinstance(sample, np.ndarray):
        sample = sample.tolist()
    elif callable(getattr(sample, "tobytes", None)):
        sample = [sample.tobytes()]
    if isinstance(sample, Sequence):
        for part in sample:
            found = fingerprint(part, found)
        return zlib.crc32(str(len(sample)).encode(), found)
    return zlib.crc32(type(sample).__name__.encode(), found)
