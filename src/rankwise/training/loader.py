"""A DataLoader whose turns are dealt to the ranks of a run."""

from __future__ import annotations

import random
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterDataPipe, get_worker_info

from rankwise.data.partition import Indices, join
from rankwise.errors import ConfigError

if TYPE_CHECKING:
    from rankwise.training.run import Run

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """The samples of an epoch in the order in which a loader draws them, and the sizes of the batches that it
    makes of them if it has a batch sampler of its own."""

    order: Indices
    batches: Indices | None = None


class Loader(Generic[T]):
    """This rank's part of what a DataLoader draws, as `Run.loader` returns it.

    Its length is the number of turns of an epoch, which is the same on all ranks. Dataset, sampler, workers
    and collate function are those of the DataLoader, whose `batch_size` is that of each rank. With a
    `batch_sampler` of its own each rank gets one of its batches in a turn.
    """

    def __init__(self, run: Run, loader: DataLoader[T]) -> None:
        self._run = run
        self._loader = loader
        self.seed = torch.Generator()
        self._batches = _Batches()
        self._inner: DataLoader[T] | None = None
        self._data: Iterator[T] | None = None
        self._due: deque[Indices] = deque()
        self.draws = 0
        self.place: list[int] | None = None
        """How many samples of each worker's stream are taken, where `run.steps` goes on in it."""

    @property
    def dataset(self) -> Any:
        """The DataLoader's."""
        return self._loader.dataset

    @property
    def batch_size(self) -> int | None:
        """Samples of each rank in a turn; None where a batch sampler says."""
        return self._loader.batch_size

    @property
    def drop_last(self) -> bool:
        """Whether a last turn that is shorter falls away."""
        return self._loader.drop_last

    @property
    def cuts(self) -> str:
        """Its batches, in words."""
        return f"batches of {self.batch_size}{' without the last' if self.drop_last else ''}"

    @property
    def kind(self) -> str:
        """What a pass over it is, whatever it draws, in words."""
        size = f" of {len(self.dataset)} samples" if hasattr(self.dataset, "__len__") else ""
        return f"loop over a dataset{size} in {self.cuts if self.batch_size else 'batches of its own'}"

    def __len__(self) -> int:
        return self._run.turns_of(self)

    def __iter__(self) -> Iterator[T]:
        return self._run.turns(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def drawn(self) -> int:
        """How many samples an epoch draws, or batches. Raises TypeError where that is not known."""
        its = self._loader.sampler if self.batch_size else self._loader.batch_sampler
        return len(its)  # type: ignore[arg-type]

    @property
    def draws_so_far(self) -> int:
        """Epochs' samples that were drawn, those of earlier sittings included, which this one may not have
        had to draw yet."""
        return max(self.draws, self._run.drawn_before(self))

    @property
    def place_so_far(self) -> Sequence[int] | None:
        """How many samples of each worker's stream are taken, in earlier sittings too."""
        return self.place if self.draws else self._run.place_before(self)

    def cut(self, least: int) -> dict[str, Any]:
        """How the turns of an epoch are cut, none of them with fewer samples of a rank than `least`."""
        if self.batch_size is None:
            return {"batch_size": 1, "least": 0}
        return {"batch_size": self.batch_size, "least": least, "drops_last": self.drop_last}

    def draw(self) -> Draw:
        """Draw the samples of an epoch.

        `draws` counts them. A run that goes on first draws what it had drawn before, as a sampler or its
        generator may have a state of its own; torch's, numpy's and Python's own generators stay as they are.
        """
        if self.draws < (before := self._run.drawn_before(self)):
            states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
            while self.draws < before:
                self._draw()
            torch.set_rng_state(states[0])
            np.random.set_state(states[1])  # noqa: NPY002
            random.setstate(states[2])
        return self._draw()

    def _draw(self) -> Draw:
        self.draws += 1
        if self.batch_size is not None:
            self._draw_seed()
            return Draw(np.array([int(index) for index in self._loader.sampler], np.int64))
        assert self._loader.batch_sampler is not None
        batches = iter(self._loader.batch_sampler)
        self._draw_seed()
        drawn = [np.array([int(index) for index in batch], np.int64) for batch in batches]
        return Draw(join(drawn), np.array([len(batch) for batch in drawn], np.int64))

    def _draw_seed(self) -> None:
        """Before its sampler, torch asks the same generator for the seed of workers."""
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)

    def take(self, samples: Indices, ahead: Callable[[], list[Indices]]) -> T:
        """The batch of these samples. `ahead` returns those of this and later turns as they are dealt now,
        by which workers fetch."""
        if not (self._loader.num_workers or self._loader.pin_memory):
            return self._fetched(samples.tolist())
        if self._data is None or not (self._due and np.array_equal(self._due[0], samples)):
            due = ahead()
            while not np.array_equal(due[0], samples):
                del due[0]
            self._due = deque(due)
            self._data = None  # what was fetched ahead may be another rank's now
            seed = self._run.worker_seed()
            self._batches.indices = [its.tolist() for its in due if len(its)]
            if self._loader.persistent_workers:
                self._batches.begin_pass(seed, self._loader.num_workers)
            self.seed.manual_seed(seed)
            if self._inner is None:
                self._inner = like(self._loader, self._loader.dataset, self.seed, batch_sampler=self._batches)
            self._data = iter(self._inner)
        self._due.popleft()
        while self._due and not len(self._due[0]):
            self._due.popleft()
        return next(self._data)

    def _fetched(self, samples: list[int]) -> T:
        """What a DataLoader without workers makes of samples, and no more, as each small thing that it does
        besides costs a small network."""
        dataset, collate = self._loader.dataset, self._loader.collate_fn
        whole: Callable[[list[int]], list[Any]] | None = getattr(dataset, "__getitems__", None)
        batch: T = collate(whole(samples) if whole else [dataset[its] for its in samples])
        return batch

    def leave(self) -> None:
        """No more batches are taken of those that were expected."""
        self._data = None

    def close(self) -> None:
        """The run is over: end the workers, before Python ends them without their DataLoader knowing."""
        self.leave()
        self._inner = None


