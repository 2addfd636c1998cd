"""Small problems in float64 and what users' loops are compared with: one process with the batches of all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import rankwise
from rankwise.comm import World, run_in_threads
from rankwise.comm.threads import Killed
from rankwise.training.admission import NotNeeded

TIME_S = 60.0
"""After which ranks that still wait for each other hang."""


class Alone:
    """What a loop calls, for one process that has the batches of `ranks` ranks: plain torch."""

    rank, size, first = 0, 1, True

    def __init__(self, ranks: int, *, least: int = 1) -> None:
        self._ranks = ranks
        self._least = least
        self.batches: list[list[int]] = []
        self._under_way: Iterator[Any] | None = None

    @property
    def turn(self) -> int:
        return len(self.batches) - 1

    def model(self, model: nn.Module) -> nn.Module:
        return model

    def keep(self, **things: Any) -> None:
        """It keeps what it has."""

    def epochs(self, count: int) -> range:
        return range(count)

    def steps(self, count: int, loader: Global | None = None) -> Any:
        if loader is None:
            return range(count)
        return (self._next(loader) for _ in range(count))

    def _next(self, loader: Global) -> Any:
        """The batch that a loader has next, or the first one of its next epoch."""
        while True:
            self._under_way = self._under_way or iter(loader)
            for batch in self._under_way:
                return batch
            self._under_way = None

    def loader(self, loader: DataLoader[Any]) -> Global:
        return Global(loader, self._ranks, self._least, self.batches)

    def backward(self, loss: Tensor, **_: Any) -> None:
        loss.backward()

    def no_sync(self) -> AbstractContextManager[None]:
        return nullcontext()

    def log(self, weight: float | None = None, **values: Any) -> None:
        """Nothing."""

    def mean(self, value: Any, weight: float | None = None) -> float:
        return value.item() if isinstance(value, Tensor) else float(value)

    def shard(self, data: Any) -> Any:
        return data


class Global:
    """The turns of all ranks of a DataLoader as batches of one process, in the order that torch draws."""

    def __init__(
        self, loader: DataLoader[Any], ranks: int, least: int, batches: list[list[int]] | None = None
    ) -> None:
        self._loader = loader
        self._ranks = ranks
        self._turn = ranks * (loader.batch_size or 0)
        self._least = least * ranks
        self._batches = batches if batches is not None else []

    def __iter__(self) -> Iterator[Any]:
        its = self._loader
        self._batches.clear()
        if isinstance(its.dataset, IterableDataset):
            yield from DataLoader(
                its.dataset,
                batch_size=self._turn,
                num_workers=its.num_workers,
                collate_fn=its.collate_fn,
                drop_last=its.drop_last,
                generator=its.generator,
                worker_init_fn=its.worker_init_fn,
            )
            return
        for turn in self._of_batches() if its.batch_size is None else self._of_samples():
            self._batches.append(turn)
            yield its.collate_fn([its.dataset[index] for index in turn])

    def _of_samples(self) -> list[list[int]]:
        its = self._loader
        samples = range(len(its.dataset))  # type: ignore[arg-type]
        drawn = DataLoader(samples, batch_size=1, sampler=its.sampler, generator=its.generator)  # type: ignore[arg-type]
        order = [int(index) for index in drawn]
        turns = [order[at : at + self._turn] for at in range(0, len(order), self._turn)]
        if len(turns[-1]) < self._turn and its.drop_last:
            turns.pop()
        elif len(turns) > 1 and len(turns[-1]) < self._least:
            turns[-2:] = [turns[-2] + turns[-1]]
        return turns

    def _of_batches(self) -> list[list[int]]:
        """As many batches of the loader's own as there are ranks make a turn."""
        its = self._loader
        drawn = DataLoader(
            range(len(its.dataset)),  # type: ignore[arg-type]
            batch_sampler=its.batch_sampler,
            generator=its.generator,
            collate_fn=list,
        )
        batches = [list(map(int, batch)) for batch in drawn]
        turns = (batches[at : at + self._ranks] for at in range(0, len(batches), self._ranks))
        return [[index for batch in turn for index in batch] for turn in turns]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Numbers that any thread draws for itself."""
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def fixed(model: nn.Module, seed: int = 0) -> nn.Module:
    """A module in float64 with weights that do not depend on what other threads draw."""
    model = model.double()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * numbers(*parameter.shape, seed=100 * seed + number))
    return model


def network(seed: int = 0, inputs: int = 3, outputs: int = 2) -> nn.Module:
    """A small one."""
    return fixed(nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)), seed)


def dataset(samples: int, inputs: int = 3, outputs: int = 2) -> TensorDataset:
    """What it is trained on."""
    return TensorDataset(numbers(samples, inputs, seed=1), numbers(samples, outputs, seed=2))


def flat(*modules: nn.Module) -> np.ndarray:
    """All parameters and buffers as one array."""
    tensors = [its for module in modules for its in module.state_dict().values()]
    return np.concatenate([its.detach().double().flatten().numpy() for its in tensors])


def on_ranks(
    ranks: int,
    loop: Callable[[Any], Any],
    *,
    kill_at: Mapping[int, int] | None = None,
    hosts: list[int] | None = None,
    **options: Any,
) -> list[Any]:
    """What a loop returns on each rank that is left at its end; raises TimeoutError if ranks hang."""
    found: list[Any] = []

    def program(world: World) -> Any:
        try:
            return loop(rankwise.Run(world=world, **options))
        except NotNeeded:  # a spare
            return Killed

    def all_ranks() -> None:
        try:
            found.extend(run_in_threads(ranks, program, kill_at=kill_at, hosts=hosts))
        except BaseException as error:  # it is raised to the caller below
            found.append(error)

    thread = threading.Thread(target=all_ranks, daemon=True)
    thread.start()
    thread.join(TIME_S)
    if thread.is_alive():
        raise TimeoutError(f"ranks hang after {TIME_S} s")
    for its in found:
        if isinstance(its, BaseException):
            raise its
    return [its for its in found if its is not Killed]


def assert_one_process(ranks: int, loop: Callable[[Any], np.ndarray], least: int = 1, **options: Any) -> None:
    """N ranks end with the numbers of one process, and with the same bits."""
    expected = loop(Alone(ranks, least=least))
    results = on_ranks(ranks, loop, **options)
    assert results
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    np.testing.assert_allclose(results[0], expected, rtol=0, atol=1e-10)
