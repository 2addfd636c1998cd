"""Sharing data out to ranks."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset, Subset

from rankwise.errors import ConfigError


def share_of(data: Any, rank: int, size: int) -> tuple[Any, int]:
    """A rank's part of data to be evaluated, and its rows. Raises ConfigError for what has no length."""
    if isinstance(data, DataLoader):
        part, rows = share_of(data.dataset, rank, size)
        loader = DataLoader(
            part,
            batch_size=data.batch_size,
            num_workers=data.num_workers,
            collate_fn=data.collate_fn,
            pin_memory=data.pin_memory,
        )
        return loader, rows
    try:
        rows = len(data)
    except TypeError:
        raise ConfigError(
            f"run.shard got data of type {type(data).__name__}, which has no length: expected a tensor, an "
            "array, a list, a Dataset or a DataLoader"
        ) from None
    start, stop = (rows * place // size for place in (rank, rank + 1))
    if isinstance(data, Dataset):
        return Subset(data, range(start, stop)), stop - start
    return data[start:stop], stop - start