class _Batches:
    """The batch sampler of one rank: what it is to fetch next."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)

    def begin_pass(self, seed: int, workers: int) -> None:
        """Let workers that stay draw as those do that begin with this pass, by the first batch of each."""
        first = [_FirstBatch(seed, its) for its in self.indices[:workers]]
        self.indices[:workers] = first


class _FirstBatch(list[int]):
    """What a worker fetches first in a pass. On its way into the worker's process, which torch makes of its
    own, it brings the seed along: what a worker has drawn in earlier passes nobody could draw again."""

    def __init__(self, seed: int, samples: list[int]) -> None:
        super().__init__(samples)
        self._seed = seed

    def __reduce__(self) -> tuple[Callable[[int, list[int]], list[int]], tuple[int, list[int]]]:
        return _seed_worker, (self._seed, [*self])


def _seed_worker(seed: int, samples: list[int]) -> list[int]:
    """In a worker: seed what it draws from. Returns the samples."""
    info = get_worker_info()
    words = np.random.SeedSequence([seed, info.id if info else 0]).generate_state(3, np.uint32)
    torch.manual_seed(int(words[0]))
    np.random.seed(words[1])  # noqa: NPY002
    random.seed(int(words[2]))
    return samples


def like(
    loader: DataLoader[Any], dataset: Dataset[Any], seed: torch.Generator, **options: Any
) -> DataLoader[Any]:
    """A DataLoader like this one, but for some options, whose workers draw their seeds from `seed`, and not
    from the loop's own generator, which would then draw other numbers."""
    its: dict[str, Any] = {}
    if loader.num_workers:
        its = {
            "prefetch_factor": loader.prefetch_factor,
            "persistent_workers": loader.persistent_workers,
            "multiprocessing_context": loader.multiprocessing_context,
            "worker_init_fn": partial(begin_worker, loader.worker_init_fn),
        }
    its |= {
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "generator": seed,
    }
    return DataLoader(dataset, **(its | options))


def begin_worker(init: Callable[[int], None] | None, number: int) -> None:
    """A worker is no rank: what asks ranks to stop, and comes to all processes, is theirs to decide."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for its in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(its, signal.SIG_IGN)
    if init is not None:
        init(number)


def require_dealable(loader: object) -> None:
    """Raises ConfigError, one line, for what cannot be dealt."""
    if not isinstance(loader, DataLoader):
        raise ConfigError(
            f"run.loader got a {type(loader).__name__}, expected a torch.utils.data.DataLoader: wrap the "
            "data in one, or loop over run.steps(n) and take the batches yourself"
        )
    if isinstance(loader.dataset, IterDataPipe):
        raise ConfigError(
            "run.loader got a DataLoader over an IterDataPipe, expected a Dataset or an IterableDataset: "
            "yield its samples from one, as torch no longer develops data pipes"
        )
    if isinstance(loader.sampler, DistributedSampler):
        raise ConfigError(
            "run.loader got a DataLoader with a DistributedSampler, but it deals the samples itself: leave "
            "the sampler out, or give shuffle=True"
        )
    if loader.batch_size is None and loader.batch_sampler is None:
        raise ConfigError(
            "run.loader got a DataLoader without batches (batch_size=None), expected one with batch_size=N, "
            "the batch of each rank, or with a batch_sampler"
        )
