"""Data as users have them: loaders, datasets, lists of batches, in batches of (inputs, targets)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from natgrad.linalg.tree import describe, leaves_of

BATCH = 64  # data of a dataset that are run together, where nothing is said


class Batches:
    """(inputs, targets) batch by batch, in the same order every time.

    Args:
        data: a loader, a dataset of single data, a list of batches, or one batch ``(inputs, targets)`` of tensors.
        what: its name in messages.
        batch: how many data of a dataset go together.

    Raises:
        TypeError: it is none of these.
        ValueError: the loader shuffles, so that rows of scores would belong to no datum.
    """

    def __init__(self, data: Any, what: str, batch: int = BATCH) -> None:
        self.what = what
        if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) and leaves_of(data[0]):
            data = [data]
        if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
            data = DataLoader(data, batch_size=batch)
        if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
            raise TypeError(
                f"{what} takes a loader or a dataset of (inputs, targets), or a list of batches, got {describe(data)}"
            )
        if isinstance(getattr(data, "sampler", None), RandomSampler):
            raise ValueError(
                f"the loader of {what} shuffles, so that no one knows which datum a score is of; give one with "
                "shuffle=False, or the dataset"
            )
        self.once = isinstance(data, Iterator)  # can be read a single time
        self.source = data
        self.read = False

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        if self.once and self.read:
            raise ValueError(
                f"{self.what} is read more than once, but it is an iterator, which is at its end after the first time; "
                "give a loader, a dataset or a list of batches"
            )
        self.read = True
        empty = True
        for batch in self.source:
            empty = False
            pair = isinstance(batch, (tuple, list)) and len(batch) == 2
            yield (batch[0], batch[1]) if pair else (batch, None)
        if empty:
            raise ValueError(f"{self.what} is empty")

    @property
    def count(self) -> int | None:
        """How many data there are, where that is known before they are read."""
        whole = getattr(self.source, "dataset", None)
        return len(whole) if isinstance(whole, Sized) and not isinstance(whole, IterableDataset) else None
